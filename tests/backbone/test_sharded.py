"""The check of swap space, with real ranks that no launcher has told how many of them are on this machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaprompt.backbone.sharded import _check_swap_space
from megaprompt.errors import UsageError

ROOT = Path(__file__).parents[2]

CHECK = """
import shutil, sys
from transformers import GPT2Config, GPT2LMHeadModel
from megaprompt.backbone import sharded
from megaprompt.distributed.launch import joined_world
from megaprompt.errors import MegapromptError

model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=1000, n_positions=16))
size = sum(p.numel() * p.element_size() for p in model.parameters())
offload = {"device": "nvme", "nvme_path": sys.argv[1], "buffer_size": 100_000}
with joined_world() as world:
    for free in (size - 8, size):  # the ranks of a machine share its disk, which takes a partition from each
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, free)
        try:
            sharded._check_swap_space(model, {"zero_optimization": {"offload_param": offload}})
            answer = "enough"
        except MegapromptError as error:
            answer = str(error)
        sys.stdout.write(f"rank {world.rank}, {size - free} too few: {answer}\\n")
"""


@pytest.mark.slow
def test_swap_space_is_for_all_ranks_of_a_machine(tmp_path):
    """Set as srun sets them: LOCAL_WORLD_SIZE is missing."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHECK, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    for rank, output in enumerate(outputs):
        assert re.search(rf"rank {rank}, 8 too few: NVMe offload needs .* change nvme_path", output), output
        assert f"rank {rank}, 0 too few: enough" in output


def test_swap_buffers_must_hold_a_partition(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    model = torch.nn.Linear(100, 11, bias=False)
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_size": 549}
    with pytest.raises(UsageError, match=r"set offload_param\.buffer_size to at least 550"):
        _check_swap_space(model, {"zero_optimization": {"offload_param": offload}})
