"""Who computes what, when.

The world is relation groups x replicas. A group owns some of the relations, with their prompt encoders; its replicas
share the facts of each batch. All ranks together hold one sharded backbone, and a pass of it is collective: each layer
is gathered from all of them. So all ranks must make the same number of passes, and one that has less to compute takes
part with empty passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaprompt.distributed.world import World
from megaprompt.prompting.packing import PassSize, split_into_passes
from megaprompt.prompting.query import Query


def my_passes(
    instances: Sequence[Sequence[Query]], world: World, size: PassSize, numbers: Sequence[int] | None = None
) -> list[list[int]]:
    """The indices of the instances, given by their queries, that this rank of `world` computes, pass by pass.

    Args:
        numbers: of the instances; those with the same number are computed by the same rank. If not given, each has its
            own.
    """
    share = [i for i, number in enumerate(numbers or range(len(instances))) if number % world.size == world.rank]
    return [[share[i] for i in indices] for indices in split_into_passes([instances[i] for i in share], size)]


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
