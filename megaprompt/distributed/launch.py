"""Who this process is among the processes of a run, and the few things that they tell each other."""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

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
        return self._reduce(tensor, dist.ReduceOp.SUM, what)

    def max_(self, tensor: Tensor, what: str = "other") -> Tensor:
        """Replace `tensor` by its elementwise maximum over the ranks; all must call it."""
        return self._reduce(tensor, dist.ReduceOp.MAX, what)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.size > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved, operation, group=self.group)
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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(self.group)


def join_world(force: bool = False) -> World:
    """Join the processes that torchrun (or anything that sets the same variables) started; alone without them.

    Args:
        force: make a process group even for a single process, which DeepSpeed needs.

    Raises:
        UsageError: the variables are incomplete or contradict each other.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if force:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("nccl" if cuda else "gloo")
        return World(device=device)
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise UsageError(f"environment variable {name} is {text!r}; start with torchrun, or set it")
        values[name] = int(text)
    rank, size = values["RANK"], values["WORLD_SIZE"]
    if rank >= size:
        raise UsageError(f"environment variable RANK is {rank}, but WORLD_SIZE is {size}")
    device = torch.device("cuda", values["LOCAL_RANK"]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 or force:
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank, size, device)


def leave_world() -> None:
    """Close the connections to the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
