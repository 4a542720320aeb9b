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
from megaprompt.prompting.rows import Row, end_of, fill_rows
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

    def exceeded(self, rows: Sequence[Row]) -> bool:
        """Whether some rows are more than a pass."""
        assert self.row_tokens is not None
        if len(rows) <= max(1, self.pass_tokens // self.row_tokens):
            return False
        known = max(row.known for row in rows)
        if not known:
            return True
        width = max(len(row.tokens) for row in rows)  # tails are often short: then more rows fit
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
    if all(len(queries) == 1 for queries in instances):  # which stand in the rows in this order
        filled: list[Row] = []
        for i in order:
            added = (instances[i], range(1), size.row_tokens, size.row_tokens)
            if not passes or size.exceeded(fill_rows(filled, *added)):
                passes.append([])
                filled = fill_rows([], *added)
            passes[-1].append(i)
        return passes
    start = 0
    while start < len(order):
        count = _how_many_fit(instances, order[start:], size)
        passes.append(order[start : start + count])
        start += count
    return passes


def _how_many_fit(instances: Sequence[Sequence[Query]], order: Sequence[int], size: PassSize) -> int:
    """How many instances fit into a pass, in this order; at least 1. Found by trying, since the queries of several
    instances stand in the rows mixed, and share more together than each instance by itself."""
    limit = size.row_tokens
    assert limit is not None

    def fit(count: int) -> bool:
        queries = sorted((query for i in order[:count] for query in instances[i]), key=lambda query: query.tokens)
        return not size.exceeded(fill_rows([], queries, range(len(queries)), limit, limit))

    low, high = 1, 2  # so many fit, unless even 1 does not; so many may not
    while high <= len(order) and fit(high):
        low, high = high, 2 * high
    high = min(high, len(order) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def pack(queries: Sequence[Query], row_tokens: int | None) -> PackedBatch:
    """Pack queries into rows of at most `row_tokens` positions (more only for a single longer query), or, if that is
    None, of one query each.

    Pseudo tokens are negative: -1-k stands for row k of the prompt matrix. The order of the queries is kept in
    `target_of_query`. An empty list gives a batch of one padding token and no targets, which a rank without work uses
    to take part in a collective pass.
    """
    assert row_tokens is not None or not any(query.cuts for query in queries)
    order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
    limit = row_tokens or 0
    rows = fill_rows([], queries, order, limit, limit) or [Row()]
    if len(rows) > 1 and row_tokens is not None:
        # Even rows: with as many rows as needed, the smallest width that holds everything leaves the least padding.
        low, high = max(len(q.tokens) - end_of(q.cuts) for q in queries), max(len(row.tokens) for row in rows)
        while low < high:
            middle = (low + high) // 2
            narrower = fill_rows([], queries, order, middle, limit)
            if len(narrower) <= len(rows):
                rows, high = narrower, middle
            else:
                low = middle + 1

    width, known = max(1, *(len(row.tokens) for row in rows)), max(row.known for row in rows)
    token_ids, position_ids, visible_from, visible_until = [], [], [], []
    pseudo_positions, pseudo_indices = [], []
    targets: dict[int, int] = {}
    targets_of: list[list[int]] = [[]] * len(queries)
    for r, row in enumerate(rows):
        padding = [0] * (width - len(row.tokens))
        token_ids.append([max(token, 0) for token in row.tokens] + padding)
        position_ids.append(row.depths + padding)
        since, until = row.keys(known, width)
        visible_from.append(since)
        visible_until.append(until)
        for position, token in enumerate(row.tokens):
            if token < 0:
                pseudo_positions.append(r * width + position)
                pseudo_indices.append(-1 - token)
        for query, positions in row.ends:
            targets_of[query] = [targets.setdefault(r * width + position, len(targets)) for position in positions]
    return PackedBatch(
        one_by_one=row_tokens is None,
        trunks=tuple(tuple(row.trunks) for row in rows),
        token_ids=torch.tensor(token_ids),
        position_ids=torch.tensor(position_ids),
        visible_from=torch.tensor(visible_from),
        visible_until=torch.tensor(visible_until),
        pseudo_positions=torch.tensor(pseudo_positions, dtype=torch.int64),
        pseudo_indices=torch.tensor(pseudo_indices, dtype=torch.int64),
        targets=torch.tensor(list(targets), dtype=torch.int64),
        target_of_query=torch.tensor([target for each in targets_of for target in each], dtype=torch.int64),
    )
