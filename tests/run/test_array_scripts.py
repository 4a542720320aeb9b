"""The scripts of job arrays without a cluster: which directories their tasks have."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def directories(script: str, out: Path, backbones: str, **more: str) -> list[str]:
    """Of all tasks, none of which has run: the last job names them."""
    site = out.parent / "site.env"
    site.write_text("PYTHON=(true)\n")
    variables = {
        "MEGAPROMPT_REPORT": "1",
        "MEGAPROMPT_SITE": str(site),
        "METHODS": "manual,p-tuning fine-tuning",
        **more,
    }
    command = ["bash", f"slurm/{script}", backbones, "--out", str(out)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return re.findall(rf"{re.escape(str(out))}/runs/(\S+) is not complete", done.stderr)


def test_backbones_in_directories_of_the_same_name_have_runs_of_their_own(tmp_path):
    found = directories("lama_table2.sh", tmp_path / "out", "a/final,b/final/,gpt2-xl")
    assert found == [
        "a--final-manual-p-tuning-seed0", "a--final-fine-tuning-seed0",
        "b--final-manual-p-tuning-seed0", "b--final-fine-tuning-seed0",
        "gpt2-xl-manual-p-tuning-seed0", "gpt2-xl-fine-tuning-seed0",
    ]  # fmt: skip


def test_superglue_has_a_run_for_each_task_of_superglue(tmp_path):
    found = directories("superglue.sh", tmp_path / "out", "a/final,gpt2", TASKS="cb wsc", SEEDS="0 1")
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2
    assert found[:3] == [
        "a--final-manual-p-tuning-seed0/cb", "a--final-manual-p-tuning-seed0/wsc", "a--final-fine-tuning-seed0/cb",
    ]  # fmt: skip
    assert found[-1] == "gpt2-fine-tuning-seed1/wsc"


def test_bear_has_a_run_for_each_model(tmp_path):
    assert directories("bear.sh", tmp_path / "out", "a/final/,gpt2") == ["a--final", "gpt2"]


@pytest.mark.parametrize("script", ["lama_table2.sh", "superglue.sh", "bear.sh"])
def test_without_backbones_there_is_help(script):
    command = ["bash", f"slurm/{script}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"bash slurm/{script}" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("script", "option", "instead"),
    [
        ("superglue.sh", "--tasks", "TASKS="),
        ("superglue.sh", "--methods=manual", "METHODS="),
        ("lama_table2.sh", "--seed", "SEEDS="),
        ("bear.sh", "--backbone", "first argument"),
    ],
)
def test_options_that_tasks_get_from_the_script_are_refused(script, option, instead):
    """They would be overridden without a word."""
    command = ["bash", f"slurm/{script}", "gpt2", option, "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert option.split("=")[0] in done.stderr
    assert instead in done.stderr
