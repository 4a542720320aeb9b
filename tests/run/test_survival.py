"""A run that is killed at any moment goes on, when resumed, to what it would have been undisturbed, bit for bit.

MEGAPROMPT_KILLS=50 python -m pytest tests/run/test_survival.py    for a longer soak
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaprompt.run.saved_prompts import load_prompts
from tests.conftest import run_cli

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("MEGAPROMPT_KILLS", "5"))

# As the command line does it, with a checkpoint after every step.
ALWAYS_SAVE = """
import sys
import megaprompt.run.job
from megaprompt.engine import trainer
from megaprompt.cli import main
original = trainer.Trainer.train
def train(self, hooks):
    hooks.should_save = lambda: True
    return original(self, hooks)
trainer.Trainer.train = train
sys.exit(main(sys.argv[1:]))
"""


def start(*args: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ALWAYS_SAVE, *map(str, args)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Wait until the condition holds or the process has ended; whether the process still runs."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return process.poll() is None


def newest(run: Path) -> str:
    return max((path.name for path in (run / "state").glob("step-*")), default="")


def test_killed_at_random_moments(backbone_directory, data_directory, tmp_path):
    options = ("--backbone", backbone_directory, "--data", data_directory, "--learning-rate", 0.01)
    options += ("--max-epochs", 20 * KILLS, "--patience", 20 * KILLS)
    assert run_cli("probe", *options, "--out", tmp_path / "whole").returncode == 0
    choose = random.Random(0)
    broken, kills, while_writing = tmp_path / "broken", 0, 0
    while True:
        resume = ("--resume",) if (broken / "config.yaml").exists() else ()
        process = start("probe", *options, "--out", broken, *resume)
        if kills < KILLS:
            before = newest(broken)
            if choose.random() < 0.4:  # in the middle of writing a checkpoint

                def moment(before=before):
                    return newest(broken) > before and any((broken / "state").glob(".*.partial"))
            else:
                until = time.monotonic() + choose.uniform(0, 3)

                def moment(before=before, until=until):
                    return time.monotonic() > until and newest(broken) > before

            if wait_for(moment, process):
                while_writing += any((broken / "state").glob(".*.partial"))
                process.kill()
                kills += 1
                process.communicate()
                continue
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
        break
    assert kills == KILLS, "the run ended before it could be killed often enough"
    print(f"{kills} kills, {while_writing} while a checkpoint was written")
    prompts = [load_prompts(tmp_path / run) for run in ("whole", "broken")]
    for name, prompt in prompts[0].items():
        assert torch.equal(prompt.vectors, prompts[1][name].vectors)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "broken")]
    assert results[0]["methods"] == results[1]["methods"]
    assert not (broken / "state").exists()


def test_full_disk_keeps_the_older_checkpoint(backbone_directory, data_directory, tmp_path):
    """A limit on the size of files stands for a full disk: log and results fit, a checkpoint does not."""
    options = ("--backbone", backbone_directory, "--data", data_directory, "--max-epochs", 3)
    first = start("probe", *options, "--out", tmp_path / "run")
    assert wait_for(lambda: newest(tmp_path / "run"), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = newest(tmp_path / "run")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    second = start("probe", "--out", tmp_path / "run", "--resume", preexec_fn=limit)
    error = second.communicate(timeout=120)[1]
    assert second.returncode == 1
    assert "cannot write a checkpoint" in error.splitlines()[-1]
    assert "the older ones are kept" in error.splitlines()[-1]
    assert newest(tmp_path / "run") == kept
    assert not list((tmp_path / "run" / "state").glob(".*"))
    assert run_cli("probe", "--out", tmp_path / "run", "--resume").returncode == 0
