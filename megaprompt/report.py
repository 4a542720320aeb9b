"""Tables and charts of a run: what a reader sees. Everything is made from results.json and log.jsonl alone."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from megaprompt.run_directory import write_file

_ORDER = ("majority", "lpaqa", "autoprompt", "manual", "fine-tuning", "manual+fine-tuning", "p-tuning")
_COLORS = {  # Okabe and Ito's palette, readable with every kind of colour vision
    "majority": "#999999",
    "lpaqa": "#CC79A7",
    "autoprompt": "#F0E442",
    "manual": "#E69F00",
    "fine-tuning": "#56B4E9",
    "manual+fine-tuning": "#009E73",
    "p-tuning": "#0072B2",
}
_DEV_COLOR, _LOSS_COLOR = "#0072B2", "#D55E00"


def methods_in_order(results: Mapping[str, Any]) -> list[str]:
    """The methods of a run: baselines first, P-tuning last."""
    return sorted(results["methods"], key=lambda method: (_ORDER.index(method) if method in _ORDER else 99, method))


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _rows(results: Mapping[str, Any], metric: str = "p_at_1") -> list[dict[str, Any]]:
    """One row per relation, then macro, micro and the types: names, and the metric of every method."""
    methods = methods_in_order(results)
    scores = {method: results["methods"][method] for method in methods}

    def row(name: str, label: str, kind: str, facts: int, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        values = [cell.get(metric) for cell in cells]
        known = [value for value in values if value is not None]
        by_method = dict(zip(methods, values, strict=True))
        manual, learned = by_method.get("manual"), by_method.get("p-tuning")
        return {
            "name": name,
            "label": label,
            "type": kind,
            "facts": facts,
            "cells": [{"text": _percent(value), "best": value is not None and value == max(known)} for value in values],
            "gain": f"{100 * (learned - manual):+.1f}" if manual is not None and learned is not None else "–",
        }

    about = results["data"]["relations"]
    rows = [
        row(name, info["label"], info["type"], info["facts"]["test"], [scores[m]["relations"].get(name, {}) for m in methods])
        for name, info in about.items()
    ]
    total = sum(info["facts"]["test"] for info in about.values())
    for name, label in (("macro", "mean over relations"), ("micro", "mean over facts")):
        rows.append(row(name, label, "", total, [scores[m][name] for m in methods]))
    types = sorted({info["type"] for info in about.values()} - {""})
    for kind in types if len(types) > 1 else ():
        facts = sum(info["facts"]["test"] for info in about.values() if info["type"] == kind)
        rows.append(row(kind, "mean over relations", kind, facts, [scores[m]["by_type"].get(kind, {}) for m in methods]))
    return rows


def summary_table(results: Mapping[str, Any]) -> Table:
    """P@1 on test of every relation and method, for a terminal; the best of a row is bold."""
    methods = methods_in_order(results)
    gain = {"manual", "p-tuning"} <= set(methods)
    backbone, data = results["backbone"], results["data"]
    table = Table(title=f"P@1 on test: {backbone['name']}, {data['name']}, among {data['vocabulary']['name']}")
    for column in ("relation", "label", "type"):
        table.add_column(column)
    for column in ("facts", *methods, *(["gain"] if gain else [])):
        table.add_column(column, justify="right")
    for row in _rows(results):
        if row["name"] == "macro":
            table.add_section()
        cells = [f"[bold]{c['text']}[/bold]" if c["best"] else c["text"] for c in row["cells"]]
        label = row["label"].replace("[", r"\[")
        table.add_row(row["name"], label, row["type"], str(row["facts"]), *cells, *([row["gain"]] if gain else []))
    return table


# --------------------------------------------------------------------------------------------------------------- charts


def scores_chart(results: Mapping[str, Any]) -> Figure:
    """Grouped horizontal bars: P@1 of every relation and method, and the macro mean."""
    methods = methods_in_order(results)
    names = [*results["data"]["relations"], "macro"]
    labels = [f"{n}  {results['data']['relations'][n]['label']}" if n != "macro" else "macro mean" for n in names]
    labels = [label if len(label) <= 34 else label[:33] + "…" for label in labels]
    thick = 0.8 / len(methods)
    figure = Figure(figsize=(8, 1.2 + len(names) * max(0.32, 0.17 * len(methods))), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        scores = results["methods"][method]
        cells = [scores["macro"] if name == "macro" else scores["relations"].get(name, {}) for name in names]
        values = [100 * (cell.get("p_at_1") or 0) for cell in cells]
        places = [row + (i - (len(methods) - 1) / 2) * thick for row in range(len(names))]
        bars = axes.barh(places, values, 0.92 * thick, color=_COLORS.get(method, "#444444"), label=method)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axhline(len(names) - 1.5, color="#444444", linewidth=0.8)
    axes.set_xlim(0, 105)
    axes.set_xlabel("precision at 1 on test, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(methods)), frameon=False)
    return figure


def learning_chart(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Small multiples, one per relation: P@1 on dev and training loss over epochs; the dot is the chosen epoch."""
    relations = list(dict.fromkeys(line["relation"] for line in log))
    columns = min(3, len(relations))
    rows = math.ceil(len(relations) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.4, 2.1 * rows + 0.6), layout="constrained")
    for i, relation in enumerate(relations):
        lines = [line for line in log if line["relation"] == relation]
        epochs = [line["epoch"] for line in lines]
        scores = [100 * line["dev_p_at_1"] for line in lines]
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.plot(epochs, scores, color=_DEV_COLOR)
        chosen = [line for line in lines if line["best"]]
        if chosen:
            axes.plot(chosen[-1]["epoch"], 100 * chosen[-1]["dev_p_at_1"], "o", color=_DEV_COLOR)
        axes.set_title(relation, fontsize=10)
        axes.set_ylim(-3, 103)
        axes.tick_params(axis="y", colors=_DEV_COLOR, labelsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
        loss = axes.twinx()
        loss.plot(epochs, [line["train_loss"] for line in lines], color=_LOSS_COLOR, linewidth=1, linestyle="--")
        loss.set_ylim(bottom=0)
        loss.tick_params(axis="y", colors=_LOSS_COLOR, labelsize=7)
    figure.supxlabel("epoch", fontsize=9)
    figure.suptitle("P@1 on dev, % (solid, left) and training loss (dashed, right)", fontsize=10)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=150)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------- page


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of log.jsonl; a last line that is being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_report(run: Path) -> Path:
    """Make report.html (self-contained) and the charts as PNG from a run's results; returns the page's path."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    log = read_log(run / "log.jsonl")
    charts = {"scores": _png(scores_chart(results))}
    if log:
        charts["learning_curves"] = _png(learning_chart(log))
    for name, png in charts.items():
        write_file(run / f"{name}.png", png)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("megaprompt", "."), autoescape=True)
    environment.filters["percent"] = _percent
    page = environment.get_template("report.html.jinja").render(
        results=results,
        methods=methods_in_order(results),
        rows=_rows(results),
        charts={name: base64.b64encode(png).decode() for name, png in charts.items()},
    )
    write_file(run / "report.html", page.encode())
    return run / "report.html"
