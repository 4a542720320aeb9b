"""Controls: prompts of all methods on other facts, and everything on random weights."""

import json
from pathlib import Path

import pytest
import torch

from megaprompt.backbone import load_backbone
from megaprompt.cli import main
from megaprompt.config import AskConfig, EvaluateConfig, ProbeConfig
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.run.ask import ask
from megaprompt.run.evaluate import evaluate, evaluate_all
from megaprompt.run.job import probe
from megaprompt.run.saved_prompts import load_prompts, methods_with_prompts
from tests.conftest import PAIRS, write_facts

METHODS = ["best", "p-tuning", "in-context", "best-manual", "manual"]


@pytest.fixture
def options(backbone_directory, data_directory):
    options = {"backbone": str(backbone_directory), "data": str(data_directory), "max_steps": 4, "learning_rate": 0.01}
    return lambda out, **more: ProbeConfig(**{**options, "methods": ("best",), "out": out, **more})


@pytest.fixture
def other_facts(tmp_path):
    """Test facts of P36 alone, without a template or a description, and of a relation that no run knows."""
    for relation in ("P36", "P47"):
        write_facts(tmp_path / "uni" / "trex" / "test" / f"{relation}.jsonl", [*PAIRS["P36"][:4], PAIRS["P36"][0]])
    return tmp_path / "uni"


def test_prompts_of_every_method_are_scored_on_other_facts(options, other_facts, tmp_path, capsys):
    results = probe(options(tmp_path / "run"))
    assert methods_with_prompts(tmp_path / "run") == METHODS
    assert main(["evaluate", "--prompts", str(tmp_path / "run"), "--data", str(other_facts), "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    found = json.loads((tmp_path / "run" / "evaluations" / "uni.json").read_text())
    assert found["vocabulary"] == results["data"]["vocabulary"]["name"]
    assert list(found["methods"]) == METHODS
    for method in METHODS:
        alone = evaluate(EvaluateConfig(prompts=tmp_path / "run", method=method, data=str(other_facts), vocab="none"))
        assert list(alone["relations"]) == list(found["methods"][method]["relations"]) == ["P36"]
        assert found["methods"][method]["relations"]["P36"]["most_frequent"] == 0.4
        # Among the objects of the run's data, not among all tokens or the fewer objects of the other data.
        assert found["methods"][method]["macro"]["mrr"] > alone["macro"]["mrr"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "On uni, where always giving the most frequent answer would score 40.0 %" in page


@pytest.mark.parametrize("asked", [{}, {"answers": "candidates", "bos": "always"}, {"vocab": "words.txt"}])
def test_on_the_same_facts_every_method_has_the_same_scores(options, tmp_path, monkeypatch, asked):
    """Prompts are asked as their run asked."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("".join(f"{place}\n" for pairs in PAIRS.values() for _, place in pairs[:4]))
    run = tmp_path / "run"
    asked = {"methods": ("in-context", "p-tuning"), **asked} if asked else {}
    results = probe(options(run, **asked))
    for method, found in evaluate_all(EvaluateConfig(prompts=run))["methods"].items():
        for relation, row in found["relations"].items():
            of_run = results["methods"][method]["relations"][relation]
            assert (row["p_at_1"], row["mrr"]) == (of_run["p_at_1"], pytest.approx(of_run["mrr"], rel=1e-4))


def test_facts_of_no_relation_are_refused(options, tmp_path):
    probe(options(tmp_path / "run", methods=("manual",)))
    write_facts(tmp_path / "uni" / "trex" / "test" / "P47.jsonl", PAIRS["P36"])
    config = {"prompts": tmp_path / "run", "data": str(tmp_path / "uni")}
    with pytest.raises(UsageError, match="uni: has none of the relations of the prompts, P30, P36"):
        evaluate(EvaluateConfig(**config))
    with pytest.raises(UsageError, match="is not the directory of a run"):
        evaluate_all(EvaluateConfig(prompts=tmp_path / "run" / "prompts", report=True))
    with pytest.raises(UsageError, match="leave --method and --out out"):
        EvaluateConfig(prompts=tmp_path / "run", method="manual", report=True)


def test_random_weights_are_a_function_of_the_seed_in_every_precision(backbone_directory):
    def load(seed, dtype=torch.float32):
        return load_backbone(str(backbone_directory), dtype, random_weights=seed)

    first, half, own = load(0), load(0, torch.bfloat16), load_backbone(str(backbone_directory))
    assert first.fingerprint == load(0).fingerprint == half.fingerprint
    assert len({first.fingerprint, load(1).fingerprint, own.fingerprint}) == 3
    assert half.model.dtype == torch.bfloat16
    assert {b.dtype for b in half.model.buffers()} == {b.dtype for b in own.model.buffers()}
    shapes = [{name: p.shape for name, p in one.model.named_parameters()} for one in (first, own)]
    assert shapes[0] == shapes[1]
    before = torch.random.get_rng_state()
    load(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_run_on_random_weights_says_so_and_its_prompts_are_asked_on_them(options, tmp_path):
    run = tmp_path / "run"
    results = probe(options(run, control="random-weights", seed=3))
    assert results["backbone"]["control"] == "random-weights"
    assert "control" not in probe(options(tmp_path / "own", methods=("manual",)))["backbone"]
    assert {prompt.random_weights for prompt in load_prompts(run).values()} == {"3"}
    for method in METHODS:
        found = evaluate(EvaluateConfig(prompts=run, method=method))
        for relation, row in found["relations"].items():
            assert row["mrr"] == pytest.approx(results["methods"][method]["relations"][relation]["mrr"], rel=1e-4)
    assert len(ask(AskConfig("Norway", prompts=run, relation="P36"))) == 5
    assert "with random weights knows" in (run / "report.html").read_text()


def test_random_weights_are_fine_tuned_too(options, tmp_path):
    tuned = [
        probe(options(tmp_path / str(control), methods=("fine-tuning",), control=control, fine_tuning_rate=1e-9))
        for control in (None, "random-weights")
    ]
    mrr = [run["methods"]["fine-tuning"]["macro"]["mrr"] for run in tuned]
    assert mrr[0] != pytest.approx(mrr[1], rel=1e-3)


def test_random_weights_cannot_be_partitioned(tmp_path):
    with pytest.raises(UsageError, match=r"--control random-weights: .* leave one of them out"):
        ProbeConfig(control="random-weights", deepspeed=tmp_path / "zero3.json")
    with pytest.raises(MegapromptError, match="leave --deepspeed out"):
        load_backbone("any", deepspeed={}, random_weights=0)


def test_an_interrupted_control_goes_on_with_the_same_weights(options, tmp_path):
    config = options(tmp_path / "run", control="random-weights", methods=("manual", "p-tuning"))
    whole = probe(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    del results["methods"]["p-tuning"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"complete": False}))
    resumed = probe(options(tmp_path / "run", control="random-weights", methods=("manual", "p-tuning"), resume=True))
    assert resumed["methods"] == whole["methods"]
