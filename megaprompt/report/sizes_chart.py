"""What the size of a model does to each way of asking it."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from megaprompt.report.charts import method_colors
from megaprompt.report.table2 import BackboneRow, Table2


def sizes_chart(table: Table2) -> Figure | None:
    """The macro mean of each method against the number of parameters, a line for each method; whiskers are the standard
    deviation over seeds.

    Returns:
        None where the backbones are all of one size.
    """
    rows = sorted(((_parameters(row), row) for row in table.rows if row.cells), key=lambda pair: pair[0])
    sizes = sorted({parameters for parameters, _ in rows if parameters})
    if len(sizes) < 2:
        return None
    colors = method_colors(table.methods)
    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.add_axes((0.08, 0.11, 0.7, 0.66))
    ends: list[tuple[float, int, str]] = []  # the height and the size at which each line ends
    for method in table.methods:
        found = [(size, *row.cells[method].mean()) for size, row in rows if size and method in row.cells]
        found = [(size, mean, deviation) for size, mean, deviation in found if math.isfinite(mean)]
        if found:
            places, means, deviations = zip(*found, strict=True)
            spread = [deviation or 0.0 for deviation in deviations]
            axes.errorbar(places, means, yerr=spread, marker="o", markersize=4, color=colors[method], capsize=2)
            ends.append((means[-1], places[-1], method))
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(lambda size, _: _text(round(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 100)
    axes.set_xlabel("parameters", fontsize=8.5)
    axes.set_ylabel(f"mean {table.scoring.heading} on test, %", fontsize=8.5, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for size, names in _names(rows).items():
        axes.annotate(
            "\n".join(names), (size, 1.02), xycoords=("data", "axes fraction"), ha="left", va="bottom", fontsize=7.5,
            rotation=25, rotation_mode="anchor", parse_math=False,
        )  # fmt: skip
    below = -math.inf
    for height, size, method in sorted(ends):  # names beside the ends of their lines, but not over each other
        below = max(height, below + 4.5)
        axes.annotate(
            method, (size, height), (1.03, below / 100), textcoords="axes fraction", va="center", fontsize=8.5,
            color=colors[method], parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
        )  # fmt: skip
    return figure


def _parameters(row: BackboneRow) -> int:
    """Of a backbone; 0 if its runs do not tell."""
    runs = next(iter(row.cells.values())).runs
    return int(runs[0].results["backbone"].get("parameters") or 0)


def _names(rows: list[tuple[int, BackboneRow]]) -> dict[int, list[str]]:
    """The backbones of each size, shortened."""
    names: dict[int, list[str]] = {}
    for size, row in rows:
        name = row.name.rsplit("/", 1)[-1]
        if size:
            names.setdefault(size, []).append(name if len(name) <= 30 else f"{name[:28]} …")
    return names


def _text(parameters: int) -> str:
    """134515008 as 135M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)
