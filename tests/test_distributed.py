"""Two processes, real DeepSpeed ZeRO-3 on the CPU: the same prompts as one process, and the backbone is untouched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaprompt.run_directory import load_prompts
from tests.conftest import run_cli

pytestmark = pytest.mark.slow

ZERO3 = Path(__file__).parents[1] / "ds_configs" / "zero3.json"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = ("--learning-rate", "0.01", "--max-epochs", "4")


@pytest.fixture
def alone(backbone_directory, data_directory, tmp_path):
    options = ("--backbone", backbone_directory, "--data", data_directory, *OPTIONS)
    finished = run_cli("probe", *options, "--out", tmp_path / "alone")
    assert finished.returncode == 0, finished.stderr
    return options, tmp_path / "alone"


def assert_same_run(first: Path, second: Path) -> None:
    prompts, others = load_prompts(first), load_prompts(second)
    assert set(prompts) == set(others)
    for name, prompt in prompts.items():
        torch.testing.assert_close(prompt.vectors, others[name].vectors, rtol=2e-4, atol=2e-5)
        assert prompt.fingerprint == others[name].fingerprint
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    for name, row in results[0]["methods"]["p-tuning"]["relations"].items():
        assert results[1]["methods"]["p-tuning"]["relations"][name]["epochs"] == row["epochs"]
    assert results[0]["methods"]["manual"] == results[1]["methods"]["manual"]


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", ZERO3)], ids=["plain", "zero3"])
def test_same_prompts_on_any_number_of_ranks(alone, tmp_path, launcher, deepspeed):
    options, expected = alone
    finished = run_cli("probe", *options, *deepspeed, "--out", tmp_path / "many", launcher=launcher)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_run(expected, tmp_path / "many")
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    assert results["environment"]["world_size"] == (2 if launcher is TORCHRUN else 1)


FROZEN = """
import copy, json, sys, torch, deepspeed
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.launch import join_world, leave_world
from megaprompt.distributed.zero3 import read_deepspeed_config, shard
from megaprompt.training import Hooks, Recipe, Trainer
from tests.test_training import trainer_for, allowed

world = join_world(force=True)
backbone = load_backbone(sys.argv[1])
before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
engine = shard(backbone, read_deepspeed_config(Path(sys.argv[2])))
trainer = trainer_for(backbone, recipe=Recipe(0.01, 0.0, 1.0, batch_size=4, max_epochs=2, patience=9), world=world)
owned = {id(p) for l in trainer.learners for g in l.optimizer.param_groups for p in g["params"]}
trainer.train(allowed(backbone), Hooks())
assert engine.optimizer.__class__.__name__ == "DeepSpeedZeRoOffload", engine.optimizer
for name, p in backbone.named_parameters():
    assert hasattr(p, "ds_id") and not p.requires_grad and p.grad is None and id(p) not in owned, name
    with deepspeed.zero.GatheredParameters([p]):
        assert torch.equal(p, before[name]), name
gathered = [e.embedding.weight.detach().clone() for e in (l.encoder for l in trainer.learners)]
for weight in gathered:
    other = weight.clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(other, weight), "replicas of the encoder have drifted apart"
leave_world()
print(f"rank {world.rank} of {world.size} fine")
"""


def test_backbone_is_bit_identical_and_owns_nothing_under_zero3(backbone_directory, tmp_path):
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)
    root = Path(__file__).parents[1]
    finished = subprocess.run(
        [*TORCHRUN, script, backbone_directory, ZERO3],
        capture_output=True, text=True, timeout=300, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("fine") == 2
