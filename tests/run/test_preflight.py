"""`megaprompt probe --check`: what it finds before anything is loaded."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaprompt.backbone import inspect_backbone
from megaprompt.cli import main
from megaprompt.config import PlanConfig
from megaprompt.resources.plan import USABLE, plan
from tests.conftest import write_facts


@pytest.fixture
def check(backbone_directory, data_directory, tmp_path, capsys):
    """Check a run on the small model; returns the exit code and what was printed."""

    def run(*args: object) -> tuple[int, str]:
        options = ("--backbone", backbone_directory, "--data", data_directory, "--out", tmp_path / "run")
        code = main(["probe", *map(str, (*options, *args)), "--check"])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_a_run_that_can_start(check, tmp_path):
    code, printed = check()
    assert code == 0
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", name] for name in ("versions", "options", "backbone", "data", "disk", "memory")
    ]
    assert "llama, 2 layers of 32" in printed
    assert "2 relation(s), 22 train" in printed
    assert not (tmp_path / "run").exists()


def test_it_is_said_where_sharding_is_not_needed(check):
    assert "whole copies of the backbone fit as well and are faster" in check("--deepspeed", "zero3")[1]
    assert "whole copies" not in check()[1]
    assert "whole copies" not in check("--deepspeed", "zero3", "--methods", "fine-tuning")[1]


def test_candidates_of_best_are_counted(check):
    found = [check("--methods", "best", "--candidates", n)[1] for n in (1, 1000)]
    needs = [float(re.search(r"p-tuning: a rank of 1 needs ([0-9.]+) GB", printed)[1]) for printed in found]
    checkpoints = [float(re.search(r"take up to ([0-9.]+) GB", printed)[1]) for printed in found]
    assert needs[0] < needs[1]
    assert checkpoints[0] < checkpoints[1]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--backbone", "nowhere/at-all"], 2, "WRONG backbone  --backbone nowhere/at-all"),
        (["--data", "nowhere"], 2, "WRONG data      --data nowhere"),
        (["--relations", "P36,P99"], 2, "--relations P99: not in data, which has P30, P36"),
        (["--vocab", "nowhere"], 2, "--vocab nowhere"),
        (["--template", "[X] <3>"], 2, "WRONG data"),
        (["--deepspeed", "setup.py"], 2, "--deepspeed setup.py:1: not valid JSON"),
        (["--out", "setup.py/run"], 1, "WRONG disk      --out setup.py/run: cannot write"),
        (["--out", "tests"], 2, "--out tests is not empty"),
        (["--resume"], 2, "holds no run"),
    ],
)
def test_what_is_wrong_is_named(check, monkeypatch, args, code, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    found, printed = check(*args)
    assert found == code
    assert message in printed
    assert printed.count("WRONG") == 1
    assert "1 of 6 checks failed; nothing was started" in printed


def test_everything_is_checked_even_after_a_failure(check):
    code, printed = check("--backbone", "nowhere/at-all", "--data", "nowhere", "--vocab", "none")
    assert code == 2
    assert printed.count("WRONG") == 2
    assert printed.count("\nok ") + printed.startswith("ok ") == 3


def test_a_damaged_fact_file(check, data_directory):
    path = data_directory / "trex" / "dev" / "P36.jsonl"
    path.write_text(path.read_text() + '{"sub_label": "Denmark"}\n')
    code, printed = check()
    assert code == 1
    assert "P36.jsonl:14:" in printed


def test_weights_that_are_cut_off_or_missing(check, backbone_directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(backbone_directory, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, printed = check("--backbone", copy)
    assert code == 2
    assert "model.safetensors is missing or cut off" in printed
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    assert "part-2.safetensors is missing" in check("--backbone", copy)[1]
    (copy / "model.safetensors.index.json").unlink()
    weights.unlink()
    assert "holds no weights" in check("--backbone", copy)[1]


def test_checkpoints_must_fit_on_the_disk(check, monkeypatch, data_directory, backbone_directory):
    def with_free(size: int, *options: object) -> tuple[int, str]:
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, size))
        return check("--encoder", "none", *options)

    # 2 relations x 6 vectors of 32 numbers, with two averages of Adam, in float32, three times.
    needed = 2 * 6 * 32 * 3 * 4 * 3
    assert with_free(needed)[0] == 0
    code, printed = with_free(needed - 1)
    assert code == 1
    assert "free space" in printed
    write_facts(data_directory / "trex" / "train" / "P17.jsonl", [("Oslo", "Norway")])
    assert with_free(needed)[0] == 1  # one more relation

    # Weights that are trained, with Adam's averages and a copy of the best, in float32, three times; unless sharded.
    weights = 3 * 4 * 4 * inspect_backbone(str(backbone_directory))[1]
    tuned = ("--methods", "fine-tuning")
    assert with_free(weights, *tuned)[0] == 0
    assert with_free(weights - 1, *tuned)[0] == 1
    assert with_free(weights - 1, *tuned, "--deepspeed", "zero3")[0] == 0


def test_a_memory_that_a_plan_would_call_too_small_is_refused(check, monkeypatch, backbone_directory):
    """One rule for both: a memory that would be filled to the brim is too small for the check as well."""
    needed = plan(PlanConfig(str(backbone_directory), gpus=0, relations=2), None).total("host")

    def with_memory(size: float) -> tuple[int, str]:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=size))
        return check()

    assert with_memory(1.01 * needed / USABLE)[0] == 0
    code, printed = with_memory(1.05 * needed)
    assert code == 1
    assert re.search(r"WRONG memory .* at most 92% should be filled; runtime take.* `megaprompt plan` tells", printed)
