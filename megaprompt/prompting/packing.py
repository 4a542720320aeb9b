"""Packing: many short queries become few dense rows, and no token is computed twice.

Queries of the LAMA kind are short and alike. Padded to the longest of a batch, most of what the backbone computes is
padding or repetition: every query of a relation starts with the same pseudo tokens, many subjects share their first
words, and facts of an N-M relation share the whole query. Under causal attention the state of a token depends only on
the tokens before it, so equal prefixes have equal states, and a batch of queries is a *prefix tree* whose every node
is computed once:

    <P36.0> <P36.1> <P36.2> South Africa <P36.3> ...        one row, depth-first:
                                  Korea  <P36.3> ...        0 1 2 South Africa 3 .. Korea 3 .. Denmark 3 ..
                            Denmark      <P36.3> ...

Three things make the packed row exact for a transformer:
- the position of a node is its depth in the tree (`position_ids`),
- a node attends to its ancestors and itself. In depth-first order the descendants of a node are an interval, so the
  mask needs two numbers per key: it is visible to the queries in [visible_from[key], visible_until[key]),
- outputs are read at the nodes where queries end, only there.

Under bidirectional attention the state of a token depends on all others, and only whole queries can be shared. They
stand side by side, each visible to itself alone: the same two numbers describe a block-diagonal mask.

Queries are sorted, so that the tree is built by comparing each query with the one before it.

Trunks (see `trunks`) are nodes whose keys and values are known. They are not in the row but in front of it: keys to be
attended to, seen by an interval of the row's positions like any other node.

Models that have their own idea of masks and positions (relative positions, ALiBi, recurrence) get a row for each query
and the padding's mask, nothing else: `row_tokens=None`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprompt.config import PASS_TOKENS, ROW_TOKENS
from megaprompt.prompting.query import Query
from megaprompt.prompting.rows import Order, Row, Size, end_of
from megaprompt.prompting.trunks import Trunk

_SPACE_OF_KNOWN = 0.1
"""Memory of a position whose keys and values are known, where that of one which is computed is 1, about."""


@dataclass(frozen=True)
class PackedBatch:
    """What the backbone computes in one pass. R rows of T positions behind K known ones, N distinct targets, Q queries,
    S pseudo tokens."""

    one_by_one: bool  # a row for each query: the model's own positions and, but for the padding, its own mask
    trunks: tuple[tuple[Trunk, ...], ...]  # in front of each row; with padding, K positions

    token_ids: Tensor  # [R, T] int64; 0 where there is a pseudo token or padding
    position_ids: Tensor  # [R, T] int64; depth in the tree
    visible_from: Tensor  # [R, K+T] int64; key j is attended to by positions
    visible_until: Tensor  # [R, K+T] int64; visible_from[j] <= i < visible_until[j]
    pseudo_positions: Tensor  # [S] int64; where pseudo tokens stand, as indices into R*T
    pseudo_indices: Tensor  # [S] int64; which row of the prompt matrix stands there
    targets: Tensor  # [N] int64; where the objects are predicted, as indices into R*T
    target_of_query: Tensor  # [Q] int64; which of the N targets each query reads; one after the other if it has several

    def attention_mask(self) -> Tensor:
        """Boolean [R, 1, T, K+T]: True where the query position (dim 2) attends to the key (dim 3)."""
        position = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        query = position[:, None]
        return ((self.visible_from[:, None, :] <= query) & (query < self.visible_until[:, None, :]))[:, None]

    def added_mask(self, dtype: torch.dtype) -> Tensor:
        """The same to be added to scores: 0 where it is True, else the least number there is.

        Its rows stand a multiple of 16 elements apart, or attention on a GPU would copy it in each layer.
        """
        mask = self.attention_mask()
        width = -(-mask.shape[-1] // 16) * 16
        least = torch.finfo(dtype).min
        added = torch.full((*mask.shape[:-1], width), least, dtype=dtype, device=mask.device)[..., : mask.shape[-1]]
        return added.masked_fill_(mask, 0)

    def padding_mask(self) -> Tensor:
        """[R, T] int64: 1 where there is a token, of rows with one query each."""
        position = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return (position < self.visible_until[:, :1]).long()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return self.map(lambda tensor: moved(tensor, device))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with its tensors changed."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed = {name: change(value) for name, value in tensors.items()}
        return PackedBatch(self.one_by_one, self.trunks, **changed)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; to a GPU without waiting for what that is at."""
    if device.type == "cuda" and torch.cuda.is_available():  # not where one is made believe
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class PassSize:
    """How much one pass computes: rows of at most `row_tokens` (None: of one query each), in all at most about
    `pass_tokens`. Rows are never wider than a pass. `trunks`: whether queries may be cut (see `trunks`)."""

    row_tokens: int | None = ROW_TOKENS
    pass_tokens: int = PASS_TOKENS
    trunks: bool = True

    def __post_init__(self) -> None:
        if self.row_tokens is not None and self.row_tokens > self.pass_tokens:
            object.__setattr__(self, "row_tokens", self.pass_tokens)

    def exceeded(self, rows: Sequence[Size]) -> bool:
        """Whether some rows are more than a pass."""
        assert self.row_tokens is not None
        if len(rows) <= max(1, self.pass_tokens // self.row_tokens):
            return False
        known = max(row.known for row in rows)
        if not known:
            return True
        width = max(row.tokens for row in rows)  # tails are often short: then more rows fit
        return len(rows) * (width + _SPACE_OF_KNOWN * known) > self.pass_tokens


def split_into_passes(instances: Sequence[Sequence[Query]], size: PassSize) -> list[list[int]]:
    """Cut instances, of one or more queries each, into passes of the given size.

    Returns the indices of the instances of each pass, sorted so that common prefixes meet. The queries of an instance
    stay together, since its loss is made of all of them. A query longer than a row gets a row of its own, an instance
    larger than a pass a pass of its own.
    """
    passes: list[list[int]] = []
    if size.row_tokens is None:
        longest = [max(len(query.tokens) for query in queries) for queries in instances]
        count = 0  # rows of the pass
        for i in sorted(range(len(instances)), key=lambda i: longest[i]):  # the last is the longest
            count += len(instances[i])
            if not passes or count * longest[i] > size.pass_tokens:
                passes.append([])
                count = len(instances[i])
            passes[-1].append(i)
        return passes
    order = sorted(range(len(instances)), key=lambda i: min(query.tokens for query in instances[i]))
    single = all(len(queries) == 1 for queries in instances)
    in_order = Order([instances[i][0] for i in order]) if single else None
    start = 0
    while start < len(order):
        if in_order is not None:
            count = _how_many_stand(in_order, start, size)
        else:
            count = _how_many_fit(instances, order[start:], size)
        passes.append(order[start : start + count])
        start += count
    return passes


def _how_many_stand(order: Order, start: int, size: PassSize) -> int:
    """How many queries, from one on, stand in the rows of a pass; at least 1."""
    limit = size.row_tokens
    assert limit is not None
    rows: list[Size] = []
    for count, (row, tokens, known) in enumerate(order.filling(limit, limit, start)):
        rows[row:] = [Size(tokens, known)]
        if size.exceeded(rows):
            return count
    return len(order.queries) - start


def _how_many_fit(instances: Sequence[Sequence[Query]], order: Sequence[int], size: PassSize) -> int:
    """How many instances fit into a pass, in this order; at least 1. Found by trying, since the queries of several
    instances stand in the rows mixed, and share more together than each instance by itself."""
    limit = size.row_tokens
    assert limit is not None

    def first(count: int) -> tuple[list[int], Order]:
        """The queries of so many instances, and the place of the instance that each belongs to."""
        pairs = [(place, query) for place, i in enumerate(order[:count]) for query in instances[i]]
        pairs.sort(key=lambda pair: pair[1].tokens)
        return [place for place, _ in pairs], Order([query for _, query in pairs])

    def fit(some: Order) -> bool:
        return not size.exceeded(some.sizes(limit, limit))

    low, high = 1, min(2, len(order))  # so many fit, unless even 1 does not
    places, several = first(high)
    while fit(several):
        if high == len(order):
            return high
        low, high = high, min(2 * high, len(order))
        places, several = first(high)
    while high - low > 1:  # so many do not
        middle = (low + high) // 2
        fewer = several.some([i for i, place in enumerate(places) if place < middle])
        low, high = (middle, high) if fit(fewer) else (low, middle)
    return low


def pack(queries: Sequence[Query], row_tokens: int | None) -> PackedBatch:
    """Pack queries into rows of at most `row_tokens` positions (more only for a single longer query), or, if that is
    None, of one query each.

    Pseudo tokens are negative: -1-k stands for row k of the prompt matrix. The order of the queries is kept in
    `target_of_query`. An empty list gives a batch of one padding token and no targets, which a rank without work uses
    to take part in a collective pass.
    """
    assert row_tokens is not None or not any(query.cuts for query in queries)
    numbers = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
    order = Order([queries[i] for i in numbers])
    limit = width = row_tokens or 0
    sizes = order.sizes(limit, limit)
    if len(sizes) > 1 and row_tokens is not None:
        # Even rows: with as many rows as needed, the smallest width that holds everything leaves the least padding.
        low, width = max(len(q.tokens) - end_of(q.cuts) for q in queries), max(size.tokens for size in sizes)
        while low < width:
            middle = (low + width) // 2
            narrower = order.sizes(middle, limit)
            if len(narrower) <= len(sizes):
                sizes, width = narrower, middle
            else:
                low = middle + 1
    rows = order.rows(numbers, width, limit) or [Row()]

    width, known = max(1, *(len(row.tokens) for row in rows)), max(row.known for row in rows)
    position_ids, visible_from, visible_until = [], [], []
    tokens: list[int] = []  # of all rows
    targets: dict[int, int] = {}
    targets_of: list[list[int]] = [[]] * len(queries)
    for r, row in enumerate(rows):
        padding = [0] * (width - len(row.tokens))
        tokens += row.tokens + padding
        position_ids.append(row.depths + padding)
        since, until = row.keys(known, width)
        visible_from.append(since)
        visible_until.append(until)
        for query, positions in row.ends:
            targets_of[query] = [targets.setdefault(r * width + position, len(targets)) for position in positions]
    pseudo_positions = [i for i, token in enumerate(tokens) if token < 0]
    return PackedBatch(
        one_by_one=row_tokens is None,
        trunks=tuple(tuple(row.trunks) for row in rows),
        token_ids=torch.tensor(tokens).clamp(min=0).view(len(rows), width),
        position_ids=torch.tensor(position_ids),
        visible_from=torch.tensor(visible_from),
        visible_until=torch.tensor(visible_until),
        pseudo_positions=torch.tensor(pseudo_positions, dtype=torch.int64),
        pseudo_indices=torch.tensor([-1 - tokens[i] for i in pseudo_positions], dtype=torch.int64),
        targets=torch.tensor(list(targets), dtype=torch.int64),
        target_of_query=torch.tensor([target for each in targets_of for target in each], dtype=torch.int64),
    )
