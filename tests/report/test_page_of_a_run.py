"""The page of one run."""

import base64
import hashlib
import html
import json
import re
import struct

import pytest

from megaprompt.errors import MegapromptError
from megaprompt.report.charts import learning_chart
from megaprompt.report.html import _run_figures, write_report
from megaprompt.report.runs import read_run
from tests.report.made_up import (
    P_AT_1,
    Page,
    log_line,
    make_results,
    plain,
    printed,
    printed_rows,
    write_run,
)

METRICS = (*P_AT_1, "dev_p_at_1")


def test_the_page_shows_the_numbers(tmp_path, results):
    page = Page(write_report(write_run(tmp_path, results)))
    scores = page.rows(0)
    assert scores["relation"] == ["label", "type", "test facts", "majority", "manual", "p-tuning", "gain"]
    assert scores["P36"] == ["capital", "N-1", "40", "0.0", "53.8", "50.0", "−3.8"]
    assert scores["P30"] == ["p30", "N-1", "40", "25.0", "50.0", "62.5", "+12.5"]
    assert scores["macro"] == ["mean over relations", "", "80", "12.5", "51.9", "56.3", "+4.4"]
    assert scores["micro"] == ["mean over facts", "", "80", "22.5", "61.9", "66.3", "+4.4"]
    assert list(scores) == ["relation", "P36", "P30", "macro", "micro"]  # one type only: no rows of types
    more = page.tables[1]
    assert [text for text, _ in more[1]] == ["P36", "manual", "53.8", "87.5", "0.875", "87.5", "–", "[X] [Y] ."]
    assert [text for text, _ in more[2]] == ["p-tuning", "50.0", "87.5", "0.875", "87.5", "12", "[X] [Y] ."]
    facts = page.rows(2)
    assert facts["relation"][-2:] == ["left out: object is not one token", "left out: over the limit"]
    assert facts["P36"] == ["capital", "31", "10", "40", "190", "0"]
    assert facts["all"] == ["", "62", "20", "80", "380", "0"]
    run = page.rows(3)
    assert run["devices"] == ["2 × cpu"]
    assert run["time, manual"] == ["12.1 s"]
    assert run["time, training"] == ["1:02:03 h"]
    assert "time, p-tuning" not in run
    assert run["peak memory per rank"] == ["1.00 to 1.50 GiB"]
    assert "134,515,008 parameters" in run["backbone"][0]


def test_the_headline_compares_macro_scores(tmp_path, results):
    prose = Page(write_report(write_run(tmp_path, results))).prose()
    assert "Over 2 relations, the mean P@1 of p-tuning on test is 56.3 %" in prose
    assert "4.4 points more than manual prompts (51.9 %)" in prose
    assert "43.8 points more than always giving the most frequent answer (12.5 %)." in prose
    assert "not complete" not in prose

    only = make_results({"majority": {"P36": 0.5}, "manual": {"P36": 0.25}})
    prose = Page(write_report(write_run(tmp_path, only | {"complete": False}))).prose()
    assert "Over 1 relation, the mean P@1 of manual on test is 25.0 %" in prose
    assert "25.0 points less than always giving the most frequent answer (50.0 %)." in prose
    assert "not complete" in prose


def test_the_best_of_a_row_is_bold(tmp_path, results):
    assert Page(write_report(write_run(tmp_path, results))).bold(0) == {
        "relation": [], "P36": ["53.8"], "P30": ["62.5"], "macro": ["56.3"], "micro": ["66.3"]
    }  # fmt: skip
    lines = {line.split()[0]: line for line in printed(results).splitlines() if plain(line).strip()}
    bold = {plain(name): re.findall(r"\x1b\[1m([^\x1b]*)\x1b", line) for name, line in lines.items()}
    assert [text.strip() for text in bold["P36"]] == ["53.8"]
    assert [text.strip() for text in bold["macro"]] == ["56.3"]


@pytest.mark.parametrize(
    ("scores", "bold"),
    [
        ((0.4, 0.7, 0.7), ["70.0", "70.0"]),
        ((0.4, 0.70001, 0.7), ["70.0", "70.0"]),  # they look the same, so they are marked the same
        ((0.5, 0.5, 0.5), []),
        ((None, 0.7, None), []),  # nothing to compare with
        ((0.1, None, 0.2), ["20.0"]),
        ((0.1, float("nan"), 0.2), ["20.0"]),
    ],
)
def test_ties_and_missing_scores_are_marked_fairly(tmp_path, scores, bold):
    results = make_results({m: {"P36": s} for m, s in zip(("majority", "manual", "p-tuning"), scores, strict=True)})
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.bold(0)["P36"] == bold
    assert page.rows(0)["P36"][3:6] == ["–" if s is None or s != s else f"{100 * s:.1f}" for s in scores]


def test_labels_are_text_and_nothing_else(tmp_path):
    label, name = "<script>alert('x')</script> $a_{$ [bold]b[/bold] & \"", "P<b>1"
    results = make_results({"manual": {name: 0.5}, "<i>m</i>": {name: 0.4}}, **{name: label})
    results["backbone"]["name"] = results["environment"]["devices"] = "</title><script>"
    page = Page(write_report(write_run(tmp_path, results, [log_line(name, 1, 0.5, best=True)])))
    tags = [tag for tag, _ in page.tags]
    assert not {"b", "i"} & set(tags)
    assert tags.count("script") == 1  # the page's own
    assert page.rows(0)[name][0] == label
    assert "<i>m</i>" in page.rows(0)["relation"]
    assert label in plain(printed(results, width=200))


def test_the_page_asks_for_nothing_from_outside(tmp_path, results):
    page = Page(write_report(write_run(tmp_path, results, [log_line("P36", 1, 0.5, best=True)])))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == [
        (tmp_path / "scores.png").read_bytes(),
        (tmp_path / "learning_curves.png").read_bytes(),
    ]
    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}
    [script] = re.findall(r"<script>(.*?)</script>", page.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(page.text)  # no other script would run
    assert not re.search(r"https?:|url\(|@import", page.text)
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_without_training_there_are_no_curves(tmp_path, results):
    for log in (None, "", '{"relation": "P3'):
        page = Page(write_report(write_run(tmp_path, results, log)))
        assert sum(tag == "img" for tag, _ in page.tags) == 1
        assert not (tmp_path / "learning_curves.png").exists()


def test_a_log_line_that_is_being_written_is_left_out(tmp_path, results, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "megaprompt.report.html.learning_chart", lambda r, log: seen.extend(log) or learning_chart(r, log)
    )
    lines = [log_line("P36", 1, 0.25), log_line("P36", 2, 0.5, best=True)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    write_report(write_run(tmp_path, results, whole + '{"relation": "P36", "epo'))
    assert seen == lines


def test_curves_are_those_of_prompts(tmp_path, results, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "megaprompt.report.html.learning_chart", lambda r, log: seen.extend(log) or learning_chart(r, log)
    )
    tuned = {"method": "fine-tuning", **log_line("P36", 1, 0.75)}
    write_report(write_run(tmp_path, results, [log_line("P36", 1, 0.25), tuned]))
    assert seen == [log_line("P36", 1, 0.25)]
    (tmp_path / "learning_curves.png").unlink()
    write_report(write_run(tmp_path, results, [tuned]))
    assert not (tmp_path / "learning_curves.png").exists()
    page = write_report(write_run(tmp_path, results, [tuned, {**tuned, "method": "p-tuning+fine-tuning"}]))
    assert "Of p-tuning+fine-tuning." in page.read_text()


def test_damaged_files_are_named(tmp_path, results):
    write_run(tmp_path, results, '{"rel\n{"relation": "P36"}\n')
    with pytest.raises(MegapromptError, match=r"log\.jsonl: is damaged"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 1,')
    with pytest.raises(MegapromptError, match=r"results\.json: is damaged"):
        write_report(tmp_path)


def test_null_values_are_dashes(tmp_path, results):
    for method in results["methods"].values():
        method["relations"]["P30"] |= dict.fromkeys(METRICS)
        method["macro"] = dict.fromkeys(METRICS)
    del results["methods"]["manual"]["relations"]["P36"]
    results["methods"]["manual"]["micro"] = None
    results["methods"]["lpaqa"] = None
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["P30"] == ["p30", "N-1", "40", "–", "–", "–", "–", "–"]
    assert page.rows(0)["P36"] == ["capital", "N-1", "40", "0.0", "–", "–", "50.0", "–"]
    assert page.rows(0)["macro"][3:] == ["–", "–", "–", "–", "–"]
    assert page.rows(0)["micro"][3:] == ["22.5\u00a0‡", "–", "–", "66.3\u00a0‡", "–"]
    assert "No method has scores yet." in page.prose()
    assert not re.search(r"\b(None|nan|Undefined)\b", page.prose())
    assert ["P30", "p30", "N-1", "40", "–", "–", "–", "–", "–"] in printed_rows(results)


def test_types_are_averaged_apart(tmp_path, results):
    results["data"]["relations"]["P36"]["type"] = "1-1"
    for method, score in {"manual": 0.5, "p-tuning": 0.6254}.items():
        results["methods"][method]["by_type"] = {"N-1": {"relations": 1, "p_at_1": score}}
    results["methods"]["manual"]["by_type"]["1-1"] = {"relations": 1, "p_at_1": 0.5384}
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["1-1"] == ["mean over 1 relation", "1-1", "40", "–", "53.8", "–", "–"]
    assert page.rows(0)["N-1"] == ["mean over 1 relation", "N-1", "40", "12.5", "50.0", "62.5", "+12.5"]


def test_41_relations_and_6_methods_make_a_page(tmp_path):
    names = [f"P{i}" for i in range(41)]
    methods = ("majority", "manual", "lpaqa", "autoprompt", "fine-tuning", "p-tuning")
    results = make_results({m: {name: i / 41 for i, name in enumerate(names)} for m in methods})
    log = [log_line(name, epoch, 0.5, best=epoch == 2) for name in names for epoch in (1, 2, 3)]
    figure = learning_chart(results, log)
    assert len(figure.axes) == 2 * 41
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["P40"][3:] == ["97.6"] * 6 + ["+0.0"]
    assert all(len(row) == 11 for row in page.tables[0])


@pytest.mark.slow
def test_charts_of_many_relations_come_in_parts_that_fit_a_page(tmp_path):
    names = [f"P{i}" for i in range(33)]
    methods = ("majority", "manual", "mined", "other", "autoprompt", "fine-tuning", "manual+fine-tuning", "p-tuning")
    results = make_results({m: {name: i / 33 for i, name in enumerate(names)} for m in methods})
    page = Page(write_report(write_run(tmp_path, results, [log_line(name, 1, 0.5) for name in names])))
    images = [attrs["src"].removeprefix("data:image/png;base64,") for tag, attrs in page.tags if tag == "img"]
    files = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert {base64.b64decode(image) for image in images} == files
    assert len(images) == len(files) > 4
    for png in files:
        width, height = struct.unpack(">II", png[16:24])
        assert height <= 1.36 * width  # of A4 and letter, less margins and a heading
    figures = _run_figures(read_run(tmp_path))
    bars = [f.axes[0].get_yticklabels() for name, f in figures.items() if name.startswith("scores")]
    assert [label.get_text().split()[0] for labels in bars for label in labels[:-1]] == names
    assert {labels[-1].get_text() for labels in bars} == {"macro mean"}
    titles = [axes.get_title() for name, f in figures.items() if "learning" in name for axes in f.axes[::2]]
    assert [title.split()[0] for title in titles] == names
