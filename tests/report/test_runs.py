"""Reading runs: of this version and the one before, damaged ones, and of any kind of question."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from megaprompt.cli import main
from megaprompt.errors import MegapromptError
from megaprompt.report.html import _run_figures, write_report
from megaprompt.report.runs import as_schema_2, read_run
from megaprompt.report.table2_formats import as_csv, latex, markdown
from tests.report.made_up import ACCURACY, Page, change, joined, make_results, markdown_rows, printed, write_run


def test_results_of_another_version_are_refused(make_run):
    run = make_run("a", {"manual": {"P36": 0.2}})
    for schema in ({"schema": 3}, {"format": 2}):
        change(run, lambda results, schema=schema: [results.pop("schema", None), results.update(schema)])
        with pytest.raises(MegapromptError, match="not written by this version"):
            read_run(run)
    (run / "config.yaml").write_text("a: [")
    change(run, lambda results: results.update(format=1))
    with pytest.raises(MegapromptError, match=r"config\.yaml: is damaged"):
        read_run(run)


FORMAT_1 = Path(__file__).parent / "format_1"  # of a small model with random weights


@pytest.fixture
def old_run(tmp_path) -> Path:
    return Path(shutil.copytree(FORMAT_1, tmp_path / "old"))


def test_a_run_of_the_version_before_has_the_present_form():
    assert json.loads((FORMAT_1 / "results.json").read_text())["format"] == 1
    results = read_run(FORMAT_1).results
    assert (results["schema"], results["items"]) == (2, "facts")
    assert "format" not in results
    assert list(results["metrics"].items()) == [("p_at_1", "P@1"), ("p_at_10", "P@10"), ("mrr", "MRR")]
    assert {m["macro"]["relations"] for m in results["methods"].values()} == {2}
    assert as_schema_2(results) == results


def test_a_run_of_the_version_before_has_its_report(old_run, capsys):
    assert main(["report", str(old_run)]) == 0
    page = Page(old_run / "report.html")
    assert page.rows(0)["P36"] == ["p36", "N-1", "13", "7.7", "0.0", "7.7", "+7.7"]
    assert "What tiny knows of data" in page.prose()
    assert page.rows(2)["manual is wrong"] == ["1", "21"]
    assert {path.name for path in old_run.glob("*.png")} == {"scores.png", "learning_curves.png"}
    assert ["tiny", "**31.6**", "0.0", "3.8 (+3.8)"] in markdown_rows((old_run / "table.md").read_text())


def test_runs_of_both_versions_stand_in_one_table(old_run, tmp_path):
    new = Path(shutil.copytree(old_run, tmp_path / "new"))
    (new / "results.json").write_text(json.dumps(read_run(new).results))
    (new / "config.yaml").write_text((new / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert "format" not in json.loads((new / "results.json").read_text())
    (row,) = joined(old_run, new).rows
    assert {method: len(cell.runs) for method, cell in row.cells.items()} == {"majority": 2, "manual": 2, "p-tuning": 2}


# --------------------------------------------------------------------------------------- other kinds of question


@pytest.fixture
def classes(tmp_path) -> Path:
    """Two tasks with three classes, learned and written prompts, in a directory of its own."""
    scores = {
        "majority": {"tweets": 0.4, "reviews": 0.35},
        "manual": {"tweets": 0.5, "reviews": 0.45},
        "p-tuning": {"tweets": 0.75, "reviews": 0.85},
    }
    run = tmp_path / "classes"
    run.mkdir()
    log = [
        {"relation": "tweets", "epoch": epoch, "train_loss": 1 / epoch, "dev_accuracy": 0.2 * epoch, "dev_f1": 0.1}
        | {"best": epoch == 3, "learning_rate": 0.001, "step": 5 * epoch}
        for epoch in (1, 2, 3)
    ]
    log.append({"relation": "reviews", "diverged": "the loss is nan", "step": 7})
    write_run(run, make_results(scores, ACCURACY, "examples"), log)
    (run / "predictions").mkdir()
    for name in ("tweets", "reviews"):
        lines = [
            {"schema": 2, "method": method, "input": f"text {i} of {name}, " + "and so on, " * 40, "gold": "neutral"}
            | {"answer": "neutral" if right else "bad", "right": right}
            | ({"probability": 0.9 - 0.1 * i} if method == "p-tuning" else {})
            for method, answers in (("manual", (False, True, False)), ("p-tuning", (True, True, False)))
            for i, right in enumerate(answers)
        ]
        (run / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_page_of_classes_speaks_of_accuracy_and_examples(classes):
    page = Page(write_report(classes))
    prose = page.prose()
    assert not re.search(r"P@1|MRR|\bfacts?\b|\brelations?\b|subject|object|vocabulary|None|nan|Undefined", prose)
    assert "tiny on examples" in prose
    assert "Over 2 tasks, the mean accuracy of p-tuning on test is 80.0 %: 32.5 points more than manual" in prose
    assert page.rows(0)["task"] == ["type", "test examples", "majority", "manual", "p-tuning", "gain"]
    assert page.rows(0)["tweets"] == ["N-1", "40", "40.0", "50.0", "75.0", "+25.0"]
    assert [text for text, _ in page.tables[1][0]][2:-1] == [
        "accuracy, %", "macro F1, %", "accuracy on dev, %", "epochs"
    ]  # fmt: skip
    assert [text for text, _ in page.tables[1][2]] == ["p-tuning", "75.0", "87.5", "87.5", "12", "[X] [Y] ."]
    assert page.rows(2) == {
        "": ["p-tuning is right", "is wrong"], "manual is right": ["2", "0"], "manual is wrong": ["2", "2"]
    }  # fmt: skip
    first = page.tables[3][1]
    assert [text for text, _ in first[:2]] == ["p-tuning only", "tweets"]
    assert first[2][0].startswith("text 0 of tweets")
    assert len(first[2][0]) < 250
    assert [text for text, _ in first[3:]] == ["neutral", "bad", "neutral 90.0\u00a0%"]
    assert "Difference in accuracy on the same examples" in prose
    assert page.rows(4)["p-tuning − manual"][::3] == ["+33.3", "6"]


def test_charts_and_tables_of_classes_are_of_accuracy(classes, capsys):
    run = read_run(classes)
    figures = _run_figures(run)
    assert figures["scores"].axes[0].get_xlabel() == "accuracy on test, %"
    curves = figures["learning_curves"]
    assert curves.axes[0].lines[0].get_xydata().tolist() == [[5, 20], [10, 40], [15, pytest.approx(60)]]
    assert curves.legends[0].get_texts()[0].get_text() == "accuracy on dev, % (left)"
    assert "accuracy on test, %: tiny, examples" in printed(run.results)
    table = joined(classes)
    assert markdown(table).startswith("# accuracy on test, %: examples, 2 tasks\n")
    assert "Mean accuracy over examples (micro), \\%" in latex(table)
    (line, *_) = csv.DictReader(as_csv(table).splitlines())
    assert (line["method"], line["accuracy"], line["vocabulary"]) == ("majority", "37.5000", "")


def test_any_metric_may_be_the_score(classes):
    change(classes, lambda results: results.update(metrics=dict(reversed(results["metrics"].items()))))
    page = Page(write_report(classes))
    assert page.rows(0)["tweets"][3:] == ["87.5", "87.5", "+0.0"]
    assert "Difference in share of right answers" in page.prose()  # which says nothing of F1
    assert joined(classes).rows[0].means() == {"manual": 87.5, "p-tuning": 87.5}


def test_runs_with_other_scores_are_not_joined(classes, make_run):
    facts = make_run("facts", {"manual": {"tweets": 0.5}})
    change(facts, lambda results: results["data"].update(name="examples", vocabulary=None))
    with pytest.raises(MegapromptError, match=r"its score is p_at_1 of facts, that of .* is accuracy of examples"):
        joined(classes, facts)
