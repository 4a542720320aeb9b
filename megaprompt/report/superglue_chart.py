"""The paper's Figure 1: the average over SuperGLUE's tasks, by model and method."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from megaprompt.report.charts import method_colors
from megaprompt.report.superglue import AVERAGE, SuperGlueTable, Value

_BAR, _TITLE = 0.24, 0.42  # inches


def averages_chart(table: SuperGlueTable) -> Figure | None:
    """Bars of the averages, a panel for each backbone; whiskers are 95 % intervals, hatched bars the paper's.

    Returns:
        None if there is no average.
    """
    colors = method_colors(list(dict.fromkeys(line.method for block in table.blocks for line in block.lines)))
    panels: list[tuple[str, list[tuple[str, Value, str | None]]]] = []  # name -> label, value, colour if measured
    for block in table.blocks:
        bars: list[tuple[str, Value, str | None]] = [
            (line.heading, line.values[AVERAGE], colors[line.method])
            for line in block.lines
            if math.isfinite(line.values[AVERAGE].mean)
        ]
        if bars:
            for cited in block.cited.lines if block.cited else ():
                average = table.cited_values(cited)[AVERAGE]
                if isinstance(average, float):
                    bars.append((f"{cited.what} †", Value(average), None))
            panels.append((block.backbone, bars))
    if not panels:
        return None
    left, across, bottom = 2.5, 8.0, 0.5
    down = bottom + sum(_TITLE + _BAR * len(bars) for _, bars in panels)
    figure = Figure(figsize=(across, down))
    top = down
    for name, bars in panels:
        height = _BAR * len(bars)
        top -= _TITLE + height
        axes = figure.add_axes((left / across, top / down, (across - left - 0.4) / across, height / down))
        for place, (_, value, color) in enumerate(bars):
            outline, hatch = color or "#777777", "" if color else "////"
            axes.barh(place, value.mean, 0.78, color=color or "white", edgecolor=outline, hatch=hatch)
            end = value.mean
            if value.interval is not None:
                low, high = value.interval
                axes.plot((low, high), (place, place), color="#222222", linewidth=1)
                end = max(end, high)
            axes.text(end + 1, place, value.text, va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8.5, parse_math=False)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 105)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8, labelbottom=name == panels[-1][0])
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name if len(name) <= 90 else f"{name[:88]} …", fontsize=9.5, parse_math=False, loc="left", pad=4)
    over = "over all seven tasks" if table.whole else table.average_heading
    axes.set_xlabel(f"mean score on test {over}, %", fontsize=8.5)
    return figure
