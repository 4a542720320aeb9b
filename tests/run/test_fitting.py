"""What `--deepspeed auto` takes on machines of several sizes, and what is refused where nothing fits."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from megaprompt.cli import main
from megaprompt.config import AUTO, ProbeConfig
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.template import Template
from megaprompt.resources.plan import USABLE, bytes_of_pass
from megaprompt.resources.profile import BUILT_IN, Workload
from megaprompt.run.fitting import Machines, choose, fitted
from megaprompt.run.job import probe

ROOT = Path(__file__).parents[2]
CONFIG = ProbeConfig(backbone="wide", deepspeed=AUTO, row_tokens=64, pass_tokens=64, encoder="none")
LARGE = Machines(nodes=1, gpus=8, gpu_memory=80.0, host_memory=1000.0)
TEMPLATES = [Template.parse("<3>[X]<3>[Y]")]
ZERO3 = Path("ds_configs/zero3.json")
OFFLOAD = Path("ds_configs/zero3_cpu_offload.json")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """A model of 0.4 billion parameters in few modules, whose plans take little time."""
    monkeypatch.setitem(
        BUILT_IN, "wide", (GPT2Config, {"vocab_size": 5000, "n_embd": 2048, "n_layer": 8, "n_head": 16})
    )


def taken(machines: Machines, config: ProbeConfig = CONFIG, before: str | None = None) -> Path | None:
    return choose(config, TEMPLATES, machines, before)[0].deepspeed


def needed(deepspeed: Path | None, place: str = "device") -> float:
    """GB of a rank."""
    return fitted(CONFIG, TEMPLATES, LARGE, deepspeed).plans["p-tuning"].total(place) / 1e9


def test_the_fastest_that_fits(monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, sharded, offloaded = (needed(one) / USABLE for one in (None, ZERO3, OFFLOAD))
    assert offloaded < sharded < whole
    assert taken(LARGE) is None
    assert taken(LARGE._replace(gpu_memory=0.5 * (whole + sharded))) == ZERO3
    assert taken(LARGE._replace(gpu_memory=0.5 * (sharded + offloaded))) == OFFLOAD
    found, line = choose(CONFIG, TEMPLATES, LARGE._replace(gpu_memory=0.5 * (whole + sharded)))
    assert "auto takes zero3, since whole copies would be too large: p-tuning: a rank of 8 needs" in line
    assert found.fits


def test_nothing_fits(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(MegapromptError, match=r"auto: nothing fits, zero3_cpu_offload neither \(GPU memory: .* GB of"):
        taken(LARGE._replace(gpu_memory=0.9))
    host = needed(OFFLOAD, "host") * 8
    between = 0.5 * (needed(ZERO3) + needed(OFFLOAD)) / USABLE
    with pytest.raises(MegapromptError, match="host memory"):
        taken(LARGE._replace(gpu_memory=between, host_memory=host))


def test_nvme_only_where_its_directory_is(monkeypatch, tmp_path):
    (tmp_path / "ds_configs").mkdir()
    for path in (ROOT / "ds_configs").glob("*.json"):
        settings = json.loads(path.read_text())
        if "nvme" in path.stem:
            settings["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "local")
            settings["zero_optimization"]["offload_param"].update(buffer_count=2, buffer_size=1000)
        (tmp_path / "ds_configs" / path.name).write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    sharded, nvme = needed(ZERO3), needed(Path("ds_configs/zero3_nvme_offload.json"))
    small = LARGE._replace(gpu_memory=0.5 * (sharded + nvme) / USABLE, host_memory=3.05 * 8 / USABLE)
    with pytest.raises(MegapromptError, match="nothing fits"):
        taken(small)
    (tmp_path / "local").mkdir()
    assert taken(small) == Path("ds_configs/zero3_nvme_offload.json")


@pytest.mark.slow
def test_all_that_is_trained_has_to_fit(monkeypatch):
    monkeypatch.chdir(ROOT)
    both = ProbeConfig(**{**vars(CONFIG), "methods": ("p-tuning", "fine-tuning"), "dtype": "bfloat16"})
    tight = LARGE._replace(gpu_memory=1.2 * needed(None) / USABLE)  # for prompts, but not for gradients and Adam
    assert taken(tight) is None
    assert taken(tight, both) == OFFLOAD


def test_what_was_taken_before_is_taken_again(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert taken(LARGE, before=str(ZERO3)) == ZERO3
    tight = LARGE._replace(gpu_memory=0.5 * (needed(None) + needed(ZERO3)) / USABLE)
    assert taken(tight, before="none") == ZERO3


def test_a_control_has_whole_copies():
    assert taken(LARGE, ProbeConfig(**{**vars(CONFIG), "control": "random-weights"})) is None
    with pytest.raises(MegapromptError, match="whole copies neither"):
        taken(LARGE._replace(gpu_memory=1.0), ProbeConfig(**{**vars(CONFIG), "control": "random-weights"}))


@pytest.mark.slow
def test_a_run_takes_it_and_says_so(backbone_directory, data_directory, tmp_path, caplog):
    config = ProbeConfig(
        backbone=str(backbone_directory), data=str(data_directory), out=tmp_path / "run", max_steps=2, deepspeed=AUTO
    )
    caplog.set_level("INFO")
    assert probe(config)["deepspeed"] == "none"
    assert "--deepspeed auto takes whole copies of the backbone: p-tuning" in caplog.text
    assert "deepspeed: auto" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_check_says_it_or_refuses(backbone_directory, data_directory, tmp_path, monkeypatch, capsys):
    options = ["probe", "--backbone", backbone_directory, "--data", data_directory, "--out", tmp_path / "run"]
    command = [*map(str, options), "--deepspeed", "auto", "--check"]
    assert main(command) == 0
    assert "ok    memory    --deepspeed auto takes whole copies" in capsys.readouterr().out
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1e8))
    assert main(command) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_a_login_node_judges_what_it_is_told_of(backbone_directory, data_directory, tmp_path, monkeypatch, capsys):
    options = [
        "probe",
        "--backbone",
        backbone_directory,
        "--data",
        data_directory,
        "--out",
        tmp_path / "run",
        "--check",
    ]
    monkeypatch.setenv("MEGAPROMPT_LOGIN_NODE", "2*4")
    assert main([*map(str, options)]) == 0
    assert "judged in the job" in capsys.readouterr().out
    monkeypatch.setenv("GPU_MEMORY", "80")
    monkeypatch.setenv("HOST_MEMORY", "1000")
    assert main([*map(str, options)]) == 0
    assert "a rank of 8 needs" in capsys.readouterr().out
    monkeypatch.setenv("GPU_MEMORY", "0.5")
    assert main([*map(str, options)]) == 1
    assert "WRONG memory" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "asked"), [("", "1*4"), ("--nodes=3 --ntasks-per-node 8", "3*8")])
def test_scripts_tell_the_login_node_what_they_ask_for(tmp_path, options, asked):
    site = tmp_path / "site.env"
    site.write_text("""PYTHON=(bash -c 'echo "asked for $MEGAPROMPT_LOGIN_NODE"; exit 3')\n""")
    environment = {**os.environ, "MEGAPROMPT_SITE": str(site), "SBATCH_OPTIONS": options}
    done = subprocess.run(
        ["bash", "slurm/lama_gpt2_xl.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"asked for {asked}"]
    assert done.returncode == 2


def test_a_plan_ends_with_an_error_where_nothing_fits(backbone_directory, capsys):
    assert main(["plan", str(backbone_directory), "--deepspeed", "auto"]) == 0
    assert "fits without --deepspeed" in capsys.readouterr().out
    assert main(["plan", str(backbone_directory), "--gpu-memory", "0.5"]) == 1
    assert "megaprompt: does not fit; use more GPUs or nodes (GPU memory" in capsys.readouterr().err
    assert main(["plan", str(backbone_directory), "--gpu-memory", "0.5", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["plans"][0]["fits"]


def test_best_is_planned_with_its_candidates_and_folds():
    """As many as are learned at once; fewer only where the run takes fewer, too."""

    def together(machines: Machines, **more) -> int:
        config = replace(CONFIG, methods=("best",), encoder="lstm", **more)
        return fitted(config, TEMPLATES * 12, machines, None).together

    assert fitted(CONFIG, TEMPLATES, LARGE, None).together == 1
    assert together(LARGE) == 16
    assert together(LARGE, candidates=2) == 8
    assert together(LARGE._replace(gpus=1, gpu_memory=8.0)) == 4


def test_whole_answers_are_planned_with_all_that_is_read(monkeypatch):
    monkeypatch.setitem(
        BUILT_IN, "wordy", (GPT2Config, {"vocab_size": 50_000, "n_embd": 64, "n_layer": 2, "n_head": 2})
    )
    size = PassSize(256, 1024)
    token, whole = (Workload("p-tuning", 2, size, whole_answers=whole) for whole in (False, True))
    read = [pack(work.full_pass(), 256) for work in (token, whole)]
    assert read[1].targets.numel() > 0.7 * read[1].token_ids.numel() > 4 * read[0].targets.numel()
    found = [bytes_of_pass("wordy", torch.float32, size, whole) for whole in (False, True)]
    assert found[1] > 3 * found[0]


def test_answers_alone_have_to_fit_as_well():
    config = replace(CONFIG, methods=("manual",), deepspeed=None)
    assert not fitted(config, TEMPLATES, LARGE._replace(gpu_memory=0.5), None).fits
