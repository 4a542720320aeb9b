"""AutoPrompt: the first-order estimate, the search, and the job around it."""

import itertools
import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from megaprompt.config import ProbeConfig
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, Workplace
from megaprompt.engine.trainer import Hooks, Interrupted
from megaprompt.methods.autoprompt import Search, candidates_of, filled, losses, promising, search, text_of
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template
from megaprompt.run.directory import RunDirectory
from megaprompt.run.job import probe
from tests.backbone.test_masked import small_model, word_tokenizer
from tests.conftest import PAIRS, TEMPLATES, instances_of, objective_of, plain_logits, run_cli
from tests.distributed.test_distributed import CONFIGS, torchrun

TEMPLATE = Template.parse("[X]<3>[Y]")


@pytest.fixture
def task(make_backbone):
    """P36 on a small Llama in double precision."""
    backbone = make_backbone("llama")
    facts, objective = instances_of(backbone, TEMPLATE, PAIRS["P36"]), objective_of(backbone)
    at = Workplace.shared(backbone, PassSize(64, 128), World(), objective)
    return at, TrainingSet("P36", objective, 3, facts, facts)


def asked(data, tokens=None) -> Questions:
    return Questions(data.train if tokens is None else filled(data.train, tokens), data.objective)


def test_the_estimate_is_the_slope_of_the_loss(task):
    at, data = task
    backbone = at.backbone
    tokens, place = backbone.tokenization.encode([" the capital of"], is_start=False)[0][:3], 1
    gains = promising(at, asked(data), tokens, place)
    table = backbone.model.get_input_embeddings().weight
    present = table[tokens].clone()

    def loss(vectors):
        return losses_of_vectors(backbone, data.train, vectors)

    for other in (5, 77, 300):
        step = torch.zeros_like(present)
        step[place] = 1e-4 * (table[other] - present[place])
        slope = (loss(present + step) - loss(present - step)) / 2e-4
        assert -slope.item() == pytest.approx((gains[other] - gains[tokens[place]]).item(), rel=1e-4)


@torch.no_grad()
def losses_of_vectors(backbone, instances, vectors):
    queries, gold = [one.queries[0] for one in instances], torch.tensor([one.gold for one in instances])
    return cross_entropy(plain_logits(backbone, queries, vectors), gold)


def test_candidates_are_tried_as_what_they_are(task):
    at, data = task
    choices = [[3, 4, 5], [3, 99, 5], [3, 4, 5]]
    found = losses(at, [asked(data, choice) for choice in choices])
    table = at.backbone.model.get_input_embeddings().weight
    for choice, loss in zip(choices, found, strict=True):
        assert loss.item() == pytest.approx(losses_of_vectors(at.backbone, data.train, table[choice]).item(), rel=1e-9)


def run(at, data, steps, seed=0, should_stop=lambda: False):
    lines = []
    hooks = Hooks(log=lines.append, should_stop=should_stop)
    settings = Search(steps=steps, candidates=8, batch_size=len(data.train), steps_per_dev=5)
    golds = [one.gold for one in data.train]
    return search(at, data, settings, answers_of_train=golds, seed=seed, hooks=hooks), lines


def test_the_loss_falls_and_the_best_tokens_on_dev_are_kept(task):
    at, data = task
    found, lines = run(at, data, 30)
    every = [line["loss"] for line in lines]  # of all facts here, so that it never rises
    assert every == sorted(every, reverse=True)
    start = at.backbone.tokenization.encode([" the"], is_start=False)[0][:1] * 3
    (before,) = losses(at, [asked(data, start)]).tolist()
    assert every[-1] < before - 0.1
    best = max(lines, key=lambda line: (line["dev_p_at_1"], line["dev_mrr"]))
    assert (found.tokens, found.step) == (best["tokens"], best["step"])
    assert run(at, data, 30)[0] == found
    assert run(at, data, 30, seed=1)[1] != lines


def test_the_prompt_asks_and_does_not_answer(task):
    at, data = task
    backbone = at.backbone
    candidates = candidates_of(backbone, [one.gold for one in data.train])
    words = {
        backbone.tokenization.tokenizer.decode([token]).strip() for token in candidates.nonzero().flatten().tolist()
    }
    assert {"capital", "of", "is"} <= words
    assert not words & {*(o for _, o in PAIRS["P36"]), "<eos>", "", "The", "France"}
    found, _ = run(at, data, 10)
    start = backbone.tokenization.encode([" the"], is_start=False)[0][0]
    assert all(candidates[token] or token == start for token in found.tokens)


def test_prompts_can_be_read_by_people_and_read_again(make_backbone):
    backbone = make_backbone("llama")
    tokens = (
        backbone.tokenization.encode(["vik"], is_start=False)[0]
        + backbone.tokenization.encode([" capital of"], is_start=False)[0]
    )
    template = Template.parse(f"[X]<{len(tokens)}>[Y] .")
    text = text_of(template, tokens, backbone)
    assert text == "[X]vik capital of [Y] ."
    encoder = backbone.text_encoder()
    [asked_alone] = filled(instances_of(backbone, template, [("Peru", "Lima")]), tokens)
    [query] = asked_alone.queries
    assert Template.parse(text).render({"X": "Peru"}, encoder) == query


def test_interruption(task):
    at, data = task
    with pytest.raises(Interrupted, match="which searches P36 from its start"):
        run(at, data, 10, should_stop=itertools.chain([False, False], itertools.repeat(True)).__next__)


# -------------------------------------------------------------------------------------------------------------- the job


@pytest.fixture
def config(backbone_directory, data_directory, tmp_path) -> ProbeConfig:
    return ProbeConfig(
        backbone=str(backbone_directory), data=str(data_directory), methods=("manual", "autoprompt"),
        autoprompt_steps=12, out=tmp_path / "run",
    )  # fmt: skip


def test_the_whole_job(config):
    results = probe(config)
    rows = results["methods"]["autoprompt"]["relations"]
    assert rows["P36"]["p_at_1"] == rows["P36"]["dev_p_at_1"]  # the facts of both splits are the same
    assert len(rows["P36"]["tokens"]) == 5
    lines = [json.loads(line) for line in (config.out / "autoprompt.jsonl").read_text().splitlines()]
    assert {line["relation"]: line["template"] for line in lines} == {n: row["template"] for n, row in rows.items()}
    assert "autoprompt" in (config.out / "report.html").read_text()
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert {line["relation"] for line in log} == {"P36", "P30"}
    assert all(line["method"] == "autoprompt" and line["step"] in (10, 12) for line in log)
    given = replace(config, template="<1>[X]<1> is [Y]", out=config.out.parent / "given")
    assert len(probe(given)["methods"]["autoprompt"]["relations"]["P36"]["tokens"]) == 2


def test_on_a_masked_model(data_directory, tmp_path):
    tokenizer = word_tokenizer([f"{s} {o}" for p in PAIRS.values() for s, o in p] + list(TEMPLATES.values()))
    small_model("bert", len(tokenizer)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    config = ProbeConfig(
        backbone=str(tmp_path / "bert"), data=str(data_directory), methods=("autoprompt",), autoprompt_steps=5,
        out=tmp_path / "run",
    )  # fmt: skip
    row = probe(config)["methods"]["autoprompt"]["relations"]["P36"]
    assert row["template"].startswith("[X] ")
    assert row["template"].endswith(" [Y] .")
    assert len(row["tokens"]) == 5


@pytest.mark.parametrize("methods", [("manual",), ("autoprompt",), ("fine-tuning",)])
def test_a_signal_stops_between_relations_and_the_next_start_goes_on_there(config, methods, tmp_path, monkeypatch):
    config = replace(config, methods=methods, max_epochs=2)
    whole = probe(replace(config, out=tmp_path / "whole"))
    write = RunDirectory.write_predictions

    def write_and_signal(self, name, lines):
        write(self, name, lines)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunDirectory, "write_predictions", write_and_signal)
    _, second = whole["data"]["relations"]
    with pytest.raises(Interrupted, match=f"before {second}; continue with --resume"):
        probe(config)
    done = []
    monkeypatch.setattr(RunDirectory, "write_predictions", lambda self, *a: (done.append(a[0]), write(self, *a)))
    resumed = probe(replace(config, resume=True))
    assert done == [second]
    assert resumed["methods"] == whole["methods"]
    assert "unfinished" not in resumed
    names = ("predictions/P36.jsonl", "predictions/P30.jsonl")
    assert [(config.out / n).read_text() for n in names] == [(tmp_path / "whole" / n).read_text() for n in names]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--deepspeed", CONFIGS / "zero3.json")], ids=["plain", "zero3"])
def test_ranks_find_the_same_tokens(config, tmp_path, more):
    options = ("probe", "--backbone", config.backbone, "--data", config.data, "--methods", "autoprompt")
    options += ("--autoprompt-steps", 3)
    for name, launcher in (("one", {}), ("two", {"launcher": torchrun(2)})):
        done = run_cli(*options, *(more if launcher else ()), "--out", tmp_path / name, **launcher)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["methods"] for name in ("one", "two"))
    assert one == two
