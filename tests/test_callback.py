"""A model is probed while transformers' Trainer trains it, and is not changed by that."""

import csv
import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from megaprompt.backbone.borrowed import borrowed
from megaprompt.callback import ProbeCallback
from megaprompt.cli import main
from megaprompt.config import ProbeConfig
from megaprompt.errors import MegapromptError, UsageError
from tests.conftest import PAIRS, make_model


class Facts(torch.utils.data.Dataset):
    """Sentences about the facts."""

    def __init__(self, tokenizer):
        ids = [tokenizer(f"The capital of {s} is {o} .")["input_ids"] for s, o in PAIRS["P36"]]
        self.rows = [each for each in ids if len(each) == len(ids[0])]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": torch.tensor(self.rows[i]), "labels": torch.tensor(self.rows[i])}


class Interrupting(TrainerCallback):
    """Something that depends on random numbers, as dropout does."""

    drawn: list[float]

    def on_step_begin(self, args, state, control, **more):
        self.drawn = [*getattr(self, "drawn", []), torch.rand(()).item()]
        assert more["model"].training
        assert all(parameter.requires_grad for parameter in more["model"].parameters())


def trainer_for(tokenizer, out, *callbacks, steps=40):
    arguments = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, seed=0,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = make_model("llama", len(tokenizer))
    return Trainer(model, arguments, train_dataset=Facts(tokenizer), callbacks=list(callbacks))


def trained(tokenizer, out, *callbacks, steps=40):
    watch = Interrupting()
    trainer = trainer_for(tokenizer, out, watch, *callbacks, steps=steps)
    trainer.train()
    return trainer.model, watch.drawn


@pytest.fixture
def config(data_directory, tmp_path):
    def make(**options):
        options = {"methods": ("manual",), "vocab": "none", **options}
        return ProbeConfig(backbone="small", data=str(data_directory), out=tmp_path / "training", **options)

    return make


def test_what_is_learned_when(tokenizer, config, tmp_path, capsys):
    plain, drawn = trained(tokenizer, tmp_path / "a")
    probed, drawn_too = trained(tokenizer, tmp_path / "b", ProbeCallback(config(), tokenizer, every=15))
    assert drawn_too == drawn
    for (name, one), (_, other) in zip(plain.named_parameters(), probed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [type(m) for m in plain.modules()] == [type(m) for m in probed.modules()]

    out = tmp_path / "training"
    assert sorted(path.name for path in out.iterdir()) == [f"step-{step:07d}" for step in (0, 15, 30, 40)]
    results = [json.loads((path / "results.json").read_text()) for path in sorted(out.iterdir())]
    scores = [each["methods"]["manual"]["relations"]["P36"]["p_at_1"] for each in results]
    assert scores[0] < 0.3
    assert scores[-1] > 0.5
    assert len({each["backbone"]["fingerprint"] for each in results}) == 4

    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (out / "report.html").read_text()
    assert "What small learns of data while it is trained" in page
    assert f"<strong>{100 * results[-1]['methods']['manual']['macro']['p_at_1']:.1f}" in page
    assert (out / "means.png").is_file()
    with (out / "series.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["relation"]) == ("manual", "P36")]
    assert [float(row["p_at_1_percent"]) for row in rows] == pytest.approx([100 * score for score in scores], abs=1e-3)


def test_a_training_that_is_continued_keeps_what_was_probed(tokenizer, config, tmp_path):
    callback = ProbeCallback(config(), tokenizer, every=2)
    trained(tokenizer, tmp_path / "a", callback, steps=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "training").rglob("results.json")}
    trained(tokenizer, tmp_path / "b", ProbeCallback(config(), tokenizer, every=2), steps=2)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_probes_of_another_training_are_not_taken_for_this_ones(tokenizer, config, tmp_path, caplog):
    trained(tokenizer, tmp_path / "a", ProbeCallback(config(), tokenizer, every=2), steps=2)
    with pytest.raises(MegapromptError, match="step-0000000: holds a probe of other options; give another out"):
        trained(tokenizer, tmp_path / "b", ProbeCallback(config(limit_facts=2), tokenizer, every=2), steps=2)
    kept = (tmp_path / "training" / "step-0000002" / "results.json").read_bytes()
    trainer = trainer_for(tokenizer, tmp_path / "c", ProbeCallback(config(), tokenizer, every=2), steps=2)
    trainer.args.learning_rate = 0.1
    trainer.train()
    assert "step 2 is not probed" in caplog.text
    assert "holds a probe of other weights" in caplog.text
    assert (tmp_path / "training" / "step-0000002" / "results.json").read_bytes() == kept


def test_mistakes_are_told_at_once_and_later_ones_do_not_end_the_training(tokenizer, config, tmp_path, caplog):
    with pytest.raises(UsageError, match="would train the weights"):
        ProbeCallback(config(methods=("manual", "fine-tuning")), tokenizer, every=1)
    with pytest.raises(UsageError, match="every=0"):
        ProbeCallback(config(), tokenizer, every=0)
    wrong = ProbeConfig(backbone="small", data=str(tmp_path / "nowhere"), out=tmp_path / "wrong")
    with pytest.raises(MegapromptError, match="nowhere"):
        trained(tokenizer, tmp_path / "a", ProbeCallback(wrong, tokenizer, every=1), steps=1)
    (tmp_path / "training" / "step-0000001").mkdir(parents=True)
    (tmp_path / "training" / "step-0000001" / "other").touch()
    trained(tokenizer, tmp_path / "b", ProbeCallback(config(), tokenizer, every=1), steps=2)
    assert "step 1 is not probed" in caplog.text
    assert (tmp_path / "training" / "step-0000002" / "results.json").is_file()


def test_half_precision_is_given_back_too(tokenizer):
    model = make_model("llama", len(tokenizer)).bfloat16()
    ids = torch.arange(5)[None]
    before, modules = model(input_ids=ids).logits, dict(model.named_modules())
    with borrowed(model, tokenizer, "small") as backbone:
        backbone(torch.arange(5))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert dict(model.named_modules()) == modules
    assert "forward" not in model.get_output_embeddings().__dict__
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(model(input_ids=ids).logits, before)
