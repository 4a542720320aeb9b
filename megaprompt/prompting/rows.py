"""The rows of a packed pass: which queries each has, known from their sizes, and their nodes when they are filled (see
`packing`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from megaprompt.prompting.query import Query, common
from megaprompt.prompting.trunks import Trunk, trunks_of


class Shared(NamedTuple):
    """What a query shares with the one before it in a row."""

    everything: bool  # all tokens, whatever is read there
    trunks: int
    nodes: int  # behind the trunks


class Size(NamedTuple):
    """The positions of a row."""

    tokens: int  # that are computed
    known: int  # in front of them


_NOTHING = Shared(False, 0, 0)


def shared(query: Query, before: Query, alike: int) -> Shared:
    """What a query shares with the one that stands before it, if so many of their tokens are alike, from the first."""
    known = end_of(query.cuts)
    if alike == len(query.tokens) == len(before.tokens) and query[3:] == before[3:]:
        return Shared(True, len(query.cuts), alike - known)
    if query.bidirectional:  # there, what a token is depends on all others
        return _NOTHING
    if query.cuts == before.cuts and known <= alike:
        return Shared(False, len(query.cuts), alike - known)
    trunks = 0
    for end, other in zip(query.cuts, before.cuts, strict=False):
        if end != other or end > alike:
            break
        trunks += 1
    return Shared(False, trunks, 0)


class Order:
    """Sorted queries, as they stand in rows one after the other, and how much each adds to a row, behind the one before
    it and as a row's first one. Which rows there will be follows from that, so many widths can be tried fast.

    Args:
        alike: with how many tokens each query begins as the one before it does; found out if not given.
    """

    def __init__(self, queries: Sequence[Query], alike: Sequence[int] | None = None) -> None:
        self.queries = queries
        self._alike = [common(a.tokens, b.tokens) for a, b in pairwise(queries)] if alike is None else alike
        self._shared = [_NOTHING][: len(queries)]
        self._shared += [shared(b, a, n) for (a, b), n in zip(pairwise(queries), self._alike, strict=True)]
        ends = [end_of(query.cuts) for query in queries]
        self._alone = [(len(query.tokens) - end, end) for query, end in zip(queries, ends, strict=True)]
        self._behind = [
            (0, 0) if everything else (tokens - nodes, known and known - end_of(query.cuts[:trunks]))
            for query, (everything, trunks, nodes), (tokens, known) in zip(
                queries, self._shared, self._alone, strict=True
            )
        ]

    def some(self, places: Sequence[int]) -> Order:
        """Some of the queries, in the same order: neighbours share what all between them do."""
        return Order([self.queries[i] for i in places], [min(self._alike[i:j]) for i, j in pairwise(places)])

    def filling(self, row_tokens: int, known_tokens: int, start: int = 0) -> Iterator[tuple[int, int, int]]:
        """For each query from `start` on: the row that it stands in, from 0, and the size of that row so far.

        A row has at most so many tokens, behind at most so many known ones; more of either only for a single query.
        """
        row, tokens, known = -1, 0, 0
        for i in range(start, len(self.queries)):
            more, more_known = self._behind[i]
            if row < 0 or (more and tokens + more > row_tokens) or (more_known and known + more_known > known_tokens):
                row += 1
                tokens, known = self._alone[i]
            else:
                tokens += more
                known += more_known
            yield row, tokens, known

    def sizes(self, row_tokens: int, known_tokens: int) -> list[Size]:
        """The sizes of all rows."""
        found = {row: (tokens, known) for row, tokens, known in self.filling(row_tokens, known_tokens)}
        return [Size(*size) for size in found.values()]

    def rows(self, numbers: Sequence[int], row_tokens: int, known_tokens: int) -> list[Row]:
        """The rows, filled.

        Args:
            numbers: by which each query is called in them.
        """
        rows: list[Row] = []
        filling = self.filling(row_tokens, known_tokens)
        for number, query, same, (row, *_) in zip(numbers, self.queries, self._shared, filling, strict=True):
            if row == len(rows):
                rows.append(Row())
                same = _NOTHING
            rows[row].add(number, query, same)
        return rows


class Row:
    """One row while it is filled: nodes of the prefix tree, in depth-first order, behind trunks."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.visible_from: list[int] = []
        self.visible_until: list[int] = []
        self.path: list[int] = []  # positions of the nodes from the root, or the last trunk, to the newest one
        self.ends: list[tuple[int, list[int]]] = []  # (query, positions of its targets)
        self.trunks: list[Trunk] = []  # in front of the row
        self.seen_from: list[int] = []  # by which of its positions each trunk is
        self.seen_until: list[int] = []
        self.behind: list[int] = []  # the trunks before the path
        self.known = 0  # positions of all trunks

    def add(self, number: int, query: Query, same: Shared) -> None:
        """Add a query, which shares so much with the newest one."""
        known = end_of(query.cuts)
        if not same.everything:
            self._extend(query, known, same)
        self.ends.append((number, [self.path[target - known] for target in query.targets]))

    def _extend(self, query: Query, known: int, same: Shared) -> None:
        self._leave(same)
        for trunk in trunks_of(query)[same.trunks :]:
            self.behind.append(len(self.trunks))
            self.trunks.append(trunk)
            self.seen_from.append(len(self.tokens))
            self.seen_until.append(0)
            self.known += trunk.length
        first, depth = len(self.tokens), known + same.nodes
        positions = range(first, first + len(query.tokens) - depth)
        self.path += positions
        self.tokens += query.tokens[depth:]
        self.depths += range(depth, len(query.tokens))
        self.visible_from += [self.path[0]] * len(positions) if query.bidirectional else positions
        self.visible_until += [0] * len(positions)

    def _leave(self, same: Shared) -> None:
        """No later position sees the nodes, and trunks, of the path that a query does not share."""
        end = len(self.tokens)
        for position in self.path[same.nodes :]:
            self.visible_until[position] = end
        for trunk in self.behind[same.trunks :]:
            self.seen_until[trunk] = end
        del self.path[same.nodes :], self.behind[same.trunks :]

    def keys(self, known: int, width: int) -> tuple[list[int], list[int]]:
        """By which positions each key is seen, from and until: trunks, with padding `known`, and the row, with padding
        `width`. Nothing can be added afterwards."""
        self._leave(_NOTHING)
        since, until = [], []
        for trunk, first, last in zip(self.trunks, self.seen_from, self.seen_until, strict=True):
            since += [first] * trunk.length
            until += [last] * trunk.length
        nobody, length = [0] * (known - self.known), len(self.tokens)
        since += nobody + self.visible_from + list(range(length, width))  # padding of the row sees itself only
        until += nobody + self.visible_until + list(range(length + 1, width + 1))
        return since, until


def end_of(cuts: Sequence[int]) -> int:
    """Where the last trunk ends, and the tail begins."""
    return cuts[-1] if cuts else 0
