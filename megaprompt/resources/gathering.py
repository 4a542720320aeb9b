"""Which parameters ZeRO-3 has gathered at once, from the order of the modules in a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megaprompt.resources.profile import Profile


@dataclass(frozen=True)
class Gathering:
    """What ZeRO-3 does with the parameters in a pass, in elements."""

    live: tuple[int, ...]  # gathered at once while each module runs, with the buffers of gathers that are under way
    total: int  # gathered in all
    persistent: int  # small ones that stay gathered

    def peak(self, profile: Profile, size: int) -> int:
        """Bytes that parameters of `size` bytes take when they and the activations together take most."""
        saved = (*profile.saved[1:], max(profile.saved))
        both = max(live * size + kept for live, kept in zip(self.live, (*saved, *reversed(saved)), strict=True))
        return both - max(profile.saved) + self.persistent * size


def gathering(profile: Profile, zero: Mapping[str, Any], ranks: int, gloo: bool) -> Gathering:
    """Follow DeepSpeed's coordinator of parameters through a pass, from the second pass on, when it knows their order.

    A module's parameters are gathered before it runs; then those that come next, up to the prefetch bucket; after it
    has run they are released, except those that are needed again within the reuse distance. (DeepSpeed 0.19,
    PartitionedParameterCoordinator and AllGatherCoalescedHandle.)

    Args:
        zero: the section `zero_optimization`.
        gloo: whether that is what gathers; it receives into a buffer of its own.
    """
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    persistent = {i for i, numel in enumerate(profile.numels) if numel <= threshold}
    leaves = profile.layer_class in zero.get("leaf_module", {}).get("classes", ())
    modules = _gathered_at_once(profile, leaves)
    order = (*modules, *reversed(modules))
    coordinator = _Coordinator(
        profile.numels,
        [[i for number in module for i in profile.trace[number] if i not in persistent] for module in order],
        bucket=zero.get("stage3_prefetch_bucket_size", 50_000_000),
        limit=zero.get("stage3_max_live_parameters", 1_000_000_000),
        reuse=zero.get("stage3_max_reuse_distance", 1_000_000_000),
        buffered=ranks > 1,
        gloo=gloo,
    )
    lives = tuple(live for step, module in enumerate(order) for live in [coordinator.run(step)] * len(module))
    return Gathering(lives, coordinator.total, sum(profile.numels[i] for i in persistent))


def _gathered_at_once(profile: Profile, leaves: bool) -> list[tuple[int, ...]]:
    """The numbers of the trace's modules whose parameters are gathered together: those of a layer, if it is a leaf."""
    numbers = range(len(profile.trace))
    if not leaves:
        return [(number,) for number in numbers]
    own = [(-1, number) if profile.layers[number] < 0 else (profile.layers[number], 0) for number in numbers]
    return [tuple(group) for _, group in groupby(numbers, key=lambda number: own[number])]


class _Coordinator:
    """The parameters of a model while a pass goes from module to module; sizes are in elements.

    Parameters gathered together share a buffer, from which each is copied; it lives until the last of them has been
    needed.
    """

    def __init__(
        self,
        numels: Sequence[int],
        modules: Sequence[Sequence[int]],  # the parameters of each, forward and back
        *,
        bucket: int,
        limit: int,
        reuse: int,
        buffered: bool,
        gloo: bool,
    ) -> None:
        self.numels, self.modules = numels, modules
        self.bucket, self.limit, self.reuse, self.buffered, self.gloo = bucket, limit, reuse, buffered, gloo
        self.total = self.peak = 0
        self._queue = [(i, step) for step, module in enumerate(modules) for i in module]  # in the order of their use
        self._at = 0  # of the queue
        self._last_fetched_for = dict.fromkeys(range(len(numels)), -1)
        self._available: set[int] = set()
        self._waiting: dict[int, list[int]] = {}  # parameter -> its gather, as the parameters still in it
        self._buffers: dict[int, int] = {}  # id of a gather -> elements of its buffer

    def run(self, step: int) -> int:
        """Let a module run; returns the most elements that were alive meanwhile."""
        self.peak = self._live()
        wanted = list(dict.fromkeys(self.modules[step]))
        if missing := [i for i in wanted if i not in self._available and i not in self._waiting]:
            self._gather(missing)
        for i in wanted:
            self._wait(i)
        self._prefetch(step)
        peak = max(self.peak, self._live())
        self._release(step)
        return peak

    def _size(self, parameters: Iterable[int]) -> int:
        return sum(self.numels[i] for i in parameters)

    def _live(self) -> int:
        return self._size(self._available) + sum(self._buffers.values())

    def _gather(self, wanted: list[int]) -> None:
        """Begin to gather parameters together."""
        group = list(wanted)
        self._waiting.update(dict.fromkeys(wanted, group))
        self.total += self._size(wanted)
        self._buffers[id(group)] = self._size(wanted) if self.buffered else 0
        self.peak = max(self.peak, self._live() + (self._buffers[id(group)] if self.gloo else 0))

    def _wait(self, i: int) -> None:
        """Wait for a parameter, if it is being gathered."""
        if (group := self._waiting.get(i)) is None:
            return
        if len(group) == 1 and self._buffers[id(group)] in (0, self.numels[i]):  # alone: the buffer is the parameter
            del self._buffers[id(group)], self._waiting[i]
            self._available.add(i)
            return
        # The first of a gather that is waited for copies all of them out of the buffer.
        self._available.update(j for j, other in self._waiting.items() if other is group)
        self.peak = max(self.peak, self._live())
        group.remove(i)
        del self._waiting[i]
        if not group:
            self._buffers.pop(id(group))

    def _prefetch(self, step: int) -> None:
        """Begin to gather what comes after this module, as far as the bucket and the limit allow."""
        while self._at < len(self._queue) and self._queue[self._at][1] <= step:
            self._fetched()
        prefetched: list[int] = []
        room = min(self.limit - self._size(self._available | set(self._waiting)), self.bucket)
        while self._at < len(self._queue) and self._size(prefetched) < room:
            i = self._fetched()
            if i not in self._available and i not in self._waiting and i not in prefetched:
                prefetched.append(i)
        if prefetched:
            self._gather(prefetched)

    def _fetched(self) -> int:
        """Take the next parameter from the queue."""
        i, used = self._queue[self._at]
        self._at += 1
        self._last_fetched_for[i] = max(self._last_fetched_for[i], used)
        return i

    def _release(self, step: int) -> None:
        """Let go of the module's parameters, except those that are needed again soon."""
        kept = {i for i in self.modules[step] if self._last_fetched_for[i] > step}
        distance = 0
        for later in self.modules[step + 1 :]:
            if distance >= self.reuse:
                break
            kept.update(later)
            distance += self._size(later)
        self._available -= set(self.modules[step]) - kept
