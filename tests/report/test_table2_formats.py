"""Table 2 as Markdown, LaTeX, CSV and in the terminal."""

import csv
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from megaprompt.report.charts import relations_chart, types_chart
from megaprompt.report.html import write_joint_report
from megaprompt.report.table2_formats import as_csv, latex, markdown, terminal_table
from tests.report.made_up import (
    Page,
    joined,
    markdown_rows,
    plain,
)


def test_formats_say_the_same(make_run):
    runs = [
        make_run(f"{name}{seed}", {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5 + 0.1 * seed}}, name, seed=seed)
        for name in ("a", "b")
        for seed in (0, 1)
    ]
    table = joined(*runs)
    text = markdown(table)
    assert markdown_rows(text).count(["a", "25.0", "**55.0 ± 7.1 (+30.0)**"]) == 2  # macro and micro
    assert markdown_rows(text).count(["backbone", "MP", "P-tuning"]) == 2
    assert len(re.findall(r"^\|:-+\|-+:\|-+:\|$", text, re.MULTILINE)) == 2
    tex = latex(table)
    assert r"a & 25.0 & \textbf{55.0 $\pm$ 7.1 (+30.0)} \\" in tex.splitlines()
    assert r"\begin{tabular}{lrr}" in tex
    rows = list(csv.DictReader(as_csv(table).splitlines()))
    found = {(r["backbone"], r["method"], r["average"]): r for r in rows}
    assert len(found) == len(rows) == 8
    macro = found["a", "p-tuning", "macro"]
    assert float(macro["p_at_1"]) == pytest.approx(55)
    assert float(macro["deviation"]) == pytest.approx(50**0.5, abs=1e-4)
    assert (macro["seeds"], macro["facts"], macro["source"]) == ("2", "40", "measured")
    assert found["a", "manual", "macro"]["deviation"] == ""
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(table))
    assert ["a", "manual", "25.0", "25.0", "2"] in [line.split() for line in plain(console.export_text()).splitlines()]


def test_special_characters_survive(make_run, tmp_path):
    name, method = "a_b|c & 50 % {x} \\ <b>$1$", "m#1 ~^ *s* <i>"
    table = joined(make_run("a", {method: {"P1": 0.5}}, name), make_run("b", {"manual": {"P1": 0.5}}, "other"))
    line = next(line for line in markdown(table).splitlines() if "a\\_b" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 4  # of three cells
    tex = latex(table)
    assert r"a\_b\textbar{}c \& 50 \% \{x\} \textbackslash{} $<$b$>$\$1\$" in tex
    assert not re.search(r"(?<!\\)[#~^]", tex.replace(r"$^\dagger$", ""))
    for line in tex.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 2, line
    assert {row["backbone"] for row in csv.DictReader(as_csv(table).splitlines())} == {name, "other"}
    page = Page(write_joint_report(table, tmp_path / "out"))
    tags = [tag for tag, _ in page.tags]
    assert not {"b", "i"} & set(tags)
    assert tags.count("script") == 1  # the page's own
    assert name in page.rows(0)
    for figure in (relations_chart(table), types_chart(table)):
        FigureCanvasAgg(figure).draw()  # raises for a wrong formula
