"""Who computes what, when.

The world is relation groups x replicas. A group owns some of the relations, with their prompt encoders; its replicas
share the facts of each batch. All ranks together hold one sharded backbone, and a pass of it is collective: each layer
is gathered from all of them. So all ranks must make the same number of passes, and one that has less to compute takes
part with empty passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from megaprompt.distributed.world import World
from megaprompt.prompting.packing import PassSize, split_into_passes
from megaprompt.prompting.query import Query, common


def my_passes(
    instances: Sequence[Sequence[Query]], world: World, size: PassSize, ranks: Sequence[int] | None = None
) -> list[list[int]]:
    """The indices of the instances, given by their queries, that this rank of `world` computes, pass by pass.

    Args:
        ranks: which rank computes each instance; as `shares` has it if not given.
    """
    ranks = shares(instances, world.size) if ranks is None else ranks
    share = [i for i, rank in enumerate(ranks) if rank == world.rank]
    return [[share[i] for i in indices] for indices in split_into_passes([instances[i] for i in share], size)]


def shares(units: Sequence[Sequence[Query]], ranks: int) -> list[int]:
    """Which rank computes each unit of queries, so that the busiest rank has as few tokens as possible.

    Ranks get neighbours in the order in which queries stand in rows: what they begin with alike, such as a relation's
    prompt, demonstrations, or a passage, is computed by few ranks, once by each. (Linear partitioning.)
    """
    if ranks == 1:
        return [0] * len(units)
    order = sorted(range(len(units)), key=lambda i: min((query.tokens for query in units[i]), default=()))
    alone, behind = [], []  # the tokens of each unit, as the first one of a rank and behind the one before it
    last: Query | None = None
    for i in order:
        queries = sorted(units[i], key=lambda query: query.tokens)
        more = sum(_added(query, before) for before, query in pairwise(queries))
        alone.append(more + (_added(queries[0], None) if queries else 0))
        behind.append(more + (_added(queries[0], last) if queries else 0))
        last = queries[-1] if queries else last

    def divided(limit: int) -> list[int]:
        """The rank of each unit in order, if a rank stops before it has more than so many tokens."""
        found: list[int] = []
        rank = load = 0
        for first, next_ in zip(alone, behind, strict=True):
            fits = not found or load + next_ <= limit
            rank, load = (rank, load + (next_ if found else first)) if fits else (rank + 1, first)
            found.append(rank)
        return found

    low, high = max(alone, default=0), sum(alone)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if divided(middle)[-1] < ranks else (middle + 1, high)
    of_unit = dict(zip(order, divided(low), strict=True))
    return [of_unit[i] for i in range(len(units))]


def _added(query: Query, before: Query | None) -> int:
    """How many tokens a query needs behind another one, if there is one."""
    same = 0 if before is None else common(query.tokens, before.tokens)
    if query.bidirectional and same < len(query.tokens):  # there, only whole queries are shared
        same = 0
    return len(query.tokens) - same


def padded(passes: list[list[int]], everyone: World) -> list[list[int]]:
    """The passes, followed by empty ones until there are as many as on the busiest rank; all ranks must call it."""
    count = int(everyone.max_(torch.tensor(len(passes)), "schedule"))
    return passes + [[]] * (count - len(passes))


def groups_for(items: int, ranks: int) -> int:
    """Into how many groups ranks are best divided to learn so many things: as many as leave none of them idle for long.

    The encoders of a group's relations are all that its ranks hold and share gradients of, so many groups save memory
    and traffic; a group that has more than a quarter above the average would be waited for.
    """
    divisors = (groups for groups in range(min(items, ranks), 0, -1) if ranks % groups == 0)
    return next(groups for groups in divisors if 4 * -(-items // groups) * groups <= 5 * items)


def waves_for(items: int, at_once: int) -> int:
    """In how many waves so many things are learned if a few fit into memory at once."""
    return -(-items // max(1, at_once))


def assign(weights: Sequence[int], groups: int) -> list[int]:
    """Which group each item goes to, so that the groups' sums of weights are close: heaviest first, to the lightest."""
    loads = [0] * groups
    group_of = [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        group_of[item] = loads.index(min(loads))
        loads[group_of[item]] += weights[item]
    return group_of
