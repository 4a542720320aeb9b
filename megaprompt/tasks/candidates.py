"""Answers of any length: each candidate is a query, or several, and is as good as its text is likely.

A causal model reads each candidate in its place: the score is the log-probability of the candidate's tokens and of
those behind them, given what stands before. The candidates of an instance are a prefix tree below what they have in
common (`prompting.packing`). A masked model's score is the pseudo log-likelihood (`pseudo_likelihood` of
`prompting.template`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megaprompt.tasks.objective import Answers, Objective, Outputs

LearnBy = Literal["answer", "candidates"]


@dataclass(frozen=True, eq=False)
class Candidates(Objective):
    """The most likely of some texts.

    Args:
        learn_by: what is made small in training: the negative log-probability of the right answer (`answer`), or that
            of the right answer among the candidates (`candidates`).
    """

    learn_by: LearnBy = "candidates"

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        """Log-probabilities [instances, most candidates]; minus infinity where an instance has fewer."""
        return outputs.by_instance(outputs.log_probabilities())

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        scores = self.scores(outputs, head)
        if self.learn_by == "answer":
            return -scores.gather(1, gold[:, None])[:, 0]
        return cross_entropy(scores, gold, reduction="none")

    @abstractmethod
    def answer(self, scores: Tensor, gold: Tensor) -> Answers:
        """What scores [I, candidates] say; candidates that an instance does not have are minus infinity."""


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
