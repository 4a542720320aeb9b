"""Every launcher, with two real processes; what happens when one of them is lost; and environments that contradict."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from megaprompt.distributed.launch import Launch, find_launch, joined_world
from megaprompt.errors import UsageError

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
HELLO = """
import os, sys, torch
from megaprompt.distributed.launch import joined_world
with joined_world() as world:
    total = world.sum_(torch.tensor([10.0 ** world.rank])).item()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert world.size == 1 or all(os.environ.get(name) for name in names)
    # One write, so that the lines of several processes do not mix.
    sys.stdout.write(f"hello {sys.argv[1]} {world.rank}/{world.size} sum {total:.0f}\\n")
"""
BOTH = ["hello x 0/2 sum 11", "hello x 1/2 sum 11"]

ALONE = {"PATH": "/bin"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0", "MASTER_ADDR": "node1",
}  # fmt: skip
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "12345"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (ALONE, (0, 1, 0)),
        (TORCHRUN, (1, 2, 1)),
        (SLURM, (1, 2, 0)),
        # A batch script: the job has two tasks, but this process is none of them.
        (without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), (0, 1, 0)),
        # torchrun, once per node, in a Slurm step.
        ({**SLURM, **TORCHRUN, "RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "7"}, (3, 4, 1)),
        # Set by hand from Slurm's.
        ({**SLURM, **TORCHRUN, "LOCAL_RANK": "0"}, (1, 2, 0)),
    ],
)
def test_place_in_the_world(environ, expected):
    assert find_launch(environ)[:3] == expected


@pytest.mark.parametrize("wrong", [False, True])
def test_a_world_that_was_left_leaves_no_trace(monkeypatch, wrong):
    """Else every process started afterwards would take itself for the only rank."""
    if wrong:
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: 1 / 0)
    before = dict(os.environ)
    for _ in range(2):
        with suppress(ZeroDivisionError), joined_world(force=True) as world:
            assert (os.environ["WORLD_SIZE"], world.size, dist.is_initialized()) == ("1", 1, not wrong)
        assert dict(os.environ) == before
        assert not dist.is_initialized()


def test_address_of_a_slurm_step():
    launch = find_launch(SLURM)
    assert launch == Launch(1, 2, 0, "node1", 20000 + 97 * 7 + 2)
    others = {find_launch({**SLURM, "SLURM_JOB_ID": str(job)}).port for job in range(1000)}
    assert len(others) == 1000
    assert min(others) >= 20000
    assert max(others) < 32768
    assert find_launch({**SLURM, "MASTER_PORT": "1234"}).port == 1234


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set"]),
        ({"RANK": "two", "WORLD_SIZE": "2"}, ["RANK", "'two'"]),
        ({**TORCHRUN, "RANK": "2"}, ["RANK is 2", "WORLD_SIZE is 2"]),
        (without(TORCHRUN, "LOCAL_RANK"), ["LOCAL_RANK is not set"]),
        (without(TORCHRUN, "MASTER_PORT"), ["MASTER_PORT is not set"]),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ["MASTER_PORT", "'http'"]),
        ({**SLURM, **TORCHRUN, "RANK": "0"}, ["RANK is 0", "SLURM_PROCID is 1"]),
        ({**SLURM, **TORCHRUN, "WORLD_SIZE": "4"}, ["WORLD_SIZE is 4", "SLURM_STEP_NUM_TASKS is 2"]),
        (without(SLURM, "SLURM_NTASKS"), ["SLURM_NTASKS is not set"]),
        ({**SLURM, "SLURM_NTASKS": "8"}, ["SLURM_NTASKS is 8", "SLURM_STEP_NUM_TASKS is 2"]),
        ({**SLURM, "SLURM_PROCID": "5"}, ["SLURM_PROCID is 5", "SLURM_NTASKS is 2"]),
        ({**without(SLURM, "MASTER_ADDR"), "SLURM_STEP_NODELIST": "]"}, ["scontrol", "MASTER_ADDR"]),
        ({**SLURM, "MASTER_PORT": "-1"}, ["MASTER_PORT"]),
    ],
)
def test_contradictions_are_named(environ, named):
    with pytest.raises(UsageError) as error:
        find_launch(environ)
    assert all(name in str(error.value) for name in named), error.value


# --------------------------------------------------------------------------------------------------- for real, 2 ranks


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def hello(tmp_path, *launcher: object, **more: str) -> tuple[list[str], str]:
    script = tmp_path / "hello.py"
    script.write_text(HELLO)
    finished = subprocess.run(
        [*map(str, launcher), str(script), "x"], capture_output=True, text=True, timeout=200, env=environment(**more),
        check=False,
    )  # fmt: skip
    lines = finished.stdout.splitlines()
    return sorted(line for line in lines if line.startswith("hello")), finished.stdout + finished.stderr


@pytest.mark.slow
def test_alone(tmp_path):
    found, output = hello(tmp_path, sys.executable)
    assert found == ["hello x 0/1 sum 1"], output


@pytest.mark.slow
def test_torchrun(tmp_path):
    found, output = hello(tmp_path, BIN / "torchrun", "--standalone", "--nproc-per-node", 2)
    assert found == BOTH, output


@pytest.mark.slow
def test_mpirun(tmp_path):
    found, output = hello(tmp_path, BIN / "mpirun", "-n", 2, sys.executable)
    assert found == BOTH, output


@pytest.mark.slow
def test_mpirun_of_another_mpi_is_found_out(tmp_path):
    # Processes that say that they are two, each of which is alone in the eyes of mpi4py's own MPI.
    found, output = hello(tmp_path, sys.executable, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    assert not found
    assert "OMPI_COMM_WORLD_SIZE is 2, but mpi4py sees 1" in output


@pytest.mark.slow
def test_deepspeed_launcher(tmp_path, backbone_directory, data_directory):
    # The whole command, since this launcher adds an argument of its own to it.
    options = ("--backbone", backbone_directory, "--data", data_directory, "--max-epochs", 1, "--out", tmp_path / "run")
    finished = subprocess.run(
        [*map(str, (BIN / "deepspeed", "--num_gpus", 2, "--module", "megaprompt", "probe", *options))],
        capture_output=True, text=True, timeout=200, check=False,
        env=environment(PATH=f"{BIN}:{os.environ['PATH']}"),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert '"world_size": 2' in (tmp_path / "run" / "results.json").read_text()


LOST = """
import os, signal, sys, time, torch
from datetime import timedelta
import megaprompt.distributed.launch as launch
from megaprompt.errors import MegapromptError
launch._TIMEOUT = timedelta(seconds=10)
try:
    with launch.joined_world() as world:
        world.barrier()
        if world.rank == 1:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        world.sum_(torch.ones(1))
except MegapromptError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seconds"), [("SIGKILL", 5), ("SIGSTOP", 20)])
def test_a_lost_rank_is_noticed(tmp_path, how, seconds):
    """Without a launcher that would end the other rank."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOST, how], env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, status = os.waitpid(ranks[1].pid, os.WUNTRACED)  # until it has ended or stopped
        assert os.WIFSIGNALED(status) or os.WIFSTOPPED(status)
        start = time.monotonic()
        _, stderr = ranks[0].communicate(timeout=100)
        assert time.monotonic() - start < seconds
        assert ranks[0].returncode == 1
        assert "rank 0 of 2 has lost another rank" in stderr
        assert "--resume" in stderr
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
                rank.wait()
