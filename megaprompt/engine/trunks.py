"""Keys and values of trunks (see `prompting.trunks`): computed when needed first, and kept for as long as they are.

Each trunk is computed in a pass of its own, so its keys and values are the same to the last bit whenever, on whichever
rank and beside whatever else it is computed: a run that is continued gets those that it had.

Training asks the same questions in every epoch. Trunks of its data last as long as it does, as many as a budget allows;
questions without are computed whole in every pass. A call that asks once cuts its questions where many share a
beginning, and lets go of a trunk when its passes have no more use for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaprompt.backbone import Backbone
from megaprompt.backbone.known import KeysValues, Known
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.schedule import padded
from megaprompt.prompting.packing import PackedBatch, PassSize
from megaprompt.prompting.trunks import Trunk, cut, trunks_of
from megaprompt.tasks.task import Instance

SHARE = 16
"""Lasting trunks take at most one part in so many of the memory, unless told otherwise; plans leave more than that."""


def may_be_cut(backbone: Backbone, size: PassSize) -> bool:
    """Whether text can be computed in advance: by a frozen causal model that is exact with known keys and values, in
    packed rows."""
    frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
    return size.trunks and size.row_tokens is not None and backbone.causal and frozen


def cut_instances(
    instances: Sequence[Instance], *, row_tokens: int | None = None, budget: int | None = None
) -> list[Instance]:
    """Instances with their queries cut together; for the options see `prompting.trunks.cut`."""
    queries = [query for each in instances for query in each.queries]
    done = iter(cut(queries, row_tokens=row_tokens, budget=budget))
    return [each._replace(queries=tuple(next(done) for _ in each.queries)) for each in instances]


@dataclass
class Trunks:
    """What one rank knows of trunks.

    `counts` tells what was done: `tokens` that passes computed, with padding; `trunk_tokens`, computed beside them for
    trunks; `known_tokens`, those of trunks that a pass needed and that were known already.
    """

    lasting: set[Trunk] = field(default_factory=set)
    known: dict[Trunk, KeysValues] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def lasting_in(self, data: Sequence[TrainingSet], budget: int) -> list[TrainingSet]:
        """What is learned from, with its queries cut, and trunks that last.

        Args:
            budget: tokens that trunks may have.
        """
        done = iter(cut_instances([one for each in data for one in (*each.train, *each.dev)], budget=budget))
        found = [
            replace(each, train=[next(done) for _ in each.train], dev=[next(done) for _ in each.dev]) for each in data
        ]
        instances = (one for each in found for one in (*each.train, *each.dev))
        self.lasting.update(trunk for one in instances for query in one.queries for trunk in trunks_of(query))
        return found

    def keep(self, batch: PackedBatch, computed: Known, wanted: Mapping[Trunk, int]) -> None:
        """Keep what a pass has computed, until `forget`.

        Args:
            batch: the pass, on the CPU.
            computed: with the keys and values of its rows.
            wanted: trunks, each with the target at which it ends, as an index into `target_of_query`.
        """
        for trunk, number in wanted.items():
            row, position = divmod(int(batch.targets[batch.target_of_query[number]]), batch.token_ids.shape[1])
            seen = (batch.visible_from[row] <= position) & (position < batch.visible_until[row])
            own = seen[-batch.token_ids.shape[1] :].nonzero()[:, 0]  # it and the nodes before it, in their order
            self.known[trunk] = computed.of_row(row, own)
            self.lasting.add(trunk)

    def forget(self, trunks: Iterable[Trunk]) -> None:
        """Let go of what was kept."""
        for trunk in trunks:
            self.lasting.discard(trunk)
            self.known.pop(trunk, None)

    def of(self, batch: PackedBatch, backbone: Backbone, everyone: World, collect: bool = False) -> Known:
        """What stands in front of the rows of a batch; what is missing is computed. All ranks must call it.

        Args:
            everyone: the ranks that make the same number of passes.
            collect: the keys and values of the rows, too.
        """
        needed = dict.fromkeys(trunk for row in batch.trunks for trunk in row)  # each behind those before it
        missing = [trunk for trunk in needed if trunk not in self.known]
        for turn in padded([[i] for i in range(len(missing))], everyone):
            trunk = missing[turn[0]] if turn else None
            assert trunk is None or min(trunk.tokens) >= 0, "pseudo tokens are only in trunks that are kept"
            found = backbone.keys_and_values(trunk, self.known)
            if trunk is not None:
                self.known[trunk] = found
        self.counts["trunk_tokens"] += sum(trunk.length for trunk in missing)
        self.counts["known_tokens"] += sum(trunk.length for trunk in needed if trunk not in missing)
        rows = [[self.known[trunk] for trunk in row] for row in batch.trunks]
        for trunk in [trunk for trunk in self.known if trunk not in needed and trunk not in self.lasting]:
            del self.known[trunk]
        return Known(rows, collect)
