"""A configuration that `megaprompt plan --write-config` made: DeepSpeed takes it, and nothing comes out differently."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megaprompt.cli import main
from tests.conftest import run_cli
from tests.distributed.test_distributed import ROOT, assert_same_run, torchrun

pytestmark = pytest.mark.slow

WITH_LEAVES = """
import sys
from deepspeed.utils import get_z3_leaf_modules
from megaprompt.backbone import load
from megaprompt.cli import main
shard = load.shard

def checked(model, config):
    engine = shard(model, config)
    assert [type(leaf).__name__ for leaf in get_z3_leaf_modules(model)] == ["LlamaDecoderLayer"] * 2
    return engine

load.shard = checked
sys.exit(main(sys.argv[1:]))
"""


def test_layers_gathered_in_one_go_give_the_same(backbone_directory, data_directory, tmp_path):
    made = tmp_path / "made.json"
    assert main(["plan", str(backbone_directory), "--deepspeed", "zero3", "--write-config", str(made)]) == 0
    options = ("--backbone", backbone_directory, "--data", data_directory, "--methods", "manual,p-tuning,fine-tuning")
    options = (*options, "--learning-rate", "0.003", "--fine-tuning-rate", "0.0003", "--max-steps", "6")
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert run_cli("probe", *options, "--dtype", "float32", "--out", alone).returncode == 0
    (tmp_path / "main.py").write_text(WITH_LEAVES)
    command = (*torchrun(2), tmp_path / "main.py", "probe", *options, "--deepspeed", made, "--out", run)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert_same_run(alone, run)
    scores = [json.loads((Path(path) / "results.json").read_text())["methods"]["fine-tuning"] for path in (alone, run)]
    assert scores[0]["macro"]["mrr"] == pytest.approx(scores[1]["macro"]["mrr"], abs=1e-3)
