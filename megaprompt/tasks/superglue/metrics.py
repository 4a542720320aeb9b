"""SuperGLUE's metrics, as the P-tuning paper reports them (arXiv 2103.10385, Tables 3 to 5).

Every task has a score, which is what the paper's average is over: the metric itself, or the mean of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Groups = Sequence[str | None]
"""What each example is scored together with."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of a task, and their names; the first one, the score, is the mean of the others.

    Args:
        headings: of all but the score, by name.
        compute: gets the answers [I] and the right ones [I], classes from 0, and the groups of the examples.
        stops_on: none of which may fall on dev (`engine.best`), accuracy among them; those in `headings` if empty.
    """

    headings: dict[str, str]
    compute: Callable[[Tensor, Tensor, Groups], tuple[float, ...]]
    stops_on: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        return {"score": "score", **self.headings}

    def __call__(self, said: Tensor, gold: Tensor, groups: Groups) -> dict[str, float]:
        """All metrics, and the accuracy, by name; not a number if nothing was asked."""
        if not len(gold):
            return dict.fromkeys([*self.names, "accuracy"], float("nan"))
        values = self.compute(said, gold, groups)
        named = dict(zip(self.headings, values, strict=True))
        return {"score": sum(values) / len(values), "accuracy": accuracy(said, gold), **named}


def accuracy(said: Tensor, gold: Tensor) -> float:
    """The share of right answers."""
    return (said == gold).double().mean().item()


def f1(said: Tensor, gold: Tensor, of: int) -> float:
    """Of one class; 0 if it was neither said nor right."""
    both = ((said == of) & (gold == of)).sum().item()
    return 2 * both / max(1, ((said == of).sum() + (gold == of).sum()).item())


def macro_f1(said: Tensor, gold: Tensor) -> float:
    """The mean F1 of the classes that were said or right."""
    classes = set(said.tolist()) | set(gold.tolist())
    return sum(f1(said, gold, each) for each in classes) / len(classes)


def exact_match(said: Tensor, gold: Tensor, groups: Groups) -> float:
    """The share of groups in which all answers are right."""
    right: dict[str | None, bool] = {}
    for group, one in zip(groups, (said == gold).tolist(), strict=True):
        right[group] = right.get(group, True) and one
    return sum(right.values()) / len(right)


ACCURACY = Metrics({"accuracy": "accuracy"}, lambda said, gold, groups: (accuracy(said, gold),))
ACCURACY_AND_F1 = Metrics(
    {"accuracy": "accuracy", "macro_f1": "F1"}, lambda said, gold, groups: (accuracy(said, gold), macro_f1(said, gold))
)
"""CB's."""
EM_AND_F1A = Metrics(
    {"em": "EM", "f1a": "F1a"},
    lambda said, gold, groups: (exact_match(said, gold, groups), f1(said, gold, 1)),
    stops_on=("accuracy", "f1a"),
)
"""MultiRC's: of the questions, all of whose answers have to be right, and of the answers together. The paper's code
stops by the accuracy of the answers."""
