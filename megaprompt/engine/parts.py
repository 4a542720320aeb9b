"""A pass before it is computed: its queries packed, and which of its outputs belong to which questions.

Nothing here waits for the device, so the next pass is made while a GPU is still at the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaprompt.backbone import Backbone
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PackedBatch, moved, pack
from megaprompt.prompting.query import Query
from megaprompt.tasks.objective import Objective, Outputs
from megaprompt.tasks.task import Instance


class Asked(NamedTuple):
    """An instance, and how its answer is scored."""

    instance: Instance
    objective: Objective
    head: nn.Module | None


class Part(NamedTuple):
    """The questions of one objective and head in a pass."""

    indices: list[int]  # among all that are asked
    objective: Objective
    head: nn.Module | None
    outputs: Callable[[Tensor], Outputs]  # of the questions, given the values [N, D] at the targets of the pass
    gold: Tensor  # [questions] int64


class PackedPass(NamedTuple):
    """What one pass computes, on the host and on the backbone's device, and its parts."""

    on_host: PackedBatch
    batch: PackedBatch
    parts: list[Part]

    @classmethod
    def of(
        cls, backbone: Backbone, asked: Sequence[Asked], indices: Iterable[int], row_tokens: int | None
    ) -> PackedPass:
        """Some of what is asked as one pass.

        Raises:
            UsageError: a query is longer than the backbone allows.
        """
        kinds: dict[tuple[int, int], list[int]] = {}
        for i in indices:
            kinds.setdefault((id(asked[i].objective), id(asked[i].head)), []).append(i)
        queries = [query for part in kinds.values() for i in part for query in asked[i].instance.queries]
        _must_fit(backbone, queries)
        packed = pack(queries, row_tokens)
        batch = packed.to(backbone.device)
        counts = [sum(len(q.targets) for i in part for q in asked[i].instance.queries) for part in kinds.values()]
        targets = batch.target_of_query.split(counts)
        return cls(packed, batch, [_part(i, asked, t) for i, t in zip(kinds.values(), targets, strict=True)])


def _must_fit(backbone: Backbone, queries: Sequence[Query]) -> None:
    longest, most = max((len(query.tokens) for query in queries), default=0), backbone.max_positions
    if most is not None and longest > most:
        raise UsageError(
            f"backbone {backbone.name}: a text of {longest} tokens is longer than the {most} that it can be given; "
            "leave out what is long, or give another --backbone"
        )


def _part(indices: list[int], asked: Sequence[Asked], targets: Tensor) -> Part:
    queries = [(place, query) for place, i in enumerate(indices) for query in asked[i].instance.queries]

    def tensor(numbers: Iterable[int]) -> Tensor:
        return moved(torch.tensor(list(numbers), dtype=torch.int64), targets.device)

    outputs = partial(
        Outputs,
        value_of_target=targets,
        query_of_target=tensor(number for number, (_, query) in enumerate(queries) for _ in query.targets),
        labels=tensor(label for _, query in queries for label in query.labels or [0] * len(query.targets)),
        instance_of_query=tensor(place for place, _ in queries),
        candidate_of_query=tensor(
            candidate
            for i in indices
            for candidate in asked[i].instance.candidates or range(len(asked[i].instance.queries))
        ),
    )
    first = asked[indices[0]]
    return Part(indices, first.objective, first.head, outputs, tensor(asked[i].instance.gold for i in indices))
