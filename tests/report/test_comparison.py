"""Two methods on the same items: where each is right, and the interval of their difference."""

import json
import math

import numpy as np
import pytest

from megaprompt.errors import MegapromptError
from megaprompt.report.comparison import bootstrap_interval, difference
from megaprompt.report.predictions import read_answers
from tests.report.made_up import compared, joined, write_predictions


def test_bootstrap_agrees_with_drawing_facts_one_by_one():
    generator = np.random.default_rng(1)
    group = np.repeat(["a", "b", "c"], (30, 200, 7))
    values = generator.choice([-100.0, 0.0, 50.0, 100.0], size=len(group))
    each = np.arange(len(values))
    low, high = bootstrap_interval(values, group, each, samples=20_000, seed=0)
    means = np.zeros(20_000)
    for name in "abc":
        mine = values[group == name]
        means += mine[generator.integers(len(mine), size=(20_000, len(mine)))].mean(1) / 3
    expected = np.percentile(means, (2.5, 97.5))
    assert [low, high] == pytest.approx(expected, abs=0.05 * (high - low))
    assert (low, high) == bootstrap_interval(values, group, each, samples=20_000, seed=0)
    assert (low, high) != bootstrap_interval(values, group, each, samples=20_000, seed=1)


def test_bootstrap_draws_within_relations_and_in_pairs():
    group = np.repeat(["a", "b"], (10, 1000))
    constant = np.where(group == "a", 100.0, 0.0)  # differs between relations, not within them
    each = np.arange(1010)
    assert bootstrap_interval(constant, group, each, samples=100, seed=0) == (50.0, 50.0)  # macro: both count the same
    values, group, each = np.resize([100.0, -100.0], 400), np.repeat("a", 400), np.arange(400)
    low, high = bootstrap_interval(values, group, each, samples=10_000, seed=0)
    assert [low, high] == pytest.approx([-2 * 100 / 20, 2 * 100 / 20], abs=0.6)  # 1.96 standard errors


def test_bootstrap_draws_whole_subjects():
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 9, size=60)
    subject = np.repeat(np.arange(60), sizes)
    values = np.repeat(generator.choice([-100.0, 0.0, 100.0], size=60), sizes)
    group = np.repeat("a", len(values))
    low, high = bootstrap_interval(values, group, subject, samples=10_000, seed=0)
    means = []
    for _ in range(10_000):
        drawn = generator.integers(60, size=60)
        means.append(np.concatenate([values[subject == one] for one in drawn]).mean())
    assert [low, high] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.05 * (high - low))
    alone = bootstrap_interval(values, group, np.arange(len(values)), samples=10_000, seed=0)
    assert high - low > 1.8 * (alone[1] - alone[0])


def test_facts_of_one_subject_are_one_question(make_run):
    """Ten subjects with four objects each are right or wrong about all: no more evidence than ten facts."""
    wide = make_run("a", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}})
    few = make_run("b", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}})
    right = [1, 1, 1, 2, 2, 1, 2, 1, 1, 2]
    names = [f"s{i}" for i in range(10)]
    write_predictions(few, "P36", {"manual": [2] * 10, "p-tuning": right}, names)
    fourfold = [rank for rank in right for _ in range(4)], [name for name in names for _ in range(4)]
    write_predictions(wide, "P36", {"manual": [2] * 40, "p-tuning": fourfold[0]}, fourfold[1])
    found = [difference(read_answers(joined(run).rows[0], ["P36"]), "p-tuning", "manual") for run in (wide, few)]
    assert all(found)
    assert (found[0].points, found[0].low, found[0].high) == (found[1].points, found[1].low, found[1].high)
    assert (found[0].items, found[1].items) == (40, 10)


def test_which_facts_are_known(answered):
    table = joined(answered)
    (found,) = compared(table)
    assert found.knowledge is not None
    assert (found.knowledge.first, found.knowledge.second) == ("manual", "p-tuning")
    assert found.knowledge.counts == {(True, True): 2, (True, False): 1, (False, True): 4, (False, False): 2}
    only = found.knowledge.examples[False, True]
    assert [(each.label, each.input) for each in only] == [("p30", "s0"), ("p36", "s2"), ("p36", "s3"), ("p36", "s4")]
    assert [answer.text for answer in only[0].answers] == ["wrong", "o"]
    (gap,) = found.differences
    assert (gap.method, gap.other, gap.relations, gap.items) == ("p-tuning", "manual", 2, 9)
    assert gap.points == pytest.approx((100 * (3 - 1) / 8 + 100) / 2)
    assert gap.low < gap.points < gap.high


def test_facts_with_the_same_words_are_kept_apart(make_run):
    run = make_run("a", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}})
    write_predictions(run, "P36", {"manual": [1, 2], "p-tuning": [2, 1]}, ["same", "same"])
    table = joined(run)
    (found,) = compared(table)
    assert found.knowledge is not None
    assert found.knowledge.counts == {(True, True): 0, (True, False): 1, (False, True): 1, (False, False): 0}


def test_only_facts_that_both_were_asked_are_compared(make_run):
    run = make_run("a", {"manual": {"P36": 0.5}})
    write_predictions(run, "P36", {"manual": [1, 2, 1]})
    other = make_run("b", {"p-tuning": {"P36": 0.5}}, methods=("p-tuning",))
    write_predictions(other, "P36", {"p-tuning": [1, 1]}, ["s1", "elsewhere"])
    table = joined(run, other)
    asked = read_answers(table.rows[0], ["P36"])
    found = difference(asked, "p-tuning", "manual")
    assert found is not None
    assert (found.points, found.items) == (100.0, 1)
    write_predictions(other, "P36", {"p-tuning": [1]}, ["elsewhere"])
    assert difference(read_answers(table.rows[0], ["P36"]), "p-tuning", "manual") is None
    assert compared(table) == []


def test_a_fact_counts_as_the_share_of_the_seeds_that_know_it(make_run):
    runs = [make_run(f"s{i}", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}}, seed=i) for i in range(4)]
    for i, run in enumerate(runs):
        write_predictions(run, "P36", {"manual": [2, 1], "p-tuning": [1 if i < 3 else 2, 1]})
    asked = read_answers(joined(*runs).rows[0], ["P36"])
    assert asked.right["p-tuning"].tolist() == [0.75, 1.0]
    gap = difference(asked, "p-tuning", "manual")
    assert gap is not None
    assert gap.points == 37.5


def test_without_manual_prompts_the_two_best_are_compared(make_run):
    scores = {"lpaqa": {"P36": 0.5}, "autoprompt": {"P36": 1.0}, "mined": {"P36": 0.0}, "majority": {"P36": 0.9}}
    run = make_run("a", scores)
    write_predictions(run, "P36", {"lpaqa": [1, 2], "autoprompt": [1, 1], "mined": [2, 2]})
    table = joined(run)
    (found,) = compared(table)
    assert found.knowledge is not None
    assert (found.knowledge.first, found.knowledge.second) == ("lpaqa", "autoprompt")
    assert [(each.method, each.other) for each in found.differences] == [
        ("autoprompt", "lpaqa"), ("autoprompt", "mined")
    ]  # fmt: skip


def test_damaged_predictions_are_named(answered):
    table = joined(answered)
    for text in ('{"method": "manual"', '{"method": "manual"}\n', "[]\n"):
        (answered / "predictions" / "P36.jsonl").write_text(text)
        with pytest.raises(MegapromptError, match=r"P36\.jsonl: is damaged"):
            compared(table)


def test_line_separators_in_names_end_no_line(make_run):
    run = make_run("a", {"manual": {"P36": 1.0}, "p-tuning": {"P36": 1.0}})
    line = {"subject": "a\u2028b\x85c", "object": "o", "rank": 1, "probability": 1.0, "top": []}
    lines = [json.dumps({"method": method, **line}, ensure_ascii=False) + "\n" for method in ("manual", "p-tuning")]
    (run / "predictions").mkdir()
    (run / "predictions" / "P36.jsonl").write_text("".join(lines), encoding="utf-8")
    table = joined(run)
    (found,) = compared(table)
    assert found.knowledge is not None
    assert found.knowledge.counts[True, True] == 1
    assert math.isnan(found.knowledge.examples[True, True][0].answers[0].probability)
