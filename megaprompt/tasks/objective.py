"""How an answer is scored: what is read at the targets, the loss, the answer, the metrics, and what chooses on dev.

An objective turns what the backbone gives at the targets of some instances into scores [instances, answers]; loss and
answers follow from the scores. Kinds of questions differ in nothing else:

    one token of the vocabulary     a row of logits for each instance              (`tasks.lama.one_token`)
    a class                         some of its columns, or a head on the hidden state
    a candidate of several tokens   `Outputs.log_probabilities`, one for each query of the instance
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from megaprompt.tasks.task import Example, Instance

Answers = dict[str, Tensor]
"""What is known of each of I instances: tensors [I, ...] by name, on the CPU."""


@dataclass(frozen=True)
class Outputs:
    """What the backbone gives for I instances with Q queries and T targets in all."""

    values: Tensor  # [N, D] at the N distinct targets: logits over the vocabulary, or hidden states
    value_of_target: Tensor  # [T] int64; which of the N is read at each target
    query_of_target: Tensor  # [T] int64
    labels: Tensor  # [T] int64; the tokens of answers that are given, 0 elsewhere
    instance_of_query: Tensor  # [Q] int64
    candidate_of_query: Tensor  # [Q] int64; which candidate of its instance it belongs to

    def at_targets(self) -> Tensor:
        """[T, D], in at least single precision."""
        return _at_least_float32(self.values.index_select(0, self.value_of_target))

    def log_probabilities(self) -> Tensor:
        """[Q] of each query's labels together: how likely the given answer is."""
        values = _at_least_float32(self.values)
        # By parts, so that there is no second copy of all logits, and a part stays in the processor's cache.
        parts = values.split(max(1, _ELEMENTS // max(1, values.shape[1])))
        normalizers = torch.cat([part.logsumexp(1) for part in parts])
        each = values[self.value_of_target, self.labels] - normalizers[self.value_of_target]
        return each.new_zeros(len(self.instance_of_query)).index_add(0, self.query_of_target, each)

    def by_instance(self, of_queries: Tensor) -> Tensor:
        """Values [Q] of queries as [I, most candidates of an instance], those of a candidate added up; minus infinity
        where an instance has fewer."""
        if not len(of_queries):
            return of_queries.new_zeros(0, 0)
        where = (self.instance_of_query, self.candidate_of_query)
        shape = (int(where[0].max()) + 1, int(where[1].max()) + 1)
        table = of_queries.new_zeros(shape).index_put(where, of_queries, accumulate=True)
        none = torch.ones(shape, dtype=torch.bool, device=of_queries.device)
        none[where] = False
        return table.masked_fill(none, -torch.inf)


_ELEMENTS = 1 << 21  # of logits that are worked on at once


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class Objective(ABC):
    """One kind of question."""

    reads: Literal["logits", "hidden"] = "logits"
    """What the backbone is to give at the targets."""
    metrics: Mapping[str, str]
    """Names of metrics -> what a table calls them. The first one is the score. All are shares, best at 1."""
    selects: tuple[str, ...]
    """Which metrics choose on dev: the first decides, the others among equals. Early stopping looks at the first."""
    few: int = 64
    """With fewer dev examples than these, of which each moves the first metric by points, the last one decides."""
    items: str = "examples"
    """What tables call the instances."""
    goes_on: bool = False
    """Whether later rounds go on from where queries of the first one begin to be read (`rounds`); their keys and values
    are then kept, by group."""

    def new_head(self, hidden_size: int) -> nn.Module | None:
        """What is trained on top of the backbone for this question; None if nothing is."""
        return None

    @property
    def together(self) -> tuple[str, ...]:
        """The metrics none of which may fall where ties on dev are kept."""
        return self.selects[:1]

    @property
    def needs_training(self) -> bool:
        """Whether nothing can be answered without training."""
        return self.new_head(1) is not None

    @abstractmethod
    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        """[I, answers], differentiable; a softmax over them are the probabilities of the answers."""

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        """[I] of the right answers [I]; cross-entropy of the scores, unless a question needs another."""
        return cross_entropy(self.scores(outputs, head), gold, reduction="none")

    @abstractmethod
    def blank(self, instances: int) -> Answers:
        """Answers to be filled in, of zeros."""

    @abstractmethod
    def answer(self, scores: Tensor, gold: Tensor) -> Answers:
        """What scores [I, answers] say."""

    def read(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Answers:
        """What outputs say."""
        return self.answer(self.scores(outputs, head), gold)

    def rounds(self, instances: Sequence[Instance]) -> Generator[Sequence[Instance], Answers, Answers]:
        """Ask instances: yields what is to be asked, gets what was read, and returns the answers.

        One round is enough, unless an answer is written token by token.
        """
        return (yield instances)

    @abstractmethod
    def measure(self, answers: Answers, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        """The metrics of answers, given what was asked (gold and groups); not a number if nothing was."""

    def deciding(self, examples: int) -> tuple[str, ...]:
        """`selects`, in the order in which they choose on so many dev examples."""
        return self.selects if examples >= self.few else self.selects[::-1]

    def evidence(self, scores: Mapping[str, float], examples: int) -> list[float]:
        """By what scores on so many dev examples are compared; the larger is the better."""
        return [scores[name] for name in self.deciding(examples)]

    def majority(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float | None]:
        """The metrics of always giving the answer that is most frequent in train; None where that says nothing."""
        counts = Counter(example.gold for example in train)
        right: float | None = None
        if counts and examples:
            best = min(counts, key=lambda gold: (-counts[gold], gold))
            right = sum(example.gold == best for example in examples) / len(examples)
        return dict.fromkeys(self.metrics) | {next(iter(self.metrics)): right}

    def constant(self, examples: Sequence[Example]) -> dict[str, float]:
        """The best that any single answer scores if it is always given, by metric; empty where nobody asks for it."""
        return {}

    @abstractmethod
    def describe(self, example: Example, answers: Answers, i: int) -> dict[str, Any]:
        """The answer to one example, ready for JSON: `right`, or `rank`, and whatever else helps to judge it."""
