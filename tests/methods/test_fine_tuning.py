"""Fine-tuning: gradients equal PyTorch's own, DeepSpeed changes nothing, and the best model on dev is what counts."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Hooks, Interrupted, Trainer
from megaprompt.engine.weights import Weights
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template
from megaprompt.run.job import ProbeConfig, probe
from tests.conftest import PAIRS, instances_of, objective_of, run_cli, write_data
from tests.distributed.test_distributed import torchrun

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(0.001, 5e-4, 0.98, batch_size=8, max_epochs=4, patience=4)


def tuner_for(backbone, size=PassSize(), recipe=RECIPE, keep=lambda learner: learner.epoch + 1) -> Trainer:  # noqa: B008
    backbone.requires_grad_(True)
    facts = instances_of(backbone, Template.parse("[X] [Y]"), PAIRS["P36"])
    data = TrainingSet("P36", objective_of(backbone), 0, facts, facts)
    weights = Weights(backbone, recipe, World(), None)
    return Trainer(backbone, [data], recipe, size=size, world=World(), weights=weights, keep=keep)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [PassSize(), PassSize(8, 8)], ids=["one pass", "many passes"])
def test_a_step_equals_plain_pytorch_in_float64(make_backbone, kind, size):
    tuner, plain = tuner_for(make_backbone(kind), size), make_backbone(kind).requires_grad_(True)
    gradients = {}

    def step(update=tuner.weights.optimizer.step):
        gradients.update((name, parameter.grad.clone()) for name, parameter in tuner.backbone.named_parameters())
        update()

    tuner.weights.optimizer.step = step
    [learner] = tuner.learners
    batch = learner.next_batch()
    learner.cursor = 0
    tuner.train_step()

    optimizer = torch.optim.Adam(plain.parameters(), RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    facts = learner.data.train
    losses = []
    for i in batch:
        logits = plain.model(torch.tensor([facts[i].queries[0].tokens])).logits[0, -1:]
        losses.append(cross_entropy(logits, torch.tensor([facts[i].gold])))
    torch.stack(losses).mean().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)
    optimizer.step()
    for name, parameter in plain.named_parameters():
        # Adam's first step is as large for a gradient of 1e-17 (GPT-2's key biases) as for any other.
        moved = parameter.grad.abs() > 1e-9
        torch.testing.assert_close(tuner.backbone.get_parameter(name)[moved], parameter[moved], rtol=1e-9, atol=1e-12)


def test_what_is_kept_belongs_to_the_best_epoch(make_backbone):
    tuner = tuner_for(make_backbone("llama"), recipe=Recipe(0.01, 0.0, 1.0, batch_size=4, max_epochs=8, patience=2))
    lines = []
    found = tuner.train(Hooks(log=lines.append))["P36"]
    best = max(lines, key=lambda line: (line["dev_p_at_1"], line["dev_mrr"]))
    assert found.kept == best["epoch"] == found.best_epoch
    assert best["dev_p_at_1"] > lines[0]["dev_p_at_1"]  # it has learned something
    better = [line["epoch"] for line in lines if line["dev_p_at_1"] == best["dev_p_at_1"]]
    assert len(lines) == min(8, better[0] + 2)  # patience


def test_a_bad_loss_stops_with_advice(make_backbone):
    tuner = tuner_for(make_backbone("gpt2"))
    with torch.no_grad():
        tuner.backbone.model.transformer.ln_f.weight.fill_(float("nan"))
    found = tuner.train(Hooks())["P36"]
    assert found.kept is None
    assert found.diverged["reason"].startswith("the loss is nan in step 1; lower the learning rate")


def options(backbone, data, out, *more):
    rates = ("--fine-tuning-rate", "0.003", "--max-epochs", "4")
    return ("probe", "--backbone", backbone, "--data", data, *rates, "--out", out, *more)


def rows(run: Path, method: str) -> dict:
    return json.loads((run / "results.json").read_text())["methods"][method]["relations"]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if line.get("method")]


@pytest.fixture
def config(backbone_directory, data_directory, tmp_path):
    """The configuration of a short run; fields can be replaced."""
    rates = {"fine_tuning_rate": 0.003, "max_epochs": 4, "methods": ("fine-tuning",), "out": tmp_path / "run"}
    return ProbeConfig(backbone=str(backbone_directory), data=str(data_directory), **rates)


BOTH = ("--methods", "fine-tuning,manual+fine-tuning")


def test_both_methods_beside_the_manual_prompt(config):
    results = probe(replace(config, methods=("manual", "fine-tuning", "manual+fine-tuning")))
    assert "unfinished" not in results
    for method in ("fine-tuning", "manual+fine-tuning"):
        for name, row in results["methods"][method]["relations"].items():
            manual = results["data"]["relations"][name]["template"]
            assert row["template"] == ("[X] [Y]" if method == "fine-tuning" else manual)
            lines = map(json.loads, (config.out / "predictions" / f"{name}.jsonl").read_text().splitlines())
            ranks = [line["rank"] for line in lines if line["method"] == method]
            assert sum(rank == 1 for rank in ranks) / len(ranks) == row["p_at_1"]  # the facts of dev are those of test
            assert row["p_at_1"] == row["dev_p_at_1"]
    assert results["methods"]["manual+fine-tuning"]["macro"]["p_at_1"] > results["methods"]["manual"]["macro"]["p_at_1"]


@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"deepspeed": "stage0.json"}])
def test_half_precision_needs_float32_copies(config, tmp_path, more):
    if "deepspeed" in more:
        (tmp_path / "stage0.json").write_text('{"bf16": {"enabled": true}}')
        more = {"deepspeed": tmp_path / "stage0.json"}
    with pytest.raises(UsageError, match=r"half precision .*zero3_bf16\.json"):
        probe(replace(config, **more))
    assert not config.out.exists()


def test_interrupted_fine_tuning_goes_on_with_the_next_step(config, tmp_path, monkeypatch):
    whole = probe(replace(config, out=tmp_path / "whole"))
    train = Trainer.train

    def interrupted(self, hooks):
        hooks.should_stop = lambda: self.learners[0].data.task == second and self.step == 5  # after an epoch
        return train(self, hooks)

    first, second = whole["data"]["relations"]
    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(Interrupted, match="interrupted after step 5; continue with --resume"):
        probe(config)
    saved = json.loads((config.out / "results.json").read_text())
    assert list(saved["unfinished"]["fine-tuning"]) == [first]
    begun = []

    def noted(self, *args):
        begun.append((self.learners[0].data.task, self.step))
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", noted)
    resumed = probe(replace(config, resume=True))
    assert begun == [(second, 5)]
    assert resumed["methods"]["fine-tuning"]["relations"] == whole["methods"]["fine-tuning"]["relations"]
    assert losses(config.out) == losses(tmp_path / "whole")  # no line of the log twice
    assert not (config.out / "state").exists()  # the weights need not be kept any longer


@pytest.fixture(scope="module")
def alone(backbone_directory, tmp_path_factory):
    """Data, and a run on one process without DeepSpeed."""
    path = tmp_path_factory.mktemp("alone")
    data = write_data(path / "data")
    finished = run_cli(*options(backbone_directory, data, path / "run", *BOTH))
    assert finished.returncode == 0, finished.stderr
    return data, path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "config"), [(2, None), (1, "zero3.json"), (2, "zero3.json"), (2, "zero3_cpu_offload.json")]
)
def test_deepspeed_and_ranks_change_nothing(backbone_directory, alone, tmp_path, ranks, config):
    data, run = alone
    more = ("--deepspeed", ROOT / "ds_configs" / config) if config else ()
    many = run_cli(*options(backbone_directory, data, tmp_path / "many", *BOTH, *more), launcher=torchrun(ranks))
    assert many.returncode == 0, many.stderr
    torch.testing.assert_close(losses(run), losses(tmp_path / "many"), rtol=1e-4, atol=1e-5)
    for method in ("fine-tuning", "manual+fine-tuning"):
        one, other = rows(run, method), rows(tmp_path / "many", method)
        for name in one:
            assert abs(one[name]["p_at_1"] - other[name]["p_at_1"]) < 0.1


@pytest.mark.slow
def test_mixed_precision_keeps_float32_copies(backbone_directory, data_directory, tmp_path):
    """Steps of 1e-5 are lost on weights of bfloat16: only with float32 copies do they add up."""
    config = ROOT / "ds_configs" / "zero3_bf16.json"
    more = ("--methods", "fine-tuning", "--relations", "P36", "--max-epochs", "30", "--patience", "30")
    more = (*more, "--fine-tuning-rate", "0.0001")
    alone = run_cli(*options(backbone_directory, data_directory, tmp_path / "alone", *more))
    half = run_cli(*options(backbone_directory, data_directory, tmp_path / "half", *more, "--deepspeed", config))
    assert half.returncode == alone.returncode == 0, half.stderr
    full, mixed = losses(tmp_path / "alone"), losses(tmp_path / "half")
    assert full[-1] < 0.9 * full[0]
    assert abs(mixed[-1] - full[-1]) < 0.1 * (full[0] - full[-1])


@pytest.mark.slow
def test_a_signal_stops_after_the_step(backbone_directory, data_directory, tmp_path):
    command = [*map(str, options(backbone_directory, data_directory, tmp_path / "run", "--methods", "fine-tuning"))]
    process = subprocess.Popen(
        [sys.executable, "-m", "megaprompt", *command, "--max-epochs", "100000", "--patience", "100000"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "continue with --resume" in stderr
