"""The page of several runs, and the command that makes it."""

import re

from megaprompt.cli import main
from megaprompt.report.html import write_joint_report, write_report
from tests.report.made_up import Page, change, joined, markdown_rows


def test_runs_without_any_score_make_a_page(make_run, tmp_path):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]
    for run in runs:
        change(run, lambda results: results.update(methods={}))
    page = Page(write_joint_report(joined(*runs), tmp_path / "out"))
    assert page.rows(0)["a"] == []
    assert not re.search(r"\b(None|nan|Undefined)\b", page.prose())
    Page(write_report(runs[0]))


def test_the_page_of_several_runs(answered, make_run, tmp_path, capsys):
    other = make_run("b", {"manual": {"P36": 0.1, "P30": 0.2}}, "gpt")
    out = tmp_path / "out"
    assert main(["report", str(answered), str(other), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out / "report.html")
    assert "p-tuning" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "types.png", "relations.png", "table.md", "table.tex", "table.csv"}
    page = Page(out / "report.html")
    assert page.rows(0) == {
        "backbone": ["MP", "P-tuning"], "tiny": ["18.8", "81.2 (+62.5)"], "gpt": ["15.0", "–"]
    }  # fmt: skip
    assert page.rows(2)["P36"] == ["p36", "N-1", "40", "37.5", "62.5"]
    prose = page.prose()
    assert "What tiny and gpt know of facts" in prose
    assert page.rows(6)["p-tuning − manual"][::3] == ["+62.5", "9"]
    assert not re.search(r"https?:|url\(|@import|\b(None|nan|Undefined)\b", page.text)
    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}
    assert not (answered / "report.html").exists()


def test_one_run_has_the_tables_and_comparison_too(answered, capsys, tmp_path):
    assert main(["report", str(answered)]) == 0
    assert capsys.readouterr().out.strip() == str(answered / "report.html")
    assert ["tiny", "18.8", "**81.2 (+62.5)**"] in markdown_rows((answered / "table.md").read_text())
    assert (answered / "table.tex").exists()
    assert (answered / "table.csv").exists()
    page = Page(answered / "report.html")
    assert page.rows(2) == {
        "": ["p-tuning is right", "is wrong"],
        "manual is right": ["2", "1"],
        "manual is wrong": ["4", "2"],
    }
    assert page.rows(4)["p-tuning − manual"][::3] == ["+62.5", "9"]
    assert main(["report", str(answered), "--out", str(tmp_path / "else")]) == 0
    assert (tmp_path / "else" / "report.html").read_text() == (answered / "report.html").read_text()


def test_wrong_use_of_report_is_said(make_run, tmp_path, capsys):
    runs = [str(make_run(name, {"manual": {"P36": 0.2}}, name)) for name in "ab"]
    for args, message in (
        ([], "give the directory of a run"),
        ([str(tmp_path / "none")], "holds no results.json"),
        ([*runs, str(tmp_path / "none")], "holds no results.json"),
        ([*runs, "--out", runs[0]], "holds a run with a report of its own"),
    ):
        assert main(["report", *args]) == 2, args
        assert message in capsys.readouterr().err


def test_every_relation_has_its_spread_over_seeds(make_run, tmp_path):
    runs = [
        make_run(f"s{i}", {"manual": {"P36": 0.25, "P30": 0.5}, "best": {"P36": p, "P30": 0.5}}, seed=i)
        for i, p in enumerate((0.5, 0.6, 0.4))
    ]
    page = Page(write_joint_report(joined(*runs), tmp_path / "out"))
    assert page.rows(2)["P36"][-2:] == ["25.0", "50.0\u00a0±\u00a010.0"]
    assert page.rows(2)["P30"][-2:] == ["50.0", "50.0"]
