"""`best` takes what is best on dev, leaves p-tuning as it is, and is exact under interruption."""

import dataclasses
import json

import pytest
import torch

from megaprompt.config import ProbeConfig
from megaprompt.distributed.world import World
from megaprompt.engine import trainer as trainer_module
from megaprompt.engine.trainer import Hooks, Interrupted
from megaprompt.methods.candidates import folds_of, rungs_of
from megaprompt.methods.p_tuning import UNTRAINED
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import RECIPES, Recipe
from megaprompt.run.job import probe
from megaprompt.run.saved_prompts import load_prompts
from megaprompt.tasks.task import Example, Task
from tests.conftest import objective_of
from tests.engine.test_trainer import training_set
from tests.schemas import check_run

RECIPE = Recipe(0.01, 0.0, 1.0, batch_size=4, max_epochs=100, patience=100, max_steps=8, dev_every=2)


def contest(backbone, names, **options):
    objective = objective_of(backbone)
    data = [
        dataclasses.replace(
            training_set(backbone, relation, objective),
            candidate=name,
            stays=name == "",
            recipe=dataclasses.replace(RECIPE, learning_rate=rate),
        )
        for relation in ("P36", "P30")
        for name, rate in names.items()
    ]
    return trainer_module.Trainer(backbone, data, RECIPE, size=PassSize(), world=World(), **options)


CANDIDATES = {"": 1e-3, "slow": 1e-5, "fast": 0.02, "wild": 0.3}


def test_the_weaker_half_is_dropped_and_the_others_are_as_they_would_be_alone(make_backbone):
    backbone, lines = make_backbone("llama"), []
    found = contest(backbone, CANDIDATES, rungs={2: 2, 4: 1}).train(Hooks(log=lines.append))
    alone = contest(backbone, {"": 1e-3}).train(Hooks())
    for relation in ("P36", "P30"):
        torch.testing.assert_close(found[relation].kept.vectors, alone[relation].kept.vectors, rtol=1e-10, atol=1e-12)
        assert found[relation].dropped is None  # it stays
        others = {name: found[f"{relation}.{name}"] for name in CANDIDATES if name}
        assert sum(one.dropped is None for one in others.values()) <= 1
        dev = {name: [x for x in lines if x["relation"] == relation and x.get("candidate", "") == name and "epoch" in x]
               for name in CANDIDATES}  # fmt: skip
        after = {name: max((x["dev_mrr"], x["dev_p_at_1"]) for x in dev[name] if x["step"] == 2) for name in CANDIDATES}
        first_out = {name for name, one in others.items() if one.dropped == 2}
        kept = set(CANDIDATES) - first_out
        assert len(first_out) == 2 - (sum(after[name] > after[""] for name in others) >= 2)
        assert all(after[out] <= after[stayed] for out in first_out for stayed in kept - {""})
        assert all(len(dev[name]) == 1 for name in first_out)
    dropped = [(line["relation"], line["candidate"]) for line in lines if line.get("dropped")]
    assert len(dropped) == len(set(dropped)) == sum(one.dropped is not None for one in found.values())


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_halving_resumes_exactly(make_backbone, stop_after):
    backbone, options = make_backbone("gpt2", torch.float32), {"rungs": {2: 2, 4: 1}}
    whole = contest(backbone, CANDIDATES, **options).train(Hooks())
    first = contest(backbone, CANDIDATES, **options)
    with pytest.raises(Interrupted):
        first.train(Hooks(should_stop=lambda: first.step == stop_after))
    second = contest(backbone, CANDIDATES, **options)
    second.restore(json.loads(json.dumps(first.shared_state())), first.states().get)
    resumed = second.train(Hooks())
    for name, one in whole.items():
        assert torch.equal(one.kept.vectors, resumed[name].kept.vectors)
        assert (one.dev, one.dropped, one.epochs) == (resumed[name].dev, resumed[name].dropped, resumed[name].epochs)


def test_rungs():
    fast = RECIPES["fast"]
    assert list(rungs_of(fast, 4).values()) == [2, 1, 1]
    assert all(step % fast.dev_every == 0 and step < fast.max_steps for step in rungs_of(fast, 4))
    assert rungs_of(RECIPES["paper"], 4) == {}


@pytest.fixture
def options(backbone_directory, data_directory):
    options = {"backbone": str(backbone_directory), "data": str(data_directory), "max_steps": 8, "learning_rate": 0.01}
    return lambda out, **more: ProbeConfig(**{**options, "out": out, **more})


def test_what_is_best_on_dev_is_chosen(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",)))
    methods = check_run(tmp_path / "run")["methods"]
    assert methods == results["methods"]
    assert list(methods) == ["majority", "manual", "best-manual", "in-context", "p-tuning", "best"]
    alone = probe(options(tmp_path / "alone", methods=("p-tuning",)))["methods"]["p-tuning"]
    for relation, row in methods["best"]["relations"].items():
        tried = {each["name"]: each for each in row["tried"]}
        assert set(tried) >= {"manual", "in-context", "paper", "anchors"}
        assert any(name.startswith("anchors-behind-") for name in tried)
        few_facts = {name: (each["mrr"], each["p_at_1"]) for name, each in tried.items()}
        assert few_facts[row["chosen"]][0] == max(few_facts.values())[0]
        untrained = max(few_facts[name][0] for name in UNTRAINED)
        assert row["chosen"] in UNTRAINED or few_facts[row["chosen"]][0] > untrained  # else it is not worth learning
        column = row["chosen"] if row["chosen"] in methods else "p-tuning" if row["chosen"] == "paper" else None
        if column is not None:
            assert row["p_at_1"] == methods[column]["relations"][relation]["p_at_1"]
        learned = methods["p-tuning"]["relations"][relation]
        for metric in ("p_at_1", "mrr", "dev_p_at_1", "epochs"):
            assert learned[metric] == pytest.approx(alone["relations"][relation][metric], rel=1e-4)
    prompts = load_prompts(tmp_path / "run")
    assert {prompt.method for prompt in prompts.values()} == {"best"}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {line.get("candidate", "paper") for line in log} >= {"paper", "anchors"}
    assert "in-context" in (tmp_path / "run" / "report.html").read_text()


def test_where_dev_is_small_candidates_are_compared_on_all_of_train_and_dev(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",)))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for relation, row in results["methods"]["best"]["relations"].items():
        facts = results["data"]["relations"][relation]["facts"]
        for tried in row["tried"]:
            behind = tried["name"].partition("-behind-")[2]
            shown = int(behind or 0)
            if tried["name"] == "in-context":
                shown = len(results["methods"]["in-context"]["relations"][relation]["shown"])
            if relation == "P30":  # too few to be divided
                assert tried["dev_examples"] == facts["dev"]
                continue
            assert tried["dev_examples"] == facts["train"] + facts["dev"] - shown
            name = "" if tried["name"] == "paper" else tried["name"]
            folds = [name, *(f"{tried['name']}-fold-{k}" for k in (1, 2, 3))]
            lines = [line for line in log if line["relation"] == relation and line.get("best")]
            best = [[x["dev_p_at_1"] for x in lines if x.get("candidate", "") == each] for each in folds]
            if any(best):
                left = facts["train"] - shown
                sizes = [facts["dev"], *(len(range(k, left, 3)) for k in range(3))]
                together = sum(size * scores[-1] for size, scores in zip(sizes, best, strict=True)) / sum(sizes)
                assert tried["p_at_1"] == pytest.approx(together)


def test_folds_hold_every_example_out_once(make_backbone):
    backbone = make_backbone("llama")
    train, dev, test = (
        [Example({"X": f"{split} {i}"}, "", i) for i in range(20)] for split in ("train", "dev", "test")
    )
    task = Task("P36", objective_of(backbone), backbone.text_encoder(), {"train": train, "dev": dev, "test": test})
    folds, left = folds_of(task, (1, 4)), [example for i, example in enumerate(train) if i not in (1, 4)]
    assert sorted(each.gold for fold in folds for each in fold.examples["dev"]) == [example.gold for example in left]
    for fold in folds:
        learned = {example.fields["X"] for example in fold.examples["train"]}
        held_out = {example.fields["X"] for example in fold.examples["dev"]}
        assert learned | held_out == {example.fields["X"] for example in (*left, *dev)}
        assert not learned & held_out
        assert fold.examples["test"] == test
    assert folds_of(dataclasses.replace(task, examples={**task.examples, "dev": dev * 4}), ()) == []


def test_candidates_come_with_a_lower_learning_rate_too(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",), candidates=8, relations=("P36",)))
    tried = [each["name"] for each in results["methods"]["best"]["relations"]["P36"]["tried"]][3:]
    behind = len(results["methods"]["in-context"]["relations"]["P36"]["shown"]) or 4
    starts = ["paper", f"anchors-behind-{behind}", f"paper-behind-{behind}", "anchors"]
    assert len(tried) == 8
    assert [name.removesuffix("-slower") for name in tried] == [*starts, *starts] or "behind" in "".join(tried)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = {line.get("candidate", "paper"): line["learning_rate"] for line in log if "learning_rate" in line}
    assert rates["paper-slower"] == pytest.approx(0.3 * rates["paper"])


def test_only_the_papers_candidate(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",), candidates=1))
    for row in results["methods"]["best"]["relations"].values():
        assert {each["name"] for each in row["tried"]} == {"manual", "best-manual", "in-context", "paper"}


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 6])
def test_an_interrupted_run_goes_on_to_the_same_choice(options, tmp_path, monkeypatch, stop_after):
    whole = probe(options(tmp_path / "whole", methods=("best",)))
    train = trainer_module.Trainer.train

    def interrupted(self, hooks):
        hooks.should_stop = lambda: self.step == stop_after
        return train(self, hooks)

    monkeypatch.setattr(trainer_module.Trainer, "train", interrupted)
    with pytest.raises(Interrupted):
        probe(options(tmp_path / "broken", methods=("best",)))
    monkeypatch.setattr(trainer_module.Trainer, "train", train)
    resumed = probe(options(tmp_path / "broken", methods=("best",), resume=True))
    assert resumed["methods"] == whole["methods"]


def test_the_log_has_every_choice_once(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",)))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = {(line["method"], line["relation"]): line for line in log if "tried" in line}
    assert len(found) == sum("tried" in line for line in log) == 3 * 2
    for (method, relation), line in found.items():
        row = results["methods"][method]["relations"][relation]
        assert line["tried"] == row["tried"]
        assert line["chosen"] == row.get("chosen", row["tried"][0])
