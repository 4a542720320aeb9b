"""Trunks: what queries begin with, where a frozen causal model computes the same for it every time.

A token's keys and values depend on the tokens before it only. Before its first pseudo token a query is plain text, such
as demonstrations or a passage, so that part, its *constant* part, can be computed in advance, once for all queries that
share it and for all steps; a pass then computes the rest of each query, its *tail*.

    8 facts as demonstrations | The capital of France ...        one trunk, shared by all queries of a relation
                              | The capital of Peru ...
    passage | first question  | <P.0> <P.1> ...                  trunks behind trunks: a query's path
            | second question | <P.0> <P.1> ...

`cut` finds the trunks of some queries and marks each query with the ends of those on its path (`Query.cuts`). It goes
by the queries alone, never by what has been computed already, so a run that is continued cuts as it did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from megaprompt.prompting.query import Query, common

SHORTEST = 16
"""Tokens from which on a trunk is worth its pass. (Measured with 135M parameters on one core: in training, text of 16
tokens before each question costs 6 % more than without trunks if it is used once, and a step half as much from then on;
text of 16 that a batch of 8 shares, 2 % more, and a step 15 % less. With 64 tokens the first use is cheaper, too.)"""
_SPARED = 32
"""Tokens that a trunk must spare where questions are asked once: about what a pass costs beside its tokens."""


class Trunk(NamedTuple):
    """A piece of text together with all text before it: what its keys and values depend on."""

    tokens: tuple[int, ...]  # from the beginning of the text on
    cuts: tuple[int, ...]  # where the trunks before this one end

    @property
    def length(self) -> int:
        """How many of the tokens are its own."""
        return len(self.tokens) - (self.cuts[-1] if self.cuts else 0)


def trunks_of(query: Query) -> list[Trunk]:
    """The trunks that a query was cut into, from its beginning on."""
    return [Trunk(query.tokens[:end], query.cuts[:i]) for i, end in enumerate(query.cuts)]


def constant_tokens(query: Query) -> int:
    """How many tokens of a query can be computed in advance: those before its first pseudo token and its first target,
    none if it is bidirectional. 0 also means that its template begins with a learned token: nothing can be kept."""
    if query.bidirectional:
        return 0
    end = min(query.targets)
    return next((i for i, token in enumerate(query.tokens[:end]) if token < 0), end)


class _Piece(NamedTuple):
    """A stretch of text that some queries share."""

    start: int
    end: int
    queries: range  # that have it, as places among the sorted ones
    parent: int | None  # which piece it stands behind


def cut(queries: Sequence[Query], *, row_tokens: int | None = None, budget: int | None = None) -> list[Query]:
    """Mark queries with the trunks that pay, of at least `SHORTEST` tokens; those that are cut stay as they are.

    Args:
        queries: of one causal backbone.
        row_tokens: the queries are asked only once. A trunk then pays where many share it, so that rows of this width
            would repeat it; within a row it would be computed only once anyway.
        budget: trunks may have so many tokens together; those that most queries share come first.
    """
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}  # by their constant part and all of them
    for i, query in enumerate(queries):
        if not query.cuts and (constant := constant_tokens(query)) >= SHORTEST:
            alike.setdefault((query.tokens[:constant], query.tokens), []).append(i)
    order = sorted(alike)
    pieces = _pieces([text for text, _ in order], [len(tokens) for _, tokens in order], row_tokens)
    cuts = [query.cuts for query in queries]
    chosen: set[int | None] = {None}
    left = budget
    # Longer paths have fewer queries, so a piece comes after the one before it.
    for number, piece in sorted(enumerate(pieces), key=lambda item: -len(item[1].queries)):
        tokens = piece.end - piece.start
        if piece.parent not in chosen or (left is not None and tokens > left):
            continue
        chosen.add(number)
        left = None if left is None else left - tokens
        for place in piece.queries:
            for i in alike[order[place]]:
                cuts[i] += (piece.end,)
    return [query._replace(cuts=ends) for query, ends in zip(queries, cuts, strict=True)]


def _pieces(texts: Sequence[tuple[int, ...]], lengths: Sequence[int], row_tokens: int | None) -> list[_Piece]:
    """All pieces that pay, each behind the one that it continues.

    Args:
        texts: the constant parts of different queries, sorted.
        lengths: of the queries.
    """
    total = [0, *accumulate(lengths)]
    pieces: list[_Piece] = []

    def pays(start: int, end: int, some: range) -> bool:
        length = end - start
        if length < SHORTEST or row_tokens is None:
            return length >= SHORTEST
        tails = total[some.stop] - total[some.start] - end * len(some)
        more_rows = (tails - 1) // max(1, row_tokens - length)
        return len(some) > 1 and min(more_rows, len(some) - 1) * length >= _SPARED

    waiting: list[tuple[range, int, int | None]] = [(range(len(texts)), 0, None)] if texts else []
    while waiting:
        some, start, parent = waiting.pop()
        end = common(texts[some[0]], texts[some[-1]])  # of all between them too, since they are sorted
        if pays(start, end, some):
            pieces.append(_Piece(start, end, some, parent))
            start, parent = end, len(pieces) - 1
        longer = [i for i in some if len(texts[i]) > end]
        for _, branch in groupby(longer, key=lambda i: texts[i][end]):
            together = list(branch)
            if max(len(texts[i]) for i in together) - start >= SHORTEST:
                waiting.append((range(together[0], together[-1] + 1), start, parent))
    return pieces
