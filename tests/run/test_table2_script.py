"""slurm/lama_table2.sh without a cluster: which directories its tasks have."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def directories(out: Path, backbones: str) -> list[str]:
    """Of all tasks, none of which has run: the last job names them."""
    site = out.parent / "site.env"
    site.write_text("PYTHON=(true)\n")
    variables = {"MEGAPROMPT_REPORT": "1", "MEGAPROMPT_SITE": str(site), "METHODS": "manual,p-tuning fine-tuning"}
    command = ["bash", "slurm/lama_table2.sh", backbones, "--out", str(out)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return re.findall(rf"{re.escape(str(out))}/runs/(\S+) is not complete", done.stderr)


def test_backbones_in_directories_of_the_same_name_have_runs_of_their_own(tmp_path):
    found = directories(tmp_path / "out", "a/final,b/final/,gpt2-xl")
    assert found == [
        "a--final-manual-p-tuning-seed0", "a--final-fine-tuning-seed0",
        "b--final-manual-p-tuning-seed0", "b--final-fine-tuning-seed0",
        "gpt2-xl-manual-p-tuning-seed0", "gpt2-xl-fine-tuning-seed0",
    ]  # fmt: skip
