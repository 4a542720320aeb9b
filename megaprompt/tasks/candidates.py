"""Answers of any length: each candidate is a query, or several, and is as good as its text is likely.

A causal model reads each candidate in its place: the score is the log-probability of the candidate's tokens and of
those behind them, given what stands before. The candidates of an instance are a prefix tree below what they have in
common (`prompting.packing`). A masked model's score is the pseudo log-likelihood (`pseudo_likelihood` of
`prompting.template`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megaprompt.tasks.objective import Answers, Objective, Outputs
from megaprompt.tasks.search import Needs, Search
from megaprompt.tasks.task import Instance

LearnBy = Literal["answer", "candidates"]


@dataclass(frozen=True, eq=False)
class Candidates(Objective):
    """The most likely of some texts.

    Args:
        learn_by: what is made small in training: the negative log-probability of the right answer (`answer`), or that
            of the right answer among the candidates (`candidates`).
        needs: what must be known of the candidates of a question that is asked (`tasks.search`).
    """

    learn_by: LearnBy = "candidates"
    needs: Needs = "all"

    @property
    def goes_on(self) -> bool:  # type: ignore[override]
        return self.needs != "all"

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        """Log-probabilities [instances, most candidates]; minus infinity where an instance has fewer."""
        return outputs.by_instance(outputs.log_probabilities())

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        scores = self.scores(outputs, head)
        if self.learn_by == "answer":
            return -scores.gather(1, gold[:, None])[:, 0]
        return cross_entropy(scores, gold, reduction="none")

    @abstractmethod
    def answer(self, scores: Tensor, gold: Tensor, complete: Tensor | None = None) -> Answers:
        """What scores [I, candidates] say; candidates that an instance does not have are minus infinity.

        Args:
            complete: bool [I], whether all scores are known; if not, minus infinity also stands for those that are not,
                all of which are smaller than those that are. All are complete if not given.
        """

    def blank(self, instances: int) -> Answers:
        """What one round reads: of each query, which is an instance of its own there, its `log_probability`."""
        return {"log_probability": torch.zeros(instances, dtype=torch.float64)}

    def read(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Answers:
        return {"log_probability": outputs.log_probabilities().double().cpu()}

    def rounds(self, instances: Sequence[Instance]) -> Generator[Sequence[Instance], Answers, Answers]:
        """Asks query by query, so that those of all instances that begin alike meet in a pass."""
        searches = [Search(instance, self.needs) for instance in instances]
        asked = [search.ask() for search in searches]
        while True:
            read = yield [Instance((query,), 0, str(n)) for n, queries in enumerate(asked) for query in queries]
            values = iter(read["log_probability"].tolist())
            for search, queries in zip(searches, asked, strict=True):
                if queries:
                    search.tell([next(values) for _ in queries])
            asked = [search.ask() for search in searches]
            if not any(asked):
                return self._answered(searches, instances)

    def _answered(self, searches: Sequence[Search], instances: Sequence[Instance]) -> Answers:
        width = max((len(search.scores) for search in searches), default=1)
        scores = torch.full((len(searches), width), -torch.inf, dtype=torch.float64)
        for row, search in zip(scores, searches, strict=True):
            for place, (score, known) in enumerate(zip(search.scores, search.known, strict=True)):
                if known:
                    row[place] = score
        gold = torch.tensor([instance.gold for instance in instances], dtype=torch.int64)
        return self.answer(scores, gold, torch.tensor([search.complete for search in searches], dtype=torch.bool))


def ranks(scores: Tensor, gold: Tensor) -> Tensor:
    """Ranks [I] int64 of the right candidates [I] by scores [I, candidates]; of equal scores, all others are first."""
    better = scores >= scores.gather(1, gold[:, None])
    return better.scatter(1, gold[:, None], False).sum(1) + 1


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best candidates [I, count] and their log-probabilities among the candidates, best first; -1 and minus
    infinity where there are fewer."""
    missing = max(0, count - scores.shape[1])
    wide = torch.nn.functional.pad(scores.log_softmax(1), (0, missing), value=-torch.inf)
    found = wide.topk(count, dim=1)
    return found.indices.where(found.values > -torch.inf, -1), found.values
