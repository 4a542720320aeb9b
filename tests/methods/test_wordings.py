"""The whole job on BEAR's layout: each wording, their mean, the best on dev, and what is trained."""

import json
import statistics

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.methods.wordings import MEAN
from megaprompt.report.runs import read_run
from megaprompt.report.table2 import join
from megaprompt.report.table2_formats import legend
from megaprompt.report.wordings import over_wordings
from megaprompt.run.job import probe
from tests.schemas import check_run
from tests.tasks.bear_data import CAPITALS, WORDINGS, write_bear


@pytest.fixture
def run(backbone_directory, tmp_path):
    data = write_bear(tmp_path / "bear")

    def run(folder="", **options):
        out = tmp_path / f"run{folder}"
        options = {"methods": ("manual",), **options}
        config = ProbeConfig(backbone=str(backbone_directory), data=str(data / folder), out=out, **options)
        return probe(config), out

    return run


def test_each_wording_their_mean_and_the_best_on_dev(run):
    results, out = run(bos="always")
    check_run(out)
    assert results["data"]["answers"] == "candidates"
    assert results["data"]["vocabulary"] is None
    methods = results["methods"]
    each = ["manual", "wording 2", "wording 3"]
    assert list(methods) == ["majority", *each, "best-manual", MEAN]
    for name, wordings in WORDINGS.items():
        rows = [methods[column]["relations"][name] for column in each]
        assert [row["template"] for row in rows] == wordings
        scores = [row["mrr"] for row in rows]
        mean = methods[MEAN]["relations"][name]
        assert mean["mrr"] == pytest.approx(statistics.fmean(scores))
        assert mean["mrr_sem"] == pytest.approx(statistics.stdev(scores) / 3**0.5)
        best = methods["best-manual"]["relations"][name]
        assert best["template"] in wordings
        assert best["dev_p_at_1"] == next(row["dev_p_at_1"] for row in rows if row["template"] == best["template"])
        assert best["dev"]["mrr"] == max(row["dev"]["mrr"] for row in rows), "by which few dev facts choose"
        assert best["tried"][0]["template"] == best["template"]
        assert {each["test_p_at_1"] for each in best["tried"]} == {row["p_at_1"] for row in rows}
    micro = [methods[column]["micro"]["p_at_1"] for column in each]
    assert methods[MEAN]["micro"]["p_at_1"] == pytest.approx(statistics.fmean(micro))
    entry = json.loads((out / "leaderboard_entry.json").read_text())
    assert entry["accuracy"]["mean"] == pytest.approx(statistics.fmean(micro))
    assert entry["accuracy"]["sem"] == pytest.approx(statistics.stdev(micro) / 3**0.5)
    assert (entry["model_type"], entry["num_params"]) == ("CLM", results["backbone"]["parameters"])
    page = (out / "report.html").read_text()
    assert "3 manual wordings: P@1" in page
    assert "In 2 of 2 relations, every answer of test is right equally often" in page
    assert "can be asked by candidates" in page
    usable = results["data"]["relations"]["P36"]["usable"]
    assert usable["token"] < usable["candidates"] == len(CAPITALS)
    lines = [json.loads(line) for line in (out / "predictions" / "P36.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {*each, "best-manual"}
    assert len(lines) == 4 * len(CAPITALS)


def test_only_the_whole_of_the_data_asked_as_on_the_leaderboard_makes_an_entry(run):
    for i, options in enumerate(
        ({}, {"bos": "always", "limit_facts": 2}, {"bos": "always", "control": "random-weights"})
    ):
        _, out = run(relations=("P36",), **options)
        assert not (out / "leaderboard_entry.json").exists()
        out.rename(out.with_name(f"before {i}"))


def test_the_manual_wording_is_kept(run):
    _, out = run()
    assert {path.stem for path in (out / "prompts" / "manual").iterdir()} == set(WORDINGS)


def test_more_wordings_are_tried_beside_those_of_the_data(run, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"relation": "P30", "template": "[X] belongs to [Y]."}\n')
    results, _ = run(wordings=more, relations=("P30",), methods=("best-manual",))
    tried = results["methods"]["best-manual"]["relations"]["P30"]["tried"]
    assert {each["template"] for each in tried} == {*WORDINGS["P30"], "[X] belongs to [Y]."}


@pytest.mark.parametrize("scores", ["all", "rank", "best"])
def test_what_is_scored(run, scores):
    """The same answers with each; ranks and probabilities as far as they are known."""
    results, out = run(scores=scores)
    assert list(results["metrics"]) == (["p_at_1"] if scores == "best" else ["p_at_1", "p_at_10", "mrr"])
    lines = [json.loads(line) for line in (out / "predictions" / "P36.jsonl").read_text().splitlines()]
    assert scores == "best" or all(line["rank"] for line in lines)
    assert scores != "all" or all(line["probability"] is not None for line in lines)
    assert all(line["top"] for line in lines)
    right = [line for line in lines if line["method"] == "manual"]
    score = results["methods"]["manual"]["relations"]["P36"]["p_at_1"]
    assert sum(line["top"][0][0] == line["object"] for line in right) / len(right) == pytest.approx(score)
    assert "P@1" in (out / "report.html").read_text()
    check_run(out)
    assert run(scores=scores, resume=True)[0] == results


def test_without_dev_there_is_no_best(run):
    results, out = run("BEAR")
    mean, error, _ = over_wordings(results)
    told = f"over manual wordings: {results['backbone']['name']} {100 * mean:.1f} ± {100 * error:.1f}"
    assert told in " ".join(legend(join([read_run(out)])))
    assert list(results["methods"]) == ["majority", "manual", "wording 2", "wording 3", MEAN]


def test_one_token_on_request(run):
    results, _ = run("BEAR", answers="token", relations=("P30",))
    assert results["data"]["answers"] == "token"
    assert results["data"]["relations"]["P30"]["facts"]["test"] < 8  # South America is no token
    assert results["data"]["vocabulary"]["name"] == "objects of the data"


@pytest.mark.slow
@pytest.mark.parametrize("learn_by", ["candidates", "answer"])
def test_all_that_is_trained_and_resumed(run, learn_by):
    methods = ("manual", "p-tuning", "autoprompt", "fine-tuning", "manual+fine-tuning")
    few = {"max_epochs": 4, "learning_rate": 0.01, "fine_tuning_rate": 0.003, "autoprompt_steps": 2}
    results, out = run(methods=methods, learn_by=learn_by, **few)
    check_run(out)
    rows = {method: found["relations"]["P30"] for method, found in results["methods"].items()}
    assert set(rows) >= set(methods)
    assert rows["p-tuning"]["template"] == "<3>[X]<3>[Y]."
    assert rows["fine-tuning"]["template"] == "[X] [Y]."
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in log if line.get("method") == "fine-tuning" and line["relation"] == "P30"]
    assert losses[-1] < losses[0]
    assert run(methods=methods, learn_by=learn_by, resume=True, **few)[0] == results
