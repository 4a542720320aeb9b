"""The exact search among texts: only what can still matter is computed.

The score of a text is a sum of log-probabilities, none of them above zero, so the sum over its beginning bounds the
whole from above. Texts that begin alike are a branch. The first round reads all branches where the texts part, which
costs one node, and the right text to its end. From then on only branches whose bound reaches what they have to beat are
read further: the score of the right text where its rank is wanted, the best score so far where the best text is.
What is read of a text in several rounds adds up to its score.

    The capital of Peru is | Lim a .       bound -0.9      read to its end: -1.1
                           | Qu ito .            -4.2      cannot win any more
                           | New York City .     -7.5      cannot win any more
                                 Delhi .

Each round computes the words before the answer again, so it reads branches worth at least as many tokens. Where more
words follow the answer than a closing full stop, the bounds say little, since the same words follow every answer: then,
as where the answer stands first, all is read in one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, NamedTuple

from megaprompt.prompting.query import Query
from megaprompt.tasks.task import Instance

Needs = Literal["all", "rank", "best"]
"""What must be known: all scores, the rank of the right text, or the best text and whether it is the right one."""

_BEHIND = 2  # labels that all texts end with, more than which make the bounds useless


class _Branch(NamedTuple):
    """Texts that begin alike."""

    candidates: tuple[int, ...]
    known: int  # how many targets of theirs have been read
    bound: float  # the sum of what was read


class _Part(NamedTuple):
    """What one query reads: the targets of a branch from those that are known on, to where its texts part."""

    candidates: tuple[int, ...]
    start: int
    end: int
    before: float  # the sum of the targets before `start`


class Search:
    """The candidates of one instance. `ask` and `tell` take turns until there is nothing left to ask.

    Args:
        instance: with a query for each candidate, or several (masked models), which one round reads.
    """

    def __init__(self, instance: Instance, needs: Needs) -> None:
        self._queries, self._gold = instance.queries, instance.gold
        self._owners = instance.candidates or tuple(range(len(instance.queries)))
        self.scores = [0.0] * (1 + max(self._owners))
        """Of each candidate; meaningful where it is `known`."""
        self._all = needs == "all" or self._queries[0].bidirectional or _alike_at_the_end(self._queries) > _BEHIND
        self._wants_rank = needs == "rank"
        self._steps = () if self._all else [_steps(query) for query in self._queries]
        self._done: set[int] = set()
        self._open = [_Branch(tuple(i for i in range(len(self.scores)) if i != self._gold), 0, 0.0)]
        self._parts: list[_Part] = []
        self._pruned = -float("inf")  # no text that was given up is better
        self._worth = 1 + self._queries[self._gold].targets[0]  # nodes that a round reads, at least

    def ask(self) -> Sequence[Query]:
        """What to read next; nothing if all is known that must be."""
        if len(self._done) == len(self.scores):
            return ()
        if self._all:
            return self._queries
        if self._done:
            self._parts = self._chosen()
        else:
            self._parts = [_Part((self._gold,), 0, len(self._steps[self._gold]), 0.0)]
            self._parts += [part for branch in self._open if branch.candidates for part in self._parts_of(branch)]
            self._open = []
        return [self._query(part) for part in self._parts]

    def tell(self, values: Sequence[float]) -> None:
        """What was read of each query: the log-probability of its labels together."""
        if self._all:
            for owner, value in zip(self._owners, values, strict=True):
                self.scores[owner] += value
            self._done.update(range(len(self.scores)))
            return
        for part, value in zip(self._parts, values, strict=True):
            bound = part.before + value
            complete = [i for i in part.candidates if len(self._steps[i]) == part.end]
            for i in complete:
                self.scores[i] = bound
            self._done.update(complete)
            if longer := tuple(i for i in part.candidates if i not in complete):
                self._open.append(_Branch(longer, part.end, bound))

    @property
    def known(self) -> list[bool]:
        """Of each candidate whether its score is known, and its place among all of them."""
        return [i in self._done and score > self._pruned for i, score in enumerate(self.scores)]

    @property
    def complete(self) -> bool:
        """Whether the scores of all are known."""
        return len(self._done) == len(self.scores)

    def _chosen(self) -> list[_Part]:
        """What is read next. Those branches are open no more, nor are those that do not matter any more."""
        least = self.scores[self._gold] if self._wants_rank else max(self.scores[i] for i in self._done)
        self._pruned = max([self._pruned, *(branch.bound for branch in self._open if branch.bound < least)])
        self._open = sorted((branch for branch in self._open if branch.bound >= least), key=lambda one: one.bound)
        parts: list[_Part] = []
        nodes = 0
        while self._open and (self._wants_rank or nodes < self._worth):
            found = self._parts_of(self._open.pop())
            parts += found
            nodes += max(part.end - part.start for part in found)
        self._worth *= 2
        return parts

    def _parts_of(self, branch: _Branch) -> list[_Part]:
        """What is read of a branch: up to where its texts part, and one target more."""
        paths = [self._steps[i] for i in branch.candidates]
        end, shortest = branch.known, min(map(len, paths))
        while end < shortest and all(path[end] == paths[0][end] for path in paths):
            end += 1
        children: dict[object, list[int]] = {}
        for i, path in zip(branch.candidates, paths, strict=True):
            children.setdefault(path[end] if end < len(path) else None, []).append(i)
        return [
            _Part(tuple(child), branch.known, end + (step is not None), branch.bound)
            for step, child in children.items()
        ]

    def _query(self, part: _Part) -> Query:
        whole = self._queries[part.candidates[0]]
        targets = whole.targets[part.start : part.end]
        return whole._replace(
            tokens=whole.tokens[: targets[-1] + 1], targets=targets, labels=whole.labels[part.start : part.end]
        )


def _steps(query: Query) -> list[tuple[tuple[int, ...], int]]:
    """For each target the tokens since the one before it, and the label: texts with the same steps are the same."""
    starts = (0, *(target + 1 for target in query.targets))
    return [
        (query.tokens[start : target + 1], label)
        for start, target, label in zip(starts, query.targets, query.labels, strict=False)
    ]


def _alike_at_the_end(queries: Sequence[Query]) -> int:
    """How many labels all texts end with."""
    labels = zip(*(reversed(query.labels) for query in queries), strict=False)
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, labels))
