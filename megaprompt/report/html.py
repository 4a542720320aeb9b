"""Reports: what a reader sees. Everything is made from the files that runs have written.

write_report(Path("runs/first"))  # of one run: report.html, charts, table.md, table.tex, table.csv
write_joint_report(join([read_run(a), read_run(b)]), out)  # of several, as in the paper's Table 2
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from megaprompt.errors import UsageError
from megaprompt.files import write_file
from megaprompt.report.browse import Browsed, browsed, quotas
from megaprompt.report.charts import (
    LEARNING_PER_PAGE,
    learning_chart,
    page_parts,
    png,
    relations_chart,
    scores_chart,
    scores_per_page,
    types_chart,
)
from megaprompt.report.choices import choices_of
from megaprompt.report.comparison import Comparison, compare
from megaprompt.report.controls import control_sections
from megaprompt.report.predictions import read_answers
from megaprompt.report.runs import Run, Scoring, backbone_name, beside, known, percent, plural, points, read_run
from megaprompt.report.sizes_chart import sizes_chart
from megaprompt.report.superglue import SuperGlueTable, superglue_table
from megaprompt.report.superglue_chart import averages_chart
from megaprompt.report.superglue_formats import (
    headings,
    legend_of,
    on_intervals,
    shown_lines,
    superglue_csv,
    superglue_latex,
    superglue_markdown,
)
from megaprompt.report.table2 import Table2, join
from megaprompt.report.table2_formats import HEADINGS, as_csv, latex, legend, lines_of, markdown, relation_text
from megaprompt.report.tables import (
    data_and_vocabulary,
    filled_columns,
    has_gain,
    lead_of,
    methods_in_order,
    notes_of,
    rows_of,
    telling_columns,
)
from megaprompt.report.wordings import notes_of_answers, write_entry

_SCRIPTS = ("browse.js", "sortable.js", "page.js")
_SCRIPT = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SCRIPTS)
_MOST_CHARTS = 8  # of one kind; where there would be more, a table says it better


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run into its own directory, or another; returns the page's path.

    report.html is self-contained; beside it are its charts as PNG, and the one row of Table 2 (see `write_tables`).

    Raises:
        UsageError: there is no run.
        MegapromptError: a file of the run is damaged, or the report cannot be written.
    """
    found = read_run(run)
    out, results = out or run, found.results
    table = join([found])
    superglue = superglue_table(table)
    figures = _run_figures(found)
    relations, averages, types = rows_of(results)
    methods = methods_in_order(results["methods"])
    scored = [method for method in methods if method != "majority"]
    comparisons, facts = _answers(table)
    abouts = results["data"]["relations"].values()
    page = write_page(
        "report",
        figures,
        out,
        results=results,
        scoring=Scoring.of(results),
        gain=has_gain(results),
        lead_of=lead_of,
        curves_of=_curves(found)[0],
        backbone_name=backbone_name,
        controls=control_sections(table),
        about=data_and_vocabulary(results),
        notes=[*notes_of(results), *notes_of_answers(results)],
        methods=methods,
        scored=scored,
        filled=filled_columns([*relations, *averages], scored),
        relations=relations,
        averages=averages,
        types=types,
        told=telling_columns(results["data"]["relations"]),
        ways=list(dict.fromkeys(way for about in abouts for way in about.get("usable", {}))),
        reasons=list(dict.fromkeys(reason for about in abouts for reason in about["left_out"])),
        total=sum(
            (Counter(about["facts"] | about.get("usable", {}) | about["left_out"]) for about in abouts), Counter()
        ),
        smallest=min((row for row in relations if row.items), key=lambda row: row.items, default=None),
        comparisons=comparisons,
        browsed=facts,
        choices=choices_of(results),
        superglue=_superglue(superglue),
        circumstances=_circumstances(results),
    )
    write_tables(table, superglue, out)
    write_entry(found, out)
    return page


def _run_figures(run: Run) -> dict[str, Figure]:
    """Charts of one run by name. Those of many relations come in parts: scores, scores-2, ..."""
    results, figures = run.results, {}
    about = results["data"]["relations"]
    if methods := methods_in_order(results["methods"]):
        for number, part in enumerate(_drawn(list(about), scores_per_page(methods)), 1):
            data = {**results["data"], "relations": {name: about[name] for name in part}}
            figures[_numbered("scores", number)] = scores_chart({**results, "data": data})
    _, log = _curves(run)
    logged = {line["relation"] for line in log}
    names = [name for name in dict.fromkeys([*about, *logged]) if name in logged]
    for number, part in enumerate(_drawn(names, LEARNING_PER_PAGE) if names else (), 1):
        lines = [line for line in log if line["relation"] in part]
        figures[_numbered("learning_curves", number)] = learning_chart(results, lines)
    return figures


def _drawn(names: Sequence[str], fit: int) -> list[list[str]]:
    """The relations of each chart; none if there would be too many charts."""
    parts = page_parts(names, fit)
    return parts if len(parts) <= _MOST_CHARTS else []


def _curves(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """The method whose curves are shown, of those that learn prompts, and its lines of the log.

    Those of candidates would stand above each other.
    """
    for method in ("p-tuning", "p-tuning+fine-tuning"):
        lines = [line for line in run.log if "epoch" in line and line.get("method", "p-tuning") == method]
        if lines := [line for line in lines if not line.get("candidate")]:
            return method, lines
    return "", []


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def write_joint_report(table: Table2, out: Path) -> Path:
    """Write the report of several runs, with Table 2, into a directory; returns the page's path.

    Raises:
        UsageError: the directory is that of a run, which has a report of its own.
        MegapromptError: predictions are damaged, or the report cannot be written.
    """
    if (out / "results.json").exists():
        raise UsageError(f"--out {out} holds a run with a report of its own; choose another directory")
    found = superglue_table(table)
    figures = _joint_figures(table, found)
    comparisons, facts = _answers(table)
    page = write_page(
        "table2",
        figures,
        out,
        table=table,
        scoring=table.scoring,
        averages={average: lines_of(table, average) for average in table.averages},
        sentences=legend(table),
        headings=HEADINGS,
        controls=control_sections(table),
        relation_text=relation_text,
        told=telling_columns(table.relations),
        comparisons=comparisons,
        browsed=facts,
        superglue=_superglue(found),
    )
    write_tables(table, found, out)
    return page


def _joint_figures(table: Table2, found: SuperGlueTable | None) -> dict[str, Figure]:
    """Charts of several runs by name."""
    if not table.methods:
        return {}
    averages = averages_chart(found) if found else None
    first = {"averages": averages} if averages else {} if found else {"types": types_chart(table)}
    sizes = None if found else sizes_chart(table)
    return {**({"sizes": sizes} if sizes else {}), **first, "relations": relations_chart(table)}


def _answers(table: Table2) -> tuple[list[Comparison], Browsed | None]:
    """What the predictions say: methods that are compared, by backbone, and items that can be searched."""
    limits = quotas(table)
    asked = [read_answers(row, list(table.relations), limits) for row in table.rows]
    found = [compare(row, answers, table.relations) for row, answers in zip(table.rows, asked, strict=True)]
    return [each for each in found if each is not None], browsed(table, asked)


def _superglue(found: SuperGlueTable | None) -> dict[str, Any] | None:
    """What pages show of runs on SuperGLUE; None of others."""
    if found is None:
        return None
    blocks = [(block.backbone, shown_lines(found, block)) for block in found.blocks]
    return {
        "table": found,
        "headings": headings(found),
        "blocks": blocks,
        "sentences": legend_of(found) + on_intervals(found),
    }


def write_tables(table: Table2, found: SuperGlueTable | None, out: Path) -> None:
    """Write table.md, table.tex (booktabs) and table.csv into a directory.

    Args:
        found: the same runs in the layout of SuperGLUE's tables, if they are on SuperGLUE.

    Raises:
        MegapromptError: they cannot be written.
    """
    if found is None:
        texts = {"table.md": markdown(table), "table.tex": latex(table), "table.csv": as_csv(table)}
    else:
        texts = {"table.md": superglue_markdown(table, found), "table.tex": superglue_latex(table, found)}
        texts["table.csv"] = superglue_csv(found)
    for name, text in texts.items():
        write_file(out / name, text.encode())


def write_page(template: str, figures: Mapping[str, Figure], out: Path, **values: Any) -> Path:
    """Render report.html with its charts inside, and write the charts beside it."""
    images = {name: png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_file(out / f"{name}.png", image)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megaprompt.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "plural": plural, "beside": beside}
    page = environment.get_template(f"{template}.html.jinja").render(
        **values,
        charts={name: base64.b64encode(image).decode() for name, image in images.items()},
        widths={name: round(100 * figure.get_figwidth()) for name, figure in figures.items()},
        script=_SCRIPT,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}",
    )
    write_file(out / "report.html", page.encode())
    return out / "report.html"


def _circumstances(results: Mapping[str, Any]) -> dict[str, str]:
    """Where the run took place, for how long, and in how much memory."""
    shown = {}
    for key, value in results.get("environment", {}).items():
        if isinstance(value, list):  # one item per rank
            value = ", ".join(f"{n} × {item}" if n > 1 else item for item, n in Counter(map(str, value)).items())
        shown[key.replace("_", " ")] = str(value)
    for key, value in results.get("timing", {}).items():
        seconds: Any = value.get("seconds") if isinstance(value, Mapping) else value
        if known(seconds):
            time = f"{seconds:.1f} s" if seconds < 60 else f"{timedelta(seconds=round(seconds))} h"
            shown[f"time, {key.removesuffix('_seconds')}"] = time
    gib = [f"{peak / 2**30:.2f}" for peak in sorted(filter(known, results.get("peak_memory_bytes", ())))]
    if gib:
        shown["peak memory per rank"] = f"{' to '.join(dict.fromkeys((gib[0], gib[-1])))} GiB"
    return shown
