"""Which launcher started this process and the others, and joining them.

What started the processes is found out from the environment: torchrun, the deepspeed launcher (both set RANK and the
rest), mpirun, a Slurm step (srun), or nothing. While joined, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT are set in each case, which is what PyTorch and DeepSpeed read.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megaprompt.distributed.world import World
from megaprompt.errors import MegapromptError, UsageError, first_line

_TIMEOUT = timedelta(minutes=10)
"""For the ranks to find each other, and for each to do its part of a collective. Death is noticed at once."""


# ------------------------------------------------------------------------------------------------- what started us


class Launch(NamedTuple):
    """The place of this process among those that were started together."""

    rank: int
    size: int
    local_rank: int  # among those on this machine
    address: str  # where rank 0 listens
    port: int


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """What the launcher says in the environment; a launch of one process if there is none.

    Raises:
        UsageError: variables are missing or contradict each other; the message names them.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _explicit(environ)
    if "MPI_LOCALNRANKS" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        # Before Slurm: in a job, mpirun starts its helpers with srun, and we inherit their variables.
        return _mpi(environ)
    # A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS as well, but is no task: only a step has an id.
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _slurm(environ)
    return Launch(0, 1, 0, *_address(environ, "127.0.0.1", _free_port()))


def _explicit(environ: Mapping[str, str]) -> Launch:
    """torchrun, the deepspeed launcher, or a user who sets the variables."""
    hint = "start with torchrun or srun, or set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
    rank, size = (_number(environ, name, hint) for name in ("RANK", "WORLD_SIZE"))
    _check_rank("RANK", rank, "WORLD_SIZE", size)
    if size == 1:
        return Launch(rank, size, 0, *_address(environ, "127.0.0.1", _free_port()))
    local_rank = _number(environ, "LOCAL_RANK", hint)
    # Under `srun torchrun`, Slurm's variables are those of torchrun. A task of a step is told otherwise by its own.
    if "TORCHELASTIC_RUN_ID" not in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        for name, value, slurm in (("RANK", rank, "SLURM_PROCID"), ("WORLD_SIZE", size, "SLURM_STEP_NUM_TASKS")):
            if environ.get(slurm, str(value)) != str(value):
                raise UsageError(
                    f"environment variable {name} is {value}, but {slurm} is {environ[slurm]}; unset {name}"
                )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise UsageError(f"environment variable {name} is not set, but WORLD_SIZE is {size}; {hint}")
    return Launch(rank, size, local_rank, environ["MASTER_ADDR"], _number(environ, "MASTER_PORT", hint))


def _mpi(environ: Mapping[str, str]) -> Launch:
    """mpirun. MPI only tells the ranks who they are and where rank 0 listens."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise UsageError(f"mpirun needs mpi4py ({error}): pip install mpi4py, and mpich if there is no MPI") from error
    world = MPI.COMM_WORLD
    name = "OMPI_COMM_WORLD_SIZE" if "OMPI_COMM_WORLD_SIZE" in environ else "PMI_SIZE"
    started = environ.get(name, str(world.size))
    if started != str(world.size):
        raise UsageError(
            f"environment variable {name} is {started}, but mpi4py sees {world.size} process(es): it belongs to "
            f"another MPI than this mpirun; use the mpirun of the MPI that mpi4py was made for"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = _address(environ, socket.gethostname() if local.size < world.size else "127.0.0.1", _free_port())
    return Launch(world.rank, world.size, local.rank, *world.bcast(address))


def _slurm(environ: Mapping[str, str]) -> Launch:
    """A task of a Slurm step. Rank 0 is on the first node of the step."""
    hint = "start with srun in a job, and do not set Slurm's variables yourself"
    rank, size, local_rank, job, step = (
        _number(environ, name, hint)
        for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", str(size))
    if tasks != str(size):
        raise UsageError(f"environment variable SLURM_NTASKS is {size}, but SLURM_STEP_NUM_TASKS is {tasks}; {hint}")
    _check_rank("SLURM_PROCID", rank, "SLURM_NTASKS", size)
    host = "127.0.0.1"
    if size > 1 and "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        try:
            found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            host = found.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise UsageError(
                f"`scontrol show hostnames {nodes}` does not tell the first node ({error}); set MASTER_ADDR to it "
                f"(in a container without scontrol, for example)"
            ) from error
    # The same on all ranks, below the ports that the system gives out, and another one for other jobs and steps.
    return Launch(rank, size, local_rank, *_address(environ, host, 20000 + (97 * job + step) % 12000))


def _address(environ: Mapping[str, str], host: str, port: int) -> tuple[str, int]:
    """What the user has set, else what we found."""
    given = _number(environ, "MASTER_PORT", "give a free port") if "MASTER_PORT" in environ else port
    return environ.get("MASTER_ADDR", host), given


def _number(environ: Mapping[str, str], name: str, hint: str) -> int:
    text = environ.get(name)
    if text is None:
        raise UsageError(f"environment variable {name} is not set, but others of the launcher are; {hint}")
    if not text.isdecimal():
        raise UsageError(f"environment variable {name} is {text!r}, not a number; {hint}")
    return int(text)


def _check_rank(name: str, rank: int, of: str, size: int) -> None:
    if rank >= size:
        raise UsageError(f"environment variable {name} is {rank}, but {of} is {size}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# -------------------------------------------------------------------------------------------------------------- joining


def _join(force: bool) -> World:
    launch = find_launch()
    device = torch.device("cpu")
    local_rank = launch.local_rank
    if cuda := torch.cuda.is_available():
        visible = torch.cuda.device_count()
        if launch.size == 1:
            local_rank = torch.cuda.current_device()
        elif visible == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # Slurm bound one GPU to each task (--gpus-per-task), which is GPU 0 to each
        if local_rank >= visible:
            raise UsageError(f"local rank {local_rank} (LOCAL_RANK) has no GPU: there are {visible}; start fewer ranks")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # PyTorch lets LSTMs multiply float32 with 10 bits of mantissa
    if launch.size > 1 or force:
        values = (launch.rank, launch.size, local_rank, launch.address, launch.port)
        os.environ.update(zip(_VARIABLES, map(str, values), strict=True))
        try:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            raise MegapromptError(
                f"rank {launch.rank} of {launch.size} finds no connection to the others through {launch.address}:"
                f"{launch.port} ({first_line(error)}); did all of them start? If so, set MASTER_ADDR"
            ) from error
    return World(launch.rank, launch.size, device)


@contextmanager
def joined_world(force: bool = False) -> Iterator[World]:
    """Join the processes that were started together, for a block; alone if this one was started alone.

    Args:
        force: make a process group even for a single process, which DeepSpeed needs.

    Raises:
        UsageError: the environment's variables are incomplete or contradict each other.
        MegapromptError: the processes cannot find each other, or another one has died or does not answer any more.
    """
    environment = {name: os.environ.get(name) for name in _VARIABLES}
    world = World()
    try:
        world = _join(force)
        yield world
    except RuntimeError as error:
        if world.size == 1 or not any(sign in str(error) for sign in _LOST):
            raise
        raise MegapromptError(
            f"rank {world.rank} of {world.size} has lost another rank, which has died or hangs; look for its own last "
            f"words, then continue with --resume ({first_line(error)})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in environment.items():  # a process that we start later is not one of these ranks
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What PyTorch and DeepSpeed read."""

_LOST = (
    "closed by peer",
    "reset by peer",
    "Timed out",
    "timed out",
    "timeout",
    "Broken pipe",
    "remote process exited",
    "NCCL",
)
"""In the messages of gloo and NCCL when another rank does not take part any more."""
