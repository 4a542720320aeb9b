"""The processes of a run, and the few things that they tell each other."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megaprompt.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of a run, or some of them. Alone by default."""

    rank: int = 0  # among these processes
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None  # None: all processes
    sent: Counter[str] = field(default_factory=Counter)  # bytes that this process handed over, by what they are

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def split(self, groups: int) -> World:
        """The part of this world that this process is in, after dividing it into groups of neighbours.

        Raises:
            UsageError: the size is no multiple of the number of groups.
        """
        if self.size % groups:
            raise UsageError(f"--relation-groups {groups}: does not divide the {self.size} ranks; give a divisor")
        if groups == 1:
            return self
        size = self.size // groups
        members = [list(range(start, start + size)) for start in range(0, self.size, size)]
        made = [dist.new_group(ranks) for ranks in members]  # collective: every rank makes every group
        return World(self.rank % size, size, self.device, made[self.rank // size], self.sent)

    def sum_(self, tensor: Tensor, what: str = "other") -> Tensor:
        """Replace `tensor` by its sum over the ranks; all must call it. `what` is for the account of bytes sent."""
        return self._replaced(tensor, what, lambda moved: dist.all_reduce(moved, dist.ReduceOp.SUM, self.group))

    def max_(self, tensor: Tensor, what: str = "other") -> Tensor:
        """Replace `tensor` by its elementwise maximum over the ranks; all must call it."""
        return self._replaced(tensor, what, lambda moved: dist.all_reduce(moved, dist.ReduceOp.MAX, self.group))

    def same_(self, tensor: Tensor, what: str = "other") -> Tensor:
        """Replace `tensor` by that of the first rank; all must call it."""
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        return self._replaced(tensor, what, lambda moved: dist.broadcast(moved, first, self.group))

    def _replaced(self, tensor: Tensor, what: str, collective: Callable[[Tensor], object]) -> Tensor:
        if self.size > 1:
            moved = tensor.to(self.device)
            collective(moved)
            if moved is not tensor:
                tensor.copy_(moved)
            self.sent[what] += tensor.nbytes
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Any picklable value from every rank, in rank order; all must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def memory(self) -> int:
        """Bytes that there are for each process: of its GPU, or its share of what a job may use of this machine. All
        must call it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return self._host_memory()

    def _host_memory(self) -> int:
        limits = [psutil.virtual_memory().total]
        if megabytes := os.environ.get("SLURM_MEM_PER_NODE"):
            limits.append(int(megabytes) << 20)
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
        return min(limits) // (ranks_on_this_machine() if self.size > 1 else 1)

    def free_memory(self) -> int:
        """Bytes that are free for the process that has the least. All must call it."""
        if self.device.type == "cuda":
            return min(self.gather(torch.cuda.mem_get_info(self.device)[0]))
        return self.free_host_memory()

    def free_host_memory(self) -> int:
        """Bytes of its machine's memory that are free for the process that has the least. All must call it."""
        available = psutil.virtual_memory().available // (ranks_on_this_machine() if self.size > 1 else 1)
        return min(self.gather(min(available, self._host_memory())))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(self.group)


def ranks_on_this_machine() -> int:
    """How many ranks of the process group run here; all must call it.

    They ask each other, since not every launcher tells: srun sets no LOCAL_WORLD_SIZE.
    """
    here = socket.gethostname()
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, here)
    return names.count(here)
