"""The rows of a packed pass while they are filled (see `packing`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megaprompt.prompting.query import Query
from megaprompt.prompting.trunks import Trunk, trunks_of


class Row:
    """One row while it is filled: nodes of the prefix tree, in depth-first order, behind trunks."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.visible_from: list[int] = []
        self.visible_until: list[int] = []
        self.path: list[int] = []  # positions of the nodes from the root, or the last trunk, to the newest one
        self.ends: list[tuple[int, list[int]]] = []  # (query, positions of its targets)
        self.newest: Query | None = None
        self.trunks: list[Trunk] = []  # in front of the row
        self.seen_from: list[int] = []  # by which of its positions each trunk is
        self.seen_until: list[int] = []
        self.behind: list[int] = []  # the trunks before the path
        self.known = 0  # positions of all trunks

    def fits(self, query: Query, row_tokens: int, known_tokens: int) -> bool:
        """Whether there is room for what a query would add."""
        if self._is_newest(query):
            return True
        trunks, nodes = self._shared(query)
        computed = len(query.tokens) - end_of(query.cuts) - nodes
        known = end_of(query.cuts) - end_of(query.cuts[:trunks])
        return (not computed or len(self.tokens) + computed <= row_tokens) and (
            not known or self.known + known <= known_tokens
        )

    def _is_newest(self, query: Query) -> bool:
        """Whether its tokens are the last ones of the row, whatever is read there."""
        newest = self.newest
        return newest is not None and query._replace(targets=newest.targets, labels=newest.labels) == newest

    def _shared(self, query: Query) -> tuple[int, int]:
        """How many trunks, and nodes of the path behind them, a query shares with the newest one."""
        if self.newest is None or query.bidirectional:  # there, what a token is depends on all others
            return 0, 0
        trunks = start = nodes = 0
        for end, other in zip(query.cuts, self.newest.cuts, strict=False):
            if end != other or query.tokens[start:end] != self.newest.tokens[start:end]:
                break
            trunks, start = trunks + 1, end
        if trunks == len(query.cuts) == len(self.newest.cuts):
            for position, token in zip(self.path, query.tokens[start:], strict=False):
                if self.tokens[position] != token:
                    break
                nodes += 1
        return trunks, nodes

    def add(self, number: int, query: Query) -> None:
        known = end_of(query.cuts)
        if not self._is_newest(query):
            self._extend(query, known)
            self.newest = query
        self.ends.append((number, [self.path[target - known] for target in query.targets]))

    def _extend(self, query: Query, known: int) -> None:
        trunks, nodes = self._shared(query)
        del self.path[nodes:], self.behind[trunks:]
        for trunk in trunks_of(query)[trunks:]:
            self.behind.append(len(self.trunks))
            self.trunks.append(trunk)
            self.seen_from.append(len(self.tokens))
            self.seen_until.append(0)
            self.known += trunk.length
        for depth in range(known + nodes, len(query.tokens)):
            self.path.append(len(self.tokens))
            self.tokens.append(query.tokens[depth])
            self.depths.append(depth)
            self.visible_from.append(self.path[0] if query.bidirectional else self.path[-1])
            self.visible_until.append(0)
        for position in self.path:
            self.visible_until[position] = len(self.tokens)
        for number_of_trunk in self.behind:
            self.seen_until[number_of_trunk] = len(self.tokens)

    def keys(self, known: int, width: int) -> tuple[list[int], list[int]]:
        """By which positions each key is seen, from and until: trunks, with padding `known`, and the row, with padding
        `width`."""
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


def fill_rows(
    rows: list[Row], queries: Sequence[Query], order: Iterable[int], row_tokens: int, known_tokens: int
) -> list[Row]:
    """Add queries to the rows, in this order; the last row is filled first.

    A row has at most so many tokens, behind at most so many known ones; more of either only for a single query.
    """
    for index in order:
        if not rows or not rows[-1].fits(queries[index], row_tokens, known_tokens):
            rows.append(Row())
        rows[-1].add(index, queries[index])
    return rows
