"""Who computes what, when: every rank works this out for itself, and all come to the same answer.

With a sharded backbone a pass is collective: each layer is gathered from all ranks. So all ranks must make the same
number of passes, and one that has nothing left to compute takes part with an empty pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from megaprompt.distributed.launch import World
from megaprompt.packing import PassSize, split_into_passes
from megaprompt.template import Query


def my_passes(queries: Sequence[Query], world: World, size: PassSize) -> list[list[int]]:
    """The indices of the queries that this rank computes, pass by pass; as many passes as on every other rank."""
    shares = [range(rank, len(queries), world.size) for rank in range(world.size)]
    plans = [split_into_passes([queries[i] for i in share], size) for share in shares]
    mine = [[shares[world.rank][i] for i in indices] for indices in plans[world.rank]]
    return mine + [[]] * (max(map(len, plans)) - len(mine))
