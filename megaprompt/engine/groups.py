"""Groups of instances that begin alike, in all rounds of one call: who computes them, and what is kept of them.

The first round of a search computes what stands before the answers. Later rounds go on from there, so its keys and
values are kept, as trunks (see `trunks`), within a budget; what has no room is computed again in each round.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from megaprompt.engine.schedule import shares
from megaprompt.engine.trunks import Trunks
from megaprompt.prompting.query import Query
from megaprompt.prompting.trunks import Trunk
from megaprompt.tasks.task import Instance


@dataclass
class Groups:
    """What one rank knows of the groups of one call.

    Args:
        trunks: where keys and values are.
        budget: of how many tokens they may be kept; if 0, nothing is.
    """

    trunks: Trunks
    budget: int
    _ranks: dict[Hashable, int] = field(default_factory=dict)
    _kept: dict[Hashable, Trunk] = field(default_factory=dict)
    _closed: bool = False

    def ranks(self, names: Sequence[Hashable], instances: Sequence[Instance], ranks: int) -> list[int]:
        """Which of so many ranks computes each instance, given the names of their groups: in all rounds the same one
        for a group."""
        new: dict[Hashable, list[Query]] = {}
        for name, instance in zip(names, instances, strict=True):
            if name not in self._ranks:
                new.setdefault(name, []).extend(instance.queries)
        self._ranks |= zip(new, shares(list(new.values()), ranks), strict=True)
        return [self._ranks[name] for name in names]

    def to_keep(self, asked: Mapping[int, tuple[Hashable, Instance]]) -> dict[int, Trunk] | None:
        """Which trunks the first round is to keep, by the index of an instance that ends them; None in later rounds.

        Args:
            asked: group and instance by index.
        """
        if not self.budget or self._closed:
            return None
        self._closed = True
        wanted: dict[int, Trunk] = {}
        left = self.budget
        for i, (name, instance) in asked.items():
            query = instance.queries[0]
            trunk = Trunk(query.tokens[: query.targets[0] + 1], query.cuts)
            if name not in self._kept and not query.bidirectional and trunk.length <= left:
                self._kept[name] = wanted[i] = trunk
                left -= trunk.length
        return wanted

    def going_on(self, name: Hashable, instance: Instance) -> Instance:
        """The same instance, with its query cut behind what was kept of its group."""
        trunk = self._kept.get(name)
        if trunk is None:
            return instance
        [query] = instance.queries
        if query.tokens[: len(trunk.tokens)] != trunk.tokens or query.targets[0] < len(trunk.tokens):
            return instance
        return instance._replace(queries=(query._replace(cuts=(*trunk.cuts, len(trunk.tokens))),))

    def forget(self) -> None:
        """Let go of what was kept."""
        self.trunks.forget(self._kept.values())


def first_targets(order: Mapping[int, Instance], keep: Mapping[int, Trunk]) -> dict[Trunk, int]:
    """Where, among the targets of all queries of a pass, trunks end that are to be kept.

    Args:
        order: the instances of the pass in their order, by index.
        keep: trunks by the index of the instance at whose first target they end.
    """
    found, start = {}, 0
    for i, instance in order.items():
        if i in keep:
            found[keep[i]] = start
        start += sum(len(query.targets) for query in instance.queries)
    return found
