"""The whole job on a GPU: all methods, ZeRO-3 and offload, stopping and going on, several GPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megaprompt.config import EvaluateConfig, ProbeConfig
from megaprompt.engine.trainer import Interrupted, Trainer
from megaprompt.run.evaluate import evaluate
from megaprompt.run.job import probe
from megaprompt.run.saved_prompts import load_prompts
from tests.conftest import write_data
from tests.distributed.test_distributed import CONFIGS, ROOT, assert_same_run, torchrun

METHODS = ("manual", "p-tuning", "fine-tuning", "manual+fine-tuning", "autoprompt")
RATES = ("--learning-rate", "0.003", "--fine-tuning-rate", "0.0003", "--max-epochs", "3", "--autoprompt-steps", "6")
SHARDED = ("--dtype", "float32", "--methods", "manual,p-tuning,fine-tuning")
CASES = {
    "cpu": ("--dtype", "float64", "--methods", ",".join(METHODS)),
    "float64": ("--dtype", "float64", "--methods", ",".join(METHODS)),
    "float32": SHARDED,
    "default": ("--methods", ",".join(METHODS)),
    "zero3": (*SHARDED, "--deepspeed", CONFIGS / "zero3.json"),
    "zero3_cpu_offload": (*SHARDED, "--deepspeed", CONFIGS / "zero3_cpu_offload.json"),
    "zero3_bf16": ("--methods", "manual,p-tuning,fine-tuning", "--deepspeed", CONFIGS / "zero3_bf16.json"),
}


@pytest.fixture(scope="module")
def backbone(gpu, tokenizer, tmp_path_factory) -> Path:
    """Of a size that DeepSpeed partitions."""
    path = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, hidden_size=256, intermediate_size=512,
        vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runs(backbone, tmp_path_factory) -> dict[str, Path]:
    """A run of each case. Most of a small one is its start, so they run side by side."""
    path = tmp_path_factory.mktemp("runs")
    options = ("--backbone", backbone, "--data", write_data(path / "data"), *RATES)
    processes = {}
    for name, more in CASES.items():
        command = [sys.executable, "-m", "megaprompt", "probe", *options, *more, "--out", path / name]
        without = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if name == "cpu" else {}
        processes[name] = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.DEVNULL, stderr=(path / f"{name}.log").open("w"), cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **without},
        )  # fmt: skip
    try:
        for process in processes.values():
            process.wait(timeout=300)
    finally:
        for process in processes.values():
            process.kill()
    return {name: path / name for name in CASES}


def results(run: Path) -> dict:
    assert (run / "results.json").exists(), run.with_suffix(".log").read_text()
    found = json.loads((run / "results.json").read_text())
    assert found["complete"], run.with_suffix(".log").read_text()
    return found


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def test_all_methods_find_what_they_find_on_the_cpu(runs):
    cpu, found = results(runs["cpu"]), results(runs["float64"])
    assert found["environment"]["devices"] == [f"cuda ({torch.cuda.get_device_name(0)})"]
    for method in METHODS:
        for name, row in cpu["methods"][method]["relations"].items():
            other = found["methods"][method]["relations"][name]
            for key, value in row.items():
                assert other[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    torch.testing.assert_close(losses(runs["float64"]), losses(runs["cpu"]), rtol=1e-6, atol=0)
    for name, prompt in load_prompts(runs["cpu"]).items():
        error = (load_prompts(runs["float64"])[name].vectors - prompt.vectors).norm() / prompt.vectors.norm()
        assert error < 1e-6


def test_saved_prompts_score_alike(runs):
    found = results(runs["float64"])["methods"]["p-tuning"]["relations"]
    scores = evaluate(EvaluateConfig(prompts=runs["float64"], dtype="float64"))
    assert {name: row["p_at_1"] for name, row in scores["relations"].items()} == {
        name: row["p_at_1"] for name, row in found.items()
    }


def test_of_its_own_accord_it_computes_in_bfloat16(runs):
    found = results(runs["default"])
    assert found["backbone"]["dtype"] == "bfloat16"
    assert set(METHODS) <= set(found["methods"])
    torch.testing.assert_close(losses(runs["default"]), losses(runs["float64"]), rtol=0.02, atol=0)


@pytest.mark.parametrize("config", ["zero3", "zero3_cpu_offload"])
def test_sharding_and_offload_change_nothing(runs, config):
    results(runs[config])
    assert_same_run(runs["float32"], runs[config])
    torch.testing.assert_close(losses(runs[config]), losses(runs["float32"]), rtol=1e-4, atol=1e-5)


def test_half_precision_learns_about_the_same(runs):
    assert results(runs["zero3_bf16"])["backbone"]["dtype"] == "bfloat16"
    torch.testing.assert_close(losses(runs["zero3_bf16"]), losses(runs["float32"]), rtol=0.02, atol=0)


def test_a_stopped_run_goes_on_exactly(backbone, tmp_path, monkeypatch):
    options = {"methods": ("p-tuning",), "learning_rate": 0.003, "max_epochs": 4}
    data = write_data(tmp_path / "data")
    config = ProbeConfig(backbone=str(backbone), data=str(data), out=tmp_path / "whole", **options)
    torch.use_deterministic_algorithms(True)
    try:
        probe(config)
        train = Trainer.train

        def stopped(self, hooks):
            hooks.should_stop = lambda: self.step == 3
            return train(self, hooks)

        monkeypatch.setattr(Trainer, "train", stopped)
        with pytest.raises(Interrupted):
            probe(replace(config, out=tmp_path / "stopped"))
        monkeypatch.setattr(Trainer, "train", train)
        probe(replace(config, out=tmp_path / "stopped", resume=True))
    finally:
        torch.use_deterministic_algorithms(False)
    stopped_run = load_prompts(tmp_path / "stopped")
    for name, prompt in load_prompts(tmp_path / "whole").items():
        assert torch.equal(prompt.vectors, stopped_run[name].vectors)


# --------------------------------------------------------------------------------------------------------- several GPUs

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two
@pytest.mark.parametrize(("more", "groups"), [((), 1), (("--deepspeed", CONFIGS / "zero3.json"), 2)])
def test_two_gpus_find_the_same(backbone, runs, tmp_path, more, groups):
    options = ("--backbone", backbone, "--data", runs["cpu"].parent / "data", *RATES, *SHARDED, *more)
    command = [
        *torchrun(2),
        "-m",
        "megaprompt",
        "probe",
        *options,
        "--relation-groups",
        groups,
        "--out",
        tmp_path / "run",
    ]
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(runs["float32"], tmp_path / "run")


DRIFT = """
import sys, torch
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.launch import joined_world
from megaprompt.prompting.recipe import Recipe
from tests.engine.test_trainer import trainer_for

with joined_world(force=True) as world:
    backbone = load_backbone(sys.argv[1], torch.bfloat16, world.device)
    recipe = Recipe(0.01, 5e-4, 1.0, batch_size=8, max_epochs=10**6, patience=10**6)
    trainer = trainer_for(backbone, recipe=recipe, world=world)
    for _ in range(200):
        for learner in trainer.learners:
            learner.cursor = 0
        trainer.train_step()
    for learner in trainer.learners:
        for name, weight in learner.encoder.named_parameters():
            other = weight.detach().clone()
            torch.distributed.broadcast(other, 0)
            assert torch.equal(other, weight), f"replicas of {name} have drifted apart"
print("fine")
"""


@two
def test_replicas_do_not_drift_apart(backbone, tmp_path):
    (tmp_path / "drift.py").write_text(DRIFT)
    command = [*torchrun(2), tmp_path / "drift.py", backbone]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
