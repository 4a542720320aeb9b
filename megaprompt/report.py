"""Tables and charts of a run: what a reader sees. Everything is made from results.json and log.jsonl alone.

write_report(Path("runs/first"))    # report.html, scores.png, learning_curves.png
rich.print(summary_table(results))  # the same scores in the terminal
"""

from __future__ import annotations

import base64
import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.errors import MegapromptError
from megaprompt.run_directory import write_file

_COLORS = {  # in the order of tables and charts; Okabe and Ito's palette, readable with every kind of colour vision
    "majority": "#999999",
    "manual": "#E69F00",
    "lpaqa": "#CC79A7",
    "autoprompt": "#333333",
    "fine-tuning": "#56B4E9",
    "manual+fine-tuning": "#009E73",
    "p-tuning": "#0072B2",
}
_DEV_COLOR, _LOSS_COLOR = "#0072B2", "#D55E00"


def methods_in_order(results: Mapping[str, Any]) -> list[str]:
    """The methods of a run: majority first, P-tuning last, then any that are not known here."""
    order = list(_COLORS)
    return sorted(results["methods"], key=lambda m: (order.index(m) if m in order else len(order), m))


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if _known(value) else "–"


def _decimal(value: Any) -> str:
    return f"{value:.3f}" if _known(value) else "–"


@dataclass(frozen=True)
class _Row:
    """A relation or an average, and what each method scored there."""

    name: str
    label: str
    type: str
    facts: int  # in test
    cells: dict[str, Mapping[str, Any]]  # method -> p_at_1, p_at_10, mrr, ...; empty if it was not scored

    def scores(self) -> dict[str, float]:
        """P@1 in per cent of the methods that have one."""
        return {m: 100 * cell["p_at_1"] for m, cell in self.cells.items() if _known(cell.get("p_at_1"))}

    def best(self, method: str) -> bool:
        """Whether a method leads the row, to the digits that are shown; nobody does if all are the same."""
        shown = {m: round(score, 1) for m, score in self.scores().items()}
        return method in shown and min(shown.values()) < shown[method] == max(shown.values())

    def gain(self) -> str:
        """P-tuning over manual prompts, in points."""
        scores = self.scores()
        if not {"manual", "p-tuning"} <= set(scores):
            return "–"
        points = round(scores["p-tuning"] - scores["manual"], 1) or 0.0  # never -0.0
        return f"{points:+.1f}".replace("-", "−")


def _rows(results: Mapping[str, Any]) -> tuple[list[_Row], list[_Row], list[_Row]]:
    """Rows of relations, of the averages macro and micro, and of the relation types if there are several."""
    methods = {method: results["methods"][method] for method in methods_in_order(results)}
    about = results["data"]["relations"]

    def row(name: str, label: str, kind: str, over: Sequence[str], *path: str) -> _Row:
        cells = {}
        for method, found in methods.items():
            for key in path:
                found = (found or {}).get(key)
            cells[method] = found or {}
        return _Row(name, label, kind, sum(about[relation]["facts"]["test"] for relation in over), cells)

    relations = [row(name, i["label"], i["type"], [name], "relations", name) for name, i in about.items()]
    averages = [
        row("macro", "mean over relations", "", list(about), "macro"),
        row("micro", "mean over facts", "", list(about), "micro"),
    ]
    types = []
    kinds = sorted({info["type"] for info in about.values()})
    for kind in kinds if len(kinds) > 1 else ():
        same = [name for name, info in about.items() if info["type"] == kind]
        label = f"mean over {len(same)} relation{'s'[: len(same) > 1]}"
        types.append(row(kind or "no type", label, kind, same, "by_type", kind))
    return relations, averages, types


def summary_table(results: Mapping[str, Any]) -> Table:
    """P@1 on test of every relation and method, for a terminal; the best of a row is bold."""
    methods = methods_in_order(results)
    gain = {"manual", "p-tuning"} <= set(methods)
    backbone, data = results["backbone"]["name"], results["data"]
    title = f"P@1 on test, %: {backbone}, {data['name']}, among {data['vocabulary']['name']}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("relation", "label", "type"):
        table.add_column(column, overflow="fold", no_wrap=column != "label")
    for column in ("test\nfacts", *methods, *(["gain"] if gain else [])):
        table.add_column(Text(column), justify="right", no_wrap=True)
    relations, averages, _ = _rows(results)
    for i, row in enumerate((*relations, *averages)):
        if i == len(relations):
            table.add_section()
        words = (row.name, row.label if i < len(relations) else "", row.type, str(row.facts))
        scores = [Text(_percent(c.get("p_at_1")), "bold" if row.best(m) else "") for m, c in row.cells.items()]
        table.add_row(*map(Text, words), *scores, *([Text(row.gain())] if gain else []))
    return table


# --------------------------------------------------------------------------------------------------------------- charts


def scores_chart(results: Mapping[str, Any]) -> Figure:
    """Grouped horizontal bars: P@1 of every relation and method, and the macro mean."""
    methods = methods_in_order(results)
    spare = iter([color for method, color in _COLORS.items() if method not in methods])
    relations, averages, _ = _rows(results)
    rows = [*relations, *averages[: len(relations) > 1]]
    bar = max(0.14, 0.3 / len(methods))  # inches
    pitch = bar * len(methods) + 0.14
    figure = Figure(figsize=(8, 1.3 + pitch * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        scores = [row.scores().get(method) for row in rows]
        middles = [place + (i - (len(methods) - 1) / 2) * bar / pitch for place in range(len(rows))]
        color = _COLORS.get(method) or next(spare, "#000000")
        bars = axes.barh(middles, [score or 0 for score in scores], 0.9 * bar / pitch, color=color, label=method)
        axes.bar_label(bars, ["–" if s is None else f"{s:.0f}" for s in scores], padding=2, fontsize=7)
    labels = [*(f"{row.name} {row.label}" for row in relations), "macro mean"][: len(rows)]
    labels = ["\n".join(textwrap.wrap(label, 30, max_lines=2, placeholder=" …")) for label in labels]
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5, linespacing=1, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if len(rows) > len(relations):
        axes.axhline(len(relations) - 0.5, color="#444444", linewidth=0.8)
    axes.set_xlim(0, 105)
    axes.set_xlabel("P@1 on test, %")
    axes.tick_params(axis="x", top=len(rows) > 15, labeltop=len(rows) > 15)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(methods)), frameon=False)
    return figure


def learning_chart(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Figure:
    """Small multiples, one per relation: P@1 on dev and training loss over epochs; the dot is the chosen epoch."""
    lines_of: dict[str, list[Mapping[str, Any]]] = {name: [] for name in results["data"]["relations"]}
    for line in log:
        lines_of.setdefault(line["relation"], []).append(line)
    lines_of = {name: lines for name, lines in lines_of.items() if lines}
    columns = min(3, len(lines_of))
    rows = math.ceil(len(lines_of) / columns)
    # Lengths in inches: a layout engine would take many seconds for 41 relations.
    across, left, right, top, bottom, between, below = 9.6, 0.5, 0.45, 0.75, 0.5, 0.85, 0.6
    width, height = (across - left - right - (columns - 1) * between) / columns, (2.6, 1.8, 1.3)[columns - 1]
    down = top + bottom + rows * height + (rows - 1) * below
    figure = Figure(figsize=(across, down))
    figure.subplots_adjust(left / across, bottom / down, 1 - right / across, 1 - top / down)
    figure.subplots_adjust(wspace=between / width, hspace=below / height)
    for i, (name, lines) in enumerate(lines_of.items()):
        epochs, dev, train = (
            np.array([line.get(key) for line in lines], dtype=float) for key in ("epoch", "dev_p_at_1", "train_loss")
        )
        chosen = [k for k, line in enumerate(lines) if line.get("best")][-1:]
        axes = figure.add_subplot(rows, columns, i + 1)
        loss = axes.twinx()
        axes.set_zorder(1)  # the dot lies on top
        axes.patch.set_visible(False)
        handles = axes.plot(epochs, 100 * dev, ".-", color=_DEV_COLOR, ms=3, lw=1.2, label="P@1 on dev, % (left)")
        handles += loss.plot(epochs, train, ".--", color=_LOSS_COLOR, ms=3, lw=1.2, label="training loss (right)")
        handles += axes.plot(epochs[chosen], 100 * dev[chosen], "o", color=_DEV_COLOR, label="chosen epoch")
        label = results["data"]["relations"].get(name, {}).get("label", "")
        axes.set_title(textwrap.shorten(f"{name} {label}", 38, placeholder=" …"), fontsize=9, parse_math=False)
        axes.set_ylim(-4, 104)
        loss.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", colors=_DEV_COLOR, labelsize=7)
        loss.tick_params(axis="y", colors=_LOSS_COLOR, labelsize=7)
        axes.spines["top"].set_visible(False)
        loss.spines["top"].set_visible(False)
        if i + columns >= len(lines_of):  # nothing stands below
            axes.set_xlabel("epoch", fontsize=8)
        if i == 0:
            figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- page


def write_report(run: Path) -> Path:
    """Make report.html (self-contained) and the charts as PNG from a run's results; returns the page's path.

    Raises:
        MegapromptError: a file of the run is damaged, or the report cannot be written.
    """
    results, log = _read(run)
    log = [line for line in log if "method" not in line]  # of prompts, not of fine-tuning
    figures = {"scores": scores_chart(results)}
    if log:
        figures["learning_curves"] = learning_chart(results, log)
    pngs = {name: _png(figure) for name, figure in figures.items()}
    for name, png in pngs.items():
        write_file(run / f"{name}.png", png)
    relations, averages, types = _rows(results)
    abouts = results["data"]["relations"].values()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megaprompt", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "decimal": _decimal}
    page = environment.get_template("report.html.jinja").render(
        results=results,
        methods=methods_in_order(results),
        relations=relations,
        averages=averages,
        types=types,
        reasons=list(dict.fromkeys(reason for about in abouts for reason in about["left_out"])),
        total=sum((Counter(about["facts"] | about["left_out"]) for about in abouts), Counter()),
        smallest=min((row for row in relations if row.facts), key=lambda row: row.facts, default=None),
        circumstances=_circumstances(results),
        charts={name: base64.b64encode(png).decode() for name, png in pngs.items()},
        widths={name: round(100 * figure.get_figwidth()) for name, figure in figures.items()},
    )
    write_file(run / "report.html", page.encode())
    return run / "report.html"


def _read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and log of a run; what follows the log's last newline is still being written and is left out."""
    path = run / "results.json"
    try:
        results = json.loads(path.read_bytes())
        path = run / "log.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return results, [json.loads(line) for line in lines]
    except ValueError as error:
        raise MegapromptError(f"{path}: is damaged ({error}); run the probe again") from error


def _circumstances(results: Mapping[str, Any]) -> dict[str, str]:
    """Where the run took place, for how long, and in how much memory."""
    shown = {}
    for key, value in results.get("environment", {}).items():
        if isinstance(value, list):  # one item per rank
            value = ", ".join(f"{n} × {item}" if n > 1 else item for item, n in Counter(map(str, value)).items())
        shown[key.replace("_", " ")] = str(value)
    for key, value in results.get("timing", {}).items():
        seconds: Any = value.get("seconds") if isinstance(value, Mapping) else value
        if _known(seconds):
            time = f"{seconds:.1f} s" if seconds < 60 else f"{timedelta(seconds=round(seconds))} h"
            shown[f"time, {key.removesuffix('_seconds')}"] = time
    gib = [f"{peak / 2**30:.2f}" for peak in sorted(filter(_known, results.get("peak_memory_bytes", ())))]
    if gib:
        shown["peak memory per rank"] = f"{' to '.join(dict.fromkeys((gib[0], gib[-1])))} GiB"
    return shown
