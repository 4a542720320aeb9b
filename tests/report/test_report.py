"""Tables, charts and page of a run, made from results that are written down here."""

import base64
import html
import io
import json
import re
import struct
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from megaprompt.errors import MegapromptError
from megaprompt.report.charts import learning_chart, scores_chart
from megaprompt.report.html import _run_figures, write_report
from megaprompt.report.tables import methods_in_order, read_run, summary_table

METRICS = ("p_at_1", "p_at_10", "mrr", "dev_p_at_1")


def make_results(scores: dict[str, dict[str, float | None]], **labels: str) -> dict:
    """Results with the P@1 of `scores[method][relation]`; macro is their mean, micro is 0.1 above it."""
    names = list(next(iter(scores.values())))
    methods = {}
    for method, values in scores.items():
        rows = {}
        for name, value in values.items():
            other = dict.fromkeys(METRICS) if value is None or method == "majority" else dict.fromkeys(METRICS, 0.875)
            row = {"type": "N-1", "facts": 40, "epochs": 12 if method == "p-tuning" else None, "template": "[X] [Y] ."}
            rows[name] = row | other | {"p_at_1": value}
        known = [value for value in values.values() if value is not None]
        mean = sum(known) / len(known) if len(known) == len(names) else None
        macro = dict.fromkeys(METRICS) | {"p_at_1": mean}
        micro = macro | {"p_at_1": None if mean is None else mean + 0.1}
        methods[method] = {"relations": rows, "macro": macro, "micro": micro, "by_type": {"N-1": macro}}
    left_out = {"object is not one token": 190, "over the limit": 0}
    facts = {"train": 31, "dev": 10, "test": 40}
    about = {"type": "N-1", "template": "[X] [Y] .", "facts": facts, "left_out": left_out}
    return {
        "format": 1,
        "complete": True,
        "backbone": {
            "name": "tiny", "fingerprint": "ab12", "dtype": "float32", "hidden_size": 576, "parameters": 134515008
        },
        "data": {
            "name": "facts",
            "vocabulary": {"name": "all tokens", "tokens": 49152},
            "relations": {name: {"label": labels.get(name, name.lower()), **about} for name in names},
        },
        "methods": methods,
        "environment": {"torch": "2.13", "world_size": 2, "devices": ["cpu", "cpu"]},
        "timing": {"manual": {"seconds": 12.1}, "training_seconds": 3723.4, "p-tuning": {"seconds": None}},
        "peak_memory_bytes": [1 << 30, 3 << 29],
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    return make_results(
        {
            "p-tuning": {"P36": 0.5, "P30": 0.6254},
            "manual": {"P36": 0.538, "P30": 0.5},
            "majority": {"P36": 0.0, "P30": 0.25},
        },
        P36="capital",
    )


def log_line(relation: str, epoch: int, dev: float | None, best: bool = False, loss: float | None = 1.0) -> dict:
    return {"relation": relation, "epoch": epoch, "train_loss": loss, "dev_p_at_1": dev, "best": best}


def write_run(path, results, log=None):
    (path / "results.json").write_text(json.dumps(results))
    if log is not None:
        (path / "log.jsonl").write_text(log if isinstance(log, str) else "".join(json.dumps(r) + "\n" for r in log))
    return path


class Page(HTMLParser):
    """The tables of a page as lists of rows of (text, class), and all its tags."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tables, self.tags = [], []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attrs).get("class", "")])
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if getattr(self, "in_cell", False):
            self.tables[-1][-1][-1][0] += data

    def rows(self, table: int) -> dict[str, list[str]]:
        """Rows by their first cell."""
        return {row[0][0]: [text for text, _ in row[1:]] for row in self.tables[table]}

    def bold(self, table: int) -> dict[str, list[str]]:
        return {row[0][0]: [text for text, kind in row if kind == "best"] for row in self.tables[table]}

    def prose(self) -> str:
        return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", "", self.text, flags=re.S)).split())


def printed(results, width=100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="standard").print(summary_table(results))
    return out.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def printed_rows(results) -> list[list[str]]:
    return [plain(line).split() for line in printed(results).splitlines()]


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
    assert "Over 2 relations, p-tuning puts the right object first for 56.3 % of the test facts" in prose
    assert "4.4 points more than manual prompts (51.9 %)" in prose
    assert "43.8 points more than always giving the most frequent answer (12.5 %)." in prose
    assert "not complete" not in prose

    only = make_results({"majority": {"P36": 0.5}, "manual": {"P36": 0.25}})
    prose = Page(write_report(write_run(tmp_path, only | {"complete": False}))).prose()
    assert "Over 1 relation, manual puts the right object first for 25.0 %" in prose
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


def test_the_terminal_shows_the_numbers(results):
    lines = printed_rows(results)
    assert ["P36", "capital", "N-1", "40", "0.0", "53.8", "50.0", "−3.8"] in lines
    assert ["macro", "80", "12.5", "51.9", "56.3", "+4.4"] in lines
    assert ["micro", "80", "22.5", "61.9", "66.3", "+4.4"] in lines
    del results["methods"]["manual"]
    assert ["P36", "capital", "N-1", "40", "0.0", "50.0"] in printed_rows(results)
    assert "gain" not in printed(results)


def test_labels_are_text_and_nothing_else(tmp_path):
    label, name = "<script>alert('x')</script> $a_{$ [bold]b[/bold] & \"", "P<b>1"
    results = make_results({"manual": {name: 0.5}, "<i>m</i>": {name: 0.4}}, **{name: label})
    results["backbone"]["name"] = results["environment"]["devices"] = "</title><script>"
    page = Page(write_report(write_run(tmp_path, results, [log_line(name, 1, 0.5, best=True)])))
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert page.rows(0)[name][0] == label
    assert "<i>m</i>" in page.rows(0)["relation"]
    assert label in plain(printed(results, width=200))


def test_dollars_in_labels_are_no_formulas():
    results = make_results({"manual": {"P1": 0.5}}, P1="$a_{$")
    scores, learning = scores_chart(results), learning_chart(results, [log_line("P1", 1, 0.5)])
    for figure in (scores, learning):
        FigureCanvasAgg(figure).draw()  # raises for a wrong formula
    assert scores.axes[0].get_yticklabels()[0].get_text() == learning.axes[0].get_title() == "P1 $a_{$"


def test_the_page_asks_for_nothing_from_outside(tmp_path, results):
    page = Page(write_report(write_run(tmp_path, results, [log_line("P36", 1, 0.5, best=True)])))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == [
        (tmp_path / "scores.png").read_bytes(),
        (tmp_path / "learning_curves.png").read_bytes(),
    ]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
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


def test_damaged_files_are_named(tmp_path, results):
    write_run(tmp_path, results, '{"rel\n{"relation": "P36"}\n')
    with pytest.raises(MegapromptError, match=r"log\.jsonl: is damaged"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 1,')
    with pytest.raises(MegapromptError, match=r"results\.json: is damaged"):
        write_report(tmp_path)


def test_learning_curves_mark_the_chosen_epoch(results):
    log = [
        log_line("P30", 1, 0.1, best=True),
        log_line("P36", 1, 0.25, best=True, loss=3.0),
        log_line("P36", 2, 0.5, best=True, loss=2.0),
        log_line("P36", 3, 0.5, loss=None),
        log_line("P36", 4, None, loss=0.5),
    ]
    figure = learning_chart(results, log)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["P36 capital", "P30 p30"]
    dev, dot = figure.axes[0].lines
    assert dev.get_xydata()[:3].tolist() == [[1, 25], [2, 50], [3, 50]]
    assert dot.get_xydata().tolist() == [[2, 50]]
    loss = figure.axes[1].lines[0].get_ydata()
    assert loss[[0, 1, 3]].tolist() == [3.0, 2.0, 0.5]


def test_bars_have_the_lengths_of_the_scores(results):
    results["methods"]["manual"]["relations"]["P30"]["p_at_1"] = None
    axes = scores_chart(results).axes[0]
    lengths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert list(lengths) == ["majority", "manual", "p-tuning"]
    assert lengths["p-tuning"] == pytest.approx([50, 62.54, 56.27])
    assert lengths["manual"] == pytest.approx([53.8, 0, 51.9])
    assert [text.get_text() for text in axes.texts] == ["0", "25", "12", "54", "–", "52", "50", "63", "56"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["P36 capital", "P30 p30", "macro mean"]


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
    assert page.rows(0)["micro"][3:] == ["22.5", "–", "–", "66.3", "–"]
    assert "No method has scores yet." in page.prose()
    assert not re.search(r"\b(None|nan|Undefined)\b", page.prose())
    assert ["P30", "p30", "N-1", "40", "–", "–", "–", "–", "–"] in printed_rows(results)


def test_methods_stand_in_a_sensible_order():
    names = ("p-tuning", "zzz", "lpaqa ensemble", "autoprompt", "manual", "majority", "abc", "lpaqa best")
    assert methods_in_order(names) == [
        "majority", "manual", "lpaqa best", "lpaqa ensemble", "autoprompt", "abc", "zzz", "p-tuning"
    ]  # fmt: skip


def test_types_are_averaged_apart(tmp_path, results):
    results["data"]["relations"]["P36"]["type"] = "1-1"
    results["methods"]["manual"]["by_type"]["1-1"] = {"relations": 1, "p_at_1": 0.5384}
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["1-1"] == ["mean over 1 relation", "1-1", "40", "–", "53.8", "–", "–"]
    assert page.rows(0)["N-1"] == ["mean over 1 relation", "N-1", "40", "12.5", "51.9", "56.3", "+4.4"]


@pytest.mark.parametrize(("relations", "methods"), [(1, 1), (41, 6)])
def test_bar_labels_do_not_overlap(relations, methods):
    names = [f"P{100 + i}" for i in range(relations)]
    labels = dict.fromkeys(names, "located in the administrative territorial entity of a very long name")
    known = ("majority", "manual", "fine-tuning", "p-tuning", "new", "newer")[:methods]
    scores = {m: {n: (i + k) % 10 / 9 for k, n in enumerate(names)} for i, m in enumerate(known)}
    figure = scores_chart(make_results(scores, **labels))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    assert len(axes.texts) == methods * (relations + (relations > 1))
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == methods
    for texts in (axes.texts, axes.get_yticklabels()):
        boxes = sorted((text.get_window_extent(canvas.get_renderer()) for text in texts), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= figure.bbox.x1


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
