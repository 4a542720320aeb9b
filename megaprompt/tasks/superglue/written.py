"""WSC: the model writes what a pronoun stands for, and whether that means the span that is given is the answer.

There are no other candidates in the data, so none can be likelier. As in the original code, the model learns from true
statements alone, by the likelihood of the right span, and writes greedily: in each round the most confident position
that is open takes its likeliest token. A causal model has one such position, the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaprompt.tasks.objective import Answers, Outputs
from megaprompt.tasks.superglue.kinds import Kind
from megaprompt.tasks.superglue.objectives import OneOfSeveral

if TYPE_CHECKING:
    from megaprompt.tasks.task import Example, Instance


def mean_the_same(one: str, other: str) -> bool:
    """Whether all words of one text are in the other, letters alone counting, of either case; no words mean nothing."""
    words = [set(re.findall(r"[^\W\d_]+", text.lower())) for text in (one, other)]
    return all(words) and (words[0] <= words[1] or words[1] <= words[0])


class Written(OneOfSeveral):
    """False or True, by what the model writes.

    Args:
        length: of a text in tokens.
        decode: tokens to text.
        longest: what is given, in tokens.
        pad: the token that stands for nothing, if there is one.
    """

    def __init__(
        self,
        kind: Kind,
        length: Callable[[str], int],
        decode: Callable[[Sequence[int]], str],
        longest: int,
        pad: int | None = None,
    ) -> None:
        super().__init__(kind)
        self._length, self._decode, self._longest, self.pad = length, decode, longest, pad

    def tokens_to_write(self, given: str) -> int:
        """One more than what is given has, as in the original code."""
        return self._length(given) + 1

    def text_of(self, example: Example) -> str | None:
        return example.given if example.gold else None

    def said(self, answers: Answers) -> Tensor:
        return answers["said"]

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        """[I, 1]: the log-probabilities of right answers, in training."""
        return outputs.by_instance(outputs.log_probabilities())

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        """The mean over the tokens of each right answer."""
        tokens = outputs.query_of_target.bincount(minlength=len(gold))
        return -self.scores(outputs, head)[:, 0] / tokens

    def blank(self, instances: int) -> Answers:
        """What one round reads: the most confident `target` of each instance, by its place, and the likeliest `token`
        there."""
        return {name: torch.zeros(instances, dtype=torch.int64) for name in ("target", "token")}

    def read(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Answers:
        likelihood, token = (each.cpu() for each in outputs.at_targets().log_softmax(1).max(1))
        counts = outputs.query_of_target.bincount(minlength=len(gold)).tolist()
        read = self.blank(len(gold))
        for i, (p, tokens) in enumerate(zip(likelihood.split(counts), token.split(counts), strict=True)):
            read["target"][i] = p.argmax()
            read["token"][i] = tokens[p.argmax()]
        return read

    def rounds(self, instances: Sequence[Instance]) -> Generator[Sequence[Instance], Answers, Answers]:
        """Returns the answers that were `said` [I], and what was `written` [I, tokens], -1 behind its end."""
        open_ = dict(enumerate(instances))
        written: list[dict[int, int]] = [{} for _ in instances]  # position -> token
        while open_:
            read = yield list(open_.values())
            for i, target, token in zip(list(open_), read["target"].tolist(), read["token"].tolist(), strict=True):
                instance = open_.pop(i)
                assert instance.given is not None
                [query] = instance.queries
                at = query.targets[target]
                if query.bidirectional:
                    tokens = (*query.tokens[:at], token, *query.tokens[at + 1 :])
                    targets = tuple(other for other in query.targets if other != at)
                else:
                    tokens, at = (*query.tokens, token), len(query.tokens)
                    targets = (at,) if len(written[i]) + 1 < self.tokens_to_write(instance.given) else ()
                written[i][at] = token
                if targets:
                    open_[i] = instance._replace(queries=(query._replace(tokens=tokens, targets=targets),))
        return self._judged(instances, [[tokens[at] for at in sorted(tokens)] for tokens in written])

    def _judged(self, instances: Sequence[Instance], written: Sequence[Sequence[int]]) -> Answers:
        table = torch.full((len(written), self._longest + 1), -1)
        for i, tokens in enumerate(written):
            table[i, : len(tokens)] = torch.tensor(tokens)
        said = [mean_the_same(self._decode(w), one.given or "") for w, one in zip(written, instances, strict=True)]
        return {"said": torch.tensor(said, dtype=torch.int64), "written": table}

    def _more(self, answers: Answers, i: int) -> dict[str, Any]:
        return {"written": self._decode([token for token in answers["written"][i].tolist() if token >= 0]).strip()}
