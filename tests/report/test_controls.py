"""The same prompts on other facts, and the same learning on random weights: beside the scores, and in words."""

import csv
import json
from pathlib import Path

import pytest

from megaprompt.report.controls import control_sections
from megaprompt.report.html import write_joint_report, write_report
from megaprompt.report.table2_formats import as_csv
from tests.report.made_up import Page, change, joined, printed, shown

SCORES = {
    "majority": {"P36": 0.1, "P30": 0.3},
    "manual": {"P36": 0.2, "P30": 0.4},
    "best": {"P36": 0.6, "P30": 0.8},
}


def evaluate(run: Path, name: str, scores: dict, vocabulary: str = "all tokens") -> None:
    """Write scores of a run's prompts on other facts, whose most frequent answer is right about 5 %."""
    methods = {
        method: {"relations": {r: {"facts": 20, "most_frequent": 0.05, "p_at_1": p} for r, p in of_method.items()}}
        for method, of_method in scores.items()
    }
    (run / "evaluations").mkdir(exist_ok=True)
    text = json.dumps({"data": name, "split": "test", "vocabulary": vocabulary, "methods": methods})
    (run / "evaluations" / f"{name}.json").write_text(text)


@pytest.fixture
def make_control(make_run):
    """Write a run on random weights, which are others with every seed."""

    def make(name: str, scores: dict, **options) -> Path:
        run = make_run(name, scores, control="random-weights", **options)
        change(run, lambda r: r["backbone"].update(control="random-weights", fingerprint=f"random {name}"))
        return run

    return make


def test_the_page_of_a_run_has_its_prompts_on_other_facts(make_run):
    run = make_run("a", SCORES)
    evaluate(run, "wiki_uni", {"manual": {"P36": 0.1, "P30": 0.2}, "best": {"P36": 0.2, "P30": 0.4}})
    page = Page(write_report(run))
    tables = [{row[0][0]: [text for text, _ in row[1:]] for row in table} for table in page.tables]
    (table,) = [each for each in tables if each.get("method") == ["on test", "on wiki_uni"]]
    assert table == {"method": ["on test", "on wiki_uni"], "manual": ["30.0", "15.0"], "best": ["70.0", "30.0"]}
    prose = page.prose()
    assert "The gain of best over manual prompts is +40.0 points, from 30.0 to 70.0 % (over 2 relations)." in prose
    assert "most frequent in train scores 20.0 %" in prose
    assert (
        "On wiki_uni, where always giving the most frequent answer would score 5.0 %, the same prompts score 30.0 % "
        "and 15.0 % (over 2 relations): of +40.0 points, +15.0 remain." in prose
    )
    assert any(each.get("P36") == ["20.0", "10.0", "60.0", "20.0"] for each in tables)
    assert "random" not in prose


def test_only_relations_with_all_scores_are_compared(make_run):
    run = make_run("a", SCORES)
    evaluate(run, "wiki_uni", {"manual": {"P30": 0.2}, "best": {"P36": 0.2, "P30": 0.4}}, "other.txt")
    (section,) = control_sections(joined(run))
    (table,) = section.tables
    assert table.macro == {"manual": ("40.0", "20.0"), "best": ("80.0", "40.0")}
    assert "On wiki_uni, among other.txt, where" in section.sentences[-1]
    assert "(over 1 relation): of +40.0 points, +20.0 remain." in section.sentences[-1]


def test_random_weights_stand_beside_the_model_and_make_no_row(make_run, make_control, tmp_path):
    run = make_run("a", SCORES | {"in-context": {"P36": 0.5, "P30": 0.5}})
    control = make_control("b", {method: {"P36": 0.1} for method in SCORES})
    table = joined(run, control)
    assert list(shown(table)) == ["tiny"]
    assert list(table.relations) == ["P36", "P30"]  # the control's fewer relations are not the table's
    page = Page(write_joint_report(table, tmp_path / "out"))
    prose = page.prose()
    assert "with random weights, which know nothing, reaches 10.0 % where best has 60.0 % (over 1 relation)" in prose
    tables = [{row[0][0]: [text for text, _ in row[1:]] for row in each} for each in page.tables]
    assert {"method": ["on test", "random weights"], "majority": ["10.0", "10.0"], "manual": ["20.0", "10.0"],
            "best": ["60.0", "10.0"]} in tables  # fmt: skip
    assert str(control) in prose
    rows = {(row["method"], row["source"], row["average"]): row for row in csv.DictReader(as_csv(table).splitlines())}
    assert float(rows["best", "measured", "macro"]["p_at_1"]) == pytest.approx(70)
    assert float(rows["best", "measured random weights", "macro"]["p_at_1"]) == pytest.approx(10)
    assert rows["best", "measured random weights", "macro"]["relations"] == "1"


def test_seeds_of_controls_are_averaged(make_run, make_control):
    runs = [make_run(f"s{i}", SCORES, seed=i) for i in (0, 1)]
    for run, p in zip(runs, (0.2, 0.4), strict=True):
        same = dict.fromkeys(("P36", "P30"), p)
        evaluate(run, "uni", {"manual": dict.fromkeys(("P36", "P30"), 0.1), "best": same})
    controls = [make_control(f"c{i}", {"best": {"P36": p, "P30": p}}, seed=i) for i, p in enumerate((0.1, 0.3))]
    (row,) = joined(*runs, *controls).rows
    assert row.controls["on uni"]["best"].mean() == pytest.approx((30.0, 200**0.5))
    assert row.controls["random weights"]["best"].mean() == pytest.approx((20.0, 200**0.5))
    (section,) = control_sections(joined(*runs, *controls))
    assert section.tables[0].macro["best"] == ("70.0", "30.0 ± 14.1")


def test_a_control_of_another_setup_makes_a_row(make_run, make_control):
    run = make_run("a", SCORES)
    other = make_control("b", {"best": {"P36": 0.1, "P30": 0.1}}, encoder="mlp")
    names = [row.name for row in joined(run, other).rows]
    assert names == ["tiny", "tiny with random weights"]
    assert control_sections(joined(run, other)) == []


def test_a_control_alone_says_what_it_is(make_control):
    control = make_control("b", SCORES)
    assert "What tiny with random weights knows of facts" in Page(write_report(control)).prose()
    assert "tiny with random weights" in printed(json.loads((control / "results.json").read_text()))
    assert list(shown(joined(control))) == ["tiny with random weights"]
