"""Discrete prompts: files, the best on train, and ensembles."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.engine.learner import Learned
from megaprompt.engine.trainer import Trainer
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.methods.discrete import read_discrete_prompts
from megaprompt.run.job import probe
from tests.conftest import run_cli
from tests.distributed.test_distributed import torchrun

WORDINGS = ("The capital of [X] is [Y] .", "[X] , capital [Y]", "[X] is in [Y] .")


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def many(tmp_path) -> Path:
    """A directory in LPAQA's form."""
    weights = (0.5, 0.3, 0.2)
    rows = [{"template": t, "weight": w} for t, w in zip(WORDINGS, weights, strict=True)]
    rows.append({"template": "[Y] is the capital of [X] .", "weight": 9.0})  # not for causal models
    write(tmp_path / "prompts" / "P30.jsonl", [{"template": "[Y] has [X] ."}])
    return write(tmp_path / "prompts" / "P36.jsonl", rows).parent


@pytest.fixture
def config(backbone_directory, data_directory, tmp_path) -> ProbeConfig:
    return ProbeConfig(
        backbone=str(backbone_directory), data=str(data_directory), methods=("manual",), out=tmp_path / "run"
    )


def test_the_best_on_train_and_all_together(config, many):
    alone = {}
    for text in WORDINGS:  # what each wording scores on train, which is also test here
        file = write(config.out.parent / "one.jsonl", [{"relation": "P36", "template": text}])
        one = probe(
            replace(config, discrete=(f"one={file}",), relations=("P36",), out=config.out.parent / f"run{len(alone)}")
        )
        assert list(one["methods"]) == ["majority", "manual", "one"]
        alone[text] = one["methods"]["one"]["relations"]["P36"]["mrr"]
    results = probe(replace(config, discrete=(f"lpaqa={many}",)))
    best, together = results["methods"]["lpaqa best"]["relations"], results["methods"]["lpaqa ensemble"]["relations"]
    assert best["P36"]["mrr"] == pytest.approx(max(alone.values()))
    assert best["P36"]["template"] == max(alone, key=lambda text: alone[text])
    assert together["P36"]["template"] == "3 prompts"
    assert together["P36"]["prompts"] == 3
    # Of P30 no prompt can be read by a causal model: the manual one counts.
    assert best["P30"]["prompts"] == together["P30"]["prompts"] == 0
    assert (
        best["P30"]["p_at_1"] == together["P30"]["p_at_1"] == results["methods"]["manual"]["relations"]["P30"]["p_at_1"]
    )
    lines = map(json.loads, (config.out / "predictions" / "P36.jsonl").read_text().splitlines())
    assert {line["method"] for line in lines} == {"manual", "lpaqa best", "lpaqa ensemble"}


def test_a_manual_prompt_that_stands_in_is_told(config, tmp_path, caplog):
    file = write(tmp_path / "one.jsonl", [{"relation": "P36", "template": "[Y] is the capital of [X] ."}])
    probe(replace(config, discrete=(f"mine={file}",), relations=("P36",)))
    assert "none of P36; its manual prompt stands in" in caplog.text


def test_files_of_one_prompt_per_relation(tmp_path):
    file = write(tmp_path / "autoprompt.jsonl", [{"relation": "P36", "template": "[X]vik capital [Y]."}])
    (prompt,) = read_discrete_prompts(file)["P36"]
    assert (prompt.text, prompt.weight) == ("[X]vik capital [Y].", 1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:1: not valid JSON"),
        ('{"relation": "P36"}', 'x.jsonl:1: "template" is missing'),
        ('{"template": "[X] [Y]", "weight": "much"}', "x.jsonl:1: .*'much'"),
        ('{"template": "no placeholders"}', "needs exactly one"),
        ('{"template": "<3>[X][Y]"}', "x.jsonl:1: has pseudo tokens"),
        ("", "holds no prompts"),
    ],
)
def test_wrong_files_are_told_with_their_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(MegapromptError, match=message):
        read_discrete_prompts(tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ["lpaqa", "=x", "manual=x", "a=x,a=y"])
def test_wrong_options(config, text):
    with pytest.raises(UsageError, match=r"--discrete .*give NAME=PATH"):
        replace(config, discrete=tuple(text.split(",")))


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_manual_vectors_need_a_prompt_without_encoder(config, encoder):
    with pytest.raises(UsageError, match="--init manual: give --encoder none"):
        replace(config, init="manual", encoder=encoder)


def test_before_training_vectors_of_the_manual_prompt_score_as_it_does(config, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda self, *_: {x.data.task: start(x) for x in self.learners})
    results = probe(replace(config, methods=("manual", "p-tuning"), init="manual", encoder="none"))
    manual, learned = (results["methods"][name]["relations"] for name in ("manual", "p-tuning"))
    for name in manual:
        pseudo_tokens = sum(map(int, re.findall(r"<(\d+)>", learned[name]["template"])))
        assert pseudo_tokens >= len(manual[name]["template"].split()) - 3  # without [X], [Y] and the full stop
        for score in ("p_at_1", "p_at_10", "mrr"):
            assert learned[name][score] == pytest.approx(manual[name][score])
    before = list(map(json.loads, (config.out / "predictions" / "P36.jsonl").read_text().splitlines()))
    for one, other in zip(before[:13], before[13:], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


def start(learner) -> Learned:
    return Learned(learner.prompt(), 0, 0, {"p_at_1": 0.0, "mrr": 0.0})


def test_vectors_of_the_manual_prompt_are_trained_from_there(config):
    config = replace(config, methods=("manual", "p-tuning"), init="manual", encoder="none", learning_rate=0.01)
    results = probe(replace(config, max_epochs=20, patience=20))
    assert results["methods"]["p-tuning"]["macro"]["mrr"] > results["methods"]["manual"]["macro"]["mrr"]


@pytest.mark.slow
def test_ranks_share_the_facts(config, many, tmp_path):
    options = ("probe", "--backbone", config.backbone, "--data", config.data, "--methods", "manual")
    for name, launcher in (("one", None), ("two", torchrun(2))):
        more = {} if launcher is None else {"launcher": launcher}
        done = run_cli(*options, "--discrete", f"lpaqa={many}", "--out", tmp_path / name, **more)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["methods"] for name in ("one", "two"))
    assert one == two


@pytest.mark.skipif(not Path("../shared/data/lama/prompts").is_dir(), reason="published prompts are not here")
def test_published_prompts_can_be_read():
    prompts = Path("../shared/data/lama/prompts")
    for name in ("lpaqa_mine", "lpaqa_paraphrase", "autoprompt_bert.jsonl", "autoprompt_roberta.jsonl"):
        assert len(read_discrete_prompts(prompts / name)) == 41
