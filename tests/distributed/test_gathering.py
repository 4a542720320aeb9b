"""Weights that are gathered in other ways: layer by layer, or within a node; nothing comes out differently."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megaprompt.cli import main
from tests.conftest import run_cli
from tests.distributed.test_distributed import ROOT, assert_same_run, torchrun

pytestmark = pytest.mark.slow

CHECKED = """
import sys
from deepspeed.utils import get_z3_leaf_modules
from megaprompt.backbone import load
from megaprompt.cli import main
shard = load.shard

def checked(model, config):
    engine = shard(model, config)
    assert {check}
    return engine

load.shard = checked
sys.exit(main(sys.argv[1:]))
"""
LEAVES = "[type(leaf).__name__ for leaf in get_z3_leaf_modules(model)] == ['LlamaDecoderLayer'] * 2"
SECOND_SHARES = "all(p.ds_secondary_tensor.numel() == 2 * p.ds_tensor.numel() for p in model.parameters())"


@pytest.fixture
def same_as_alone(backbone_directory, data_directory, tmp_path):
    """Compares a run on ranks with one on a single process: `same_as_alone(ranks, configuration, check, methods)`."""

    def same(ranks, configuration, check, methods):
        options = ("--backbone", backbone_directory, "--data", data_directory, "--methods", methods)
        options = (*options, "--learning-rate", "0.003", "--fine-tuning-rate", "0.0003", "--max-steps", "6")
        alone, run = tmp_path / "alone", tmp_path / "run"
        assert run_cli("probe", *options, "--dtype", "float32", "--out", alone).returncode == 0
        (tmp_path / "main.py").write_text(CHECKED.replace("{check}", check))
        command = (*torchrun(ranks), tmp_path / "main.py", "probe", *options, "--deepspeed", configuration)
        finished = subprocess.run(
            [*map(str, command), "--out", str(run)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert finished.returncode == 0, finished.stderr
        assert_same_run(alone, run)
        return [json.loads((Path(path) / "results.json").read_text())["methods"] for path in (alone, run)]

    return same


def test_layers_gathered_in_one_go_give_the_same(same_as_alone, backbone_directory, tmp_path):
    made = tmp_path / "made.json"
    assert main(["plan", str(backbone_directory), "--deepspeed", "zero3", "--write-config", str(made)]) == 0
    alone, run = same_as_alone(2, made, LEAVES, "manual,p-tuning,fine-tuning")
    mrr = [methods["fine-tuning"]["macro"]["mrr"] for methods in (alone, run)]
    assert mrr[0] == pytest.approx(mrr[1], abs=1e-3)


def test_weights_gathered_within_a_node_give_the_same(same_as_alone, tmp_path):
    made = tmp_path / "made.json"
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # as if four ranks were on two nodes
    made.write_text(json.dumps(settings))
    same_as_alone(4, made, SECOND_SHARES, "manual,p-tuning")
