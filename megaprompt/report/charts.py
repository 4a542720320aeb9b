"""Charts of scores and of learning, as matplotlib figures.

scores_chart(results).savefig("scores.png")
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

from megaprompt.report.runs import Scoring, beside, plural
from megaprompt.report.table2 import BackboneRow, Table2
from megaprompt.report.tables import methods_in_order, rows_of

_COLORS = {  # Okabe and Ito's palette, readable with every kind of colour vision
    "majority": "#999999",
    "manual": "#E69F00",
    "best-manual": "#DDCC77",
    "in-context": "#882255",
    "lpaqa": "#CC79A7",
    "autoprompt": "#333333",
    "fine-tuning": "#56B4E9",
    "manual+fine-tuning": "#009E73",
    "p-tuning+fine-tuning": "#332288",
    "p-tuning": "#0072B2",
    "best": "#D55E00",
}
_MORE_COLORS = ("#117733", "#AA4499", "#000000")  # of Paul Tol's, as two above, for methods not known here
_MARKERS = {"majority": "|", "manual": "s", "lpaqa": "D", "autoprompt": "^", "p-tuning": "o", "best": "*"}
_MARKERS |= {"best-manual": "p", "in-context": "X", "fine-tuning": "v", "manual+fine-tuning": "<"}
_MARKERS |= {"p-tuning+fine-tuning": ">"}
_MORE_MARKERS = "Phd"
_DEV_COLOR, _LOSS_COLOR = "#0072B2", "#D55E00"


def method_colors(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in all charts."""
    spare = [*(color for method, color in _COLORS.items() if method not in methods), *_MORE_COLORS]
    others = [method for method in methods if method not in _COLORS]
    return {m: _COLORS[m] if m in _COLORS else spare[others.index(m) % len(spare)] for m in methods}


# Relations in one chart that still fits a printed page, across whose width it is scaled.
LEARNING_PER_PAGE = 18


def scores_per_page(methods: Sequence[str]) -> int:
    """As LEARNING_PER_PAGE, for `scores_chart`; one line is the macro mean."""
    return max(1, int(9 / _pitch(len(methods))) - 1)


def page_parts(relations: Sequence[str], fit: int) -> list[list[str]]:
    """Relations in as few parts as can be, of about the same size and at most `fit` each."""
    return [part.tolist() for part in np.array_split(np.array(relations), math.ceil(len(relations) / fit))]


def _pitch(methods: int) -> float:
    """Inches that the bars of one relation take, with the space to the next."""
    return max(0.14, 0.3 / methods) * methods + 0.14


def scores_chart(results: Mapping[str, Any]) -> Figure:
    """Grouped horizontal bars: the score of every relation and method, and the macro mean."""
    methods = methods_in_order(results["methods"])
    colors = method_colors(methods)
    relations, averages, _ = rows_of(results)
    rows = [*relations, *averages[: len(relations) > 1]]
    pitch = _pitch(len(methods))
    bar = (pitch - 0.14) / len(methods)  # inches
    figure = Figure(figsize=(8, 1.3 + pitch * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        scores = [row.scores().get(method) for row in rows]
        middles = [place + (i - (len(methods) - 1) / 2) * bar / pitch for place in range(len(rows))]
        lengths = [score or 0 for score in scores]
        bars = axes.barh(middles, lengths, 0.9 * bar / pitch, color=colors[method], label=method)
        axes.bar_label(bars, ["–" if s is None else f"{s:.0f}" for s in scores], padding=2, fontsize=7)
    labels = [*(_named(row.name, row.label) for row in relations), "macro mean"][: len(rows)]
    labels = ["\n".join(textwrap.wrap(label, 30, max_lines=2, placeholder=" …")) for label in labels]
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5, linespacing=1, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if len(rows) > len(relations):
        axes.axhline(len(relations) - 0.5, color="#444444", linewidth=0.8)
    axes.set_xlim(0, 105)
    axes.set_xlabel(f"{Scoring.of(results).heading} on test, %", parse_math=False)
    axes.tick_params(axis="x", top=len(rows) > 15, labeltop=len(rows) > 15)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _plain(figure.legend(loc="outside upper center", ncols=min(4, len(methods)), frameon=False))
    return figure


def learning_chart(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Figure:
    """Small multiples, one per relation: score on dev and training loss over steps; the dot is what was chosen.

    Args:
        log: lines about scores on dev, of one method.
    """
    scoring = Scoring.of(results)
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
        steps, dev, train = (
            np.array([line.get(key) for line in lines], dtype=float) for key in ("step", scoring.dev, "train_loss")
        )
        chosen = [k for k, line in enumerate(lines) if line.get("best")][-1:]
        axes = figure.add_subplot(rows, columns, i + 1)
        loss = axes.twinx()
        axes.set_zorder(1)  # the dot lies on top
        axes.patch.set_visible(False)
        of_dev = f"{scoring.heading} on dev, % (left)"
        handles = axes.plot(steps, 100 * dev, ".-", color=_DEV_COLOR, ms=3, lw=1.2, label=of_dev)
        handles += loss.plot(steps, train, ".--", color=_LOSS_COLOR, ms=3, lw=1.2, label="training loss (right)")
        handles += axes.plot(steps[chosen], 100 * dev[chosen], "o", color=_DEV_COLOR, label="chosen")
        label = results["data"]["relations"].get(name, {}).get("label", "")
        axes.set_title(textwrap.shorten(_named(name, label), 38, placeholder=" …"), fontsize=9, parse_math=False)
        axes.set_ylim(-4, 104)
        loss.set_ylim(bottom=0)
        axes.set_xlim(0, 1.04 * steps.max())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", colors=_DEV_COLOR, labelsize=7)
        loss.tick_params(axis="y", colors=_LOSS_COLOR, labelsize=7)
        axes.spines["top"].set_visible(False)
        loss.spines["top"].set_visible(False)
        if i + columns >= len(lines_of):  # nothing stands below
            axes.set_xlabel("step", fontsize=8)
        if i == 0:
            _plain(figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, fontsize=9))
    return figure


def _named(relation: str, label: str) -> str:
    """`P36 capital`."""
    return f"{relation} {beside(relation, label)}".strip()


def _plain(legend: Legend) -> None:
    """Names of methods are free text, in which a dollar sign begins no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


# -------------------------------------------------------------------------------------------------------- several runs


def relations_chart(table: Table2) -> Figure:
    """Score of every relation: a panel per backbone, a line per relation, a mark per method; bars are the deviation."""
    colors = method_colors(table.methods)
    labels = [_named(name, about["label"]) for name, about in table.relations.items()]
    labels = ["\n".join(textwrap.wrap(label, 30, max_lines=2, placeholder=" …")) for label in labels]
    columns = min(2, len(table.rows))
    lines = math.ceil(len(table.rows) / columns)
    pitch = max(0.3, 0.065 * len(table.methods))  # inches per relation
    # Lengths in inches, as in learning_chart.
    left, panel, between, right, bottom, title = 2.3, 3.4, 0.25, 0.2, 0.5, 0.65
    legend = 0.1 + 0.22 * math.ceil(len(table.methods) / 4)
    across, height = left + columns * panel + (columns - 1) * between + right, pitch * len(labels)
    down = legend + lines * (title + height + bottom)
    figure = Figure(figsize=(across, down))
    marks: dict[str, Any] = {}
    for number, row in enumerate(table.rows):
        line, column = divmod(number, columns)
        below = down - legend - line * (title + height + bottom) - title - height
        x = left + column * (panel + between)
        axes = figure.add_axes((x / across, below / down, panel / across, height / down))
        for i in range(0, len(labels), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#f3f3f3", linewidth=0)
        for i, method in enumerate(table.methods):
            if method in row.cells:
                scores = row.cells[method].scores  # [seeds, relations]
                places = np.arange(len(labels)) + 0.7 * ((i + 0.5) / len(table.methods) - 0.5)
                deviation = scores.std(0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])
                marker = _MARKERS.get(method) or _MORE_MARKERS[i % len(_MORE_MARKERS)]
                marks[method] = axes.errorbar(
                    scores.mean(0), places, xerr=deviation, fmt=marker, color=colors[method],
                    markersize=3.5, markeredgewidth=0.5, elinewidth=0.8, label=method,
                )  # fmt: skip
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels if column == 0 else [], fontsize=7.5, linespacing=0.95)
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(-2, 102)
        axes.set_xticks(range(0, 101, 20))
        axes.tick_params(axis="x", top=True, labeltop=True, labelsize=7.5)
        axes.set_xlabel(f"{table.scoring.heading} on test, %", fontsize=8, parse_math=False)
        _title(axes, row, 46)
    shown = [marks[method] for method in table.methods if method in marks]
    _legend_above(figure, shown, 4)
    return figure


def types_chart(table: Table2) -> Figure:
    """Mean score over the relations of each type, and over all: a panel per backbone; whiskers are the deviation."""
    colors = method_colors(table.methods)
    types = table.types()
    everything = np.ones(len(table.relations), dtype=bool)
    groups = {**types, "all": everything} if len(types) > 1 else {"all": everything}
    bar, gap = 0.27, 0.35  # inches
    group = bar * len(table.methods) + gap
    left, right, panel, title, bottom = 0.6, 0.2, 1.9, 0.4, 0.5
    columns = 1 if len(groups) * group > 4.2 else 2
    columns = min(columns, len(table.rows))
    width = max(len(groups) * group, 4.4 if columns == 1 else 2.2)
    lines = math.ceil(len(table.rows) / columns)
    fit = max(1, int((left + columns * (width + left) + right - 0.3) / 1.7))  # names beside each other in the legend
    legend = 0.1 + 0.22 * math.ceil(len(table.methods) / fit)
    across = columns * (left + width) + right
    down = legend + lines * (title + panel + bottom)
    figure = Figure(figsize=(across, down))
    bars: dict[str, Any] = {}
    for number, row in enumerate(table.rows):
        line, column = divmod(number, columns)
        x, below = left + column * (width + left), down - legend - (line + 1) * (title + panel + bottom) + bottom
        axes = figure.add_axes((x / across, below / down, width / across, panel / down))
        for i, method in enumerate(table.methods):
            if method not in row.cells:
                continue
            found = [row.cells[method].mean("macro", where) for where in groups.values()]
            means, deviations = [mean for mean, _ in found], [deviation or 0.0 for _, deviation in found]
            middles = [place + (i - (len(table.methods) - 1) / 2) * bar / group for place in range(len(groups))]
            bars[method] = axes.bar(middles, means, 0.9 * bar / group, color=colors[method], label=method)
            for place, mean, deviation in zip(middles, means, deviations, strict=True):
                if math.isfinite(mean):
                    axes.text(place, mean + deviation + 1.5, f"{mean:.0f}", ha="center", va="bottom", fontsize=7)
            if any(deviations):
                axes.errorbar(middles, means, yerr=deviations, fmt="none", ecolor="#222222", elinewidth=0.8)
        group_name = table.scoring.words.group
        counts = [f"{name}\n{plural(int(where.sum()), group_name)}" for name, where in groups.items()]
        axes.set_xticks(range(len(groups)), counts, fontsize=8, parse_math=False)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", labelsize=7.5)
        axes.set_ylabel(f"{table.scoring.heading} on test, %", fontsize=8, parse_math=False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _title(axes, row, round(11 * width))
    shown = [bars[method] for method in table.methods if method in bars]
    _legend_above(figure, shown, fit)
    return figure


def _legend_above(figure: Figure, shown: Sequence[Any], fit: int) -> None:
    """A legend in lines of about the same length, of at most `fit` names."""
    columns = math.ceil(len(shown) / max(1, math.ceil(len(shown) / fit)))
    _plain(figure.legend(handles=shown, loc="upper center", ncols=columns, frameon=False, fontsize=8.5))


def _title(axes: Axes, row: BackboneRow, letters: int) -> None:
    title = row.name if len(row.name) <= letters else row.name[: letters - 2] + " …"
    axes.set_title(title, fontsize=9.5, parse_math=False, loc="left")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
