"""Runs on one model while it is trained: what is learned when, by relation.

write_series(Path("runs/training"))  # of step-0000000, step-0000500, ...
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file
from megaprompt.report.charts import LEARNING_PER_PAGE, method_colors, page_parts
from megaprompt.report.html import write_page
from megaprompt.report.runs import Run, Scoring, beside, read_run
from megaprompt.report.tables import lead_of, methods_in_order


@dataclass(frozen=True)
class Series:
    """Runs with the same questions, by the step of the training after which they were made."""

    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def scoring(self) -> Scoring:
        return Scoring.of(self.first.results)

    @property
    def labels(self) -> dict[str, str]:
        """Of the relations, by name; empty where they only repeat it."""
        about = self.first.results["data"]["relations"]
        return {name: beside(name, each["label"]) for name, each in about.items()}

    @property
    def methods(self) -> list[str]:
        """That all runs have results of."""
        return methods_in_order(
            name
            for name in self.first.results["methods"]
            if all(name in r.results["methods"] for r in self.runs.values())
        )

    @property
    def method(self) -> str:
        """That tables are about: learned prompts if there are any, else manual ones."""
        lead, methods = lead_of(self.methods), self.methods
        return lead or next((name for name in ("mean of wordings", "manual") if name in methods), methods[-1])

    def scores(self, method: str, relation: str | None = None) -> list[float]:
        """In per cent by step, of a relation or the mean over all; not a number where there is none."""
        rows = (
            run.row(method, relation) if relation else run.results["methods"][method]["macro"]
            for run in self.runs.values()
        )
        values = [self.scoring.percent_of(row) for row in rows]
        return [math.nan if value is None else value for value in values]

    def learned_at(self, relation: str | None = None) -> int | None:
        """The first step at which half of the gain over the first score was there, and never lost again; None if
        nothing was gained."""
        scores = self.scores(self.method, relation)
        best = max((score for score in scores if math.isfinite(score)), default=math.nan)
        if not best > scores[0]:
            return None
        half = (scores[0] + best) / 2
        below = [place for place, score in enumerate(scores) if not score >= half]
        return list(self.runs)[below[-1] + 1] if below[-1] + 1 < len(scores) else None


def steps_in(directory: Path) -> dict[int, Path]:
    """The runs of a series by step, in order; none if the directory is not one."""
    found = {path: re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*")}
    steps = {int(match[1]): path for path, match in found.items() if match and (path / "results.json").is_file()}
    return dict(sorted(steps.items()))


def read_series(directory: Path) -> Series:
    """Read what `megaprompt.callback` wrote.

    Raises:
        UsageError: there are no runs.
        MegapromptError: a run is damaged, or asks other things than the first.
    """
    runs = {step: read_run(path) for step, path in steps_in(directory).items()}
    if not runs:
        raise UsageError(f"{directory}: holds no runs named step-NUMBER")
    series = Series(runs)
    for run in runs.values():
        if run.results["data"]["relations"] != series.first.results["data"]["relations"]:
            raise MegapromptError(f"{run.path}: asks other facts than {series.first.path}; move one of them away")
    if not series.methods:
        raise UsageError(f"{directory}: its runs have no scores yet")
    return series


def write_series(directory: Path, out: Path | None = None) -> Path:
    """Write report.html, charts as PNG and series.csv into the directory, or another; returns the page's path.

    Raises:
        UsageError: there are no runs.
        MegapromptError: a run is damaged, or asks other things than the first, or the report cannot be written.
    """
    series, out = read_series(directory), out or directory
    names = list(series.labels)
    figures = {"means": _chart(series, [None])}
    for number, part in enumerate(page_parts(names, LEARNING_PER_PAGE), 1):
        figures[f"relations-{number}"] = _chart(series, part)
    write_file(out / "series.csv", _as_csv(series).encode())
    return write_page("series", figures, out, series=series, scoring=series.scoring, shown=_spread(list(series.runs)))


def _spread(steps: Sequence[int], most: int = 10) -> list[int]:
    """The places of at most so many of the steps, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(most, len(steps)))})


def _chart(series: Series, relations: Sequence[str | None]) -> Figure:
    """Small multiples: the score of each method over the steps of the training, by relation (None: mean over all)."""
    columns = min(3, len(relations))
    lines = math.ceil(len(relations) / columns)
    figure = Figure(figsize=(9.6, 0.6 + lines * (3.2, 2.4, 1.9)[columns - 1]), layout="constrained")
    colors = method_colors(series.methods)
    for number, relation in enumerate(relations, 1):
        axes = figure.add_subplot(lines, columns, number)
        for method in series.methods:
            scores = series.scores(method, relation)
            axes.plot(list(series.runs), scores, ".-", color=colors[method], ms=3, lw=1.2, label=method)
        title = series.scoring.average("macro") if relation is None else f"{relation} {series.labels[relation]}".strip()
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_ylim(-4, 104)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if number + columns > len(relations):  # nothing stands below
            axes.set_xlabel("step of the training", fontsize=8)
    handles, names = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _as_csv(series: Series) -> str:
    """A line for each step, method and relation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "method", "relation", f"{series.scoring.score}_percent"])
    for method in series.methods:
        for relation in (None, *series.labels):
            for step, score in zip(series.runs, series.scores(method, relation), strict=True):
                writer.writerow([step, method, relation or "macro", f"{score:.4f}" if math.isfinite(score) else ""])
    return buffer.getvalue()
