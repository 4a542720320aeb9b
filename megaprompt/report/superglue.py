"""Runs on SuperGLUE in the layout of the paper's Tables 3 to 5: a line for each backbone and method, a column for each
metric of each task.

superglue_table(join([read_run(Path("runs/gpt2")), read_run(Path("runs/bert"))])).blocks[0].lines
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megaprompt.report.cited_superglue import COLUMNS, TABLE_6, CitedLine, CitedTable, cited_table
from megaprompt.report.intervals import interval, metric_samples
from megaprompt.report.runs import Run, known, plural
from megaprompt.report.table2 import BackboneRow, Cell, Table2
from megaprompt.report.tables import leaders, methods_in_order

NAMES = {
    "majority": "majority",
    "manual": "MP zero-shot",
    "mean of patterns": "MP zero-shot, mean of patterns",
    "best-manual": "MP zero-shot, best pattern on dev",
    "in-context": "in-context",
    "fine-tuning": "fine-tuning",
    "manual+fine-tuning": "MP fine-tuning",
    "pet": "PET, mean of patterns",
    "pet-best": "PET, best pattern on dev",
    "p-tuning": "P-tuning, model frozen",
    "p-tuning+fine-tuning": "P-tuning, model tuned",
}
"""What the paper calls the methods, and what of the model is trained where that is not the paper's way."""
OVER_PATTERNS = ("mean of patterns", "pet")
"""Methods whose deviations are over patterns, not seeds."""
TASKS = tuple(dict.fromkeys(task for task, _ in COLUMNS))
AVERAGE = ("", "average")
"""The column of averages."""
Column = tuple[str, str]  # task and metric


@dataclass(frozen=True)
class Value:
    """A metric of a method on one task, or an average, %."""

    mean: float  # over seeds; NaN if unknown
    deviation: float | None = None  # of a sample, over seeds; None for one seed, and where seeds change nothing
    interval: tuple[float, float] | None = None  # 95 %, over the choice of examples; None without predictions

    @property
    def text(self) -> str:
        """`71.1 ± 0.8`; a dash if it is not known."""
        if not math.isfinite(self.mean):
            return "–"
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation is not None else "")

    @property
    def interval_text(self) -> str:
        """`65.3 to 76.2`; empty if it is not known."""
        return f"{self.interval[0]:.1f} to {self.interval[1]:.1f}" if self.interval and self.text != "–" else ""


@dataclass(frozen=True)
class Line:
    """A method on a backbone."""

    method: str
    heading: str
    seeds: int
    values: Mapping[Column, Value]


@dataclass(frozen=True)
class ByPattern:
    """A line of Table 6: accuracy on RTE with one pattern, or with what was learned, %."""

    what: str
    test: float
    dev: float
    cited: tuple[float, float] | None  # the paper's


@dataclass(frozen=True)
class Block:
    """A backbone: what was measured, and what the paper says of it."""

    backbone: str
    lines: list[Line]
    cited: CitedTable | None
    rte: list[ByPattern]
    constant: Mapping[Column, float]  # what always giving the same answer scores at best, as far as runs tell, %

    def best(self, column: Column) -> set[str]:
        """The methods with the highest value of a column, to the digits that are shown."""
        means = {line.method: line.values[column].mean for line in self.lines}
        return leaders({method: mean for method, mean in means.items() if math.isfinite(mean)})

    def no_better_than_constant(self, line: Line, column: Column) -> bool:
        """Whether always giving the same answer is as good."""
        majority = next((each for each in self.lines if each.method == "majority"), None)
        if majority is None or line is majority:
            return False
        floor = max(majority.values[column].mean, self.constant.get(column, -math.inf))
        return round(line.values[column].mean, 1) <= round(floor, 1)


@dataclass(frozen=True)
class SuperGlueTable:
    """Runs on SuperGLUE, on the tasks that all of them have."""

    setting: str  # few-shot, full
    examples: dict[str, str]  # how many of test, by task, in the paper's order
    columns: list[Column]  # of the tasks; the average is AVERAGE
    blocks: list[Block]
    chosen_on_test: bool  # as the paper did on full data

    @property
    def whole(self) -> bool:
        """Whether all tasks of the paper's average are there."""
        return len(self.examples) == len(TASKS)

    @property
    def average_heading(self) -> str:
        return "Avg." if self.whole else f"over {plural(len(self.examples), 'task')}"

    def cited_values(self, line: CitedLine) -> dict[Column, float | str]:
        """The paper's figures for the columns that are here; the average only beside one over the same tasks."""
        found = dict(zip(COLUMNS, line.values, strict=True))
        average = line.average if self.whole and line.average is not None else "–"
        return {column: found[column] for column in self.columns} | {AVERAGE: average}


def setting_of(table: Table2) -> str | None:
    """few-shot or full, if the runs are on SuperGLUE."""
    found = re.fullmatch(r"SuperGLUE \((few-shot|full)(, .*)?\)", table.data)
    return found[1] if found and {*table.relations} <= {*TASKS} else None


def superglue_table(table: Table2) -> SuperGlueTable | None:
    """The same runs in the layout of the paper's tables; None if they are on other data.

    Raises:
        MegapromptError: a file of predictions is damaged.
    """
    setting = setting_of(table)
    if setting is None:
        return None
    columns = [(task, metric) for task, metric in COLUMNS if task in table.relations]
    blocks = []
    for row in table.rows:
        lines = [
            Line(method, NAMES.get(method, method), len(row.cells[method].runs), _values(row, method, table, columns))
            for method in methods_in_order(row.cells)
        ]
        run = next((run for cell in row.cells.values() for run in cell.runs), None)
        cited = cited_table(run.results["backbone"], setting) if run and not run.control else None
        rte = rte_by_pattern(row) if "RTE" in table.relations else []
        blocks.append(Block(row.name, lines, cited, rte, _constant(row, columns)))
    examples = {task: _counts(table, task) for task in TASKS if task in table.relations}
    return SuperGlueTable(setting, examples, columns, blocks, "chosen on the validation set" in table.data)


def _counts(table: Table2, task: str) -> str:
    """How many examples of a task were scored, of all runs."""
    place = list(table.relations).index(task)
    counts = {int(n) for row in table.rows for cell in row.cells.values() for n in cell.facts[:, place]}
    return " or ".join(f"{n:,}" for n in sorted(counts))


def _constant(row: BackboneRow, columns: Sequence[Column]) -> dict[Column, float]:
    """What always giving the same answer scores at best; of the average, if all tasks tell."""
    if "majority" not in row.cells:
        return {}
    run, found = row.cells["majority"].runs[0], dict[Column, float]()
    tasks = list(dict.fromkeys(task for task, _ in columns))
    known_of = {task: run.row("majority", task).get("constant") or {} for task in tasks}
    for task, metric in columns:
        if metric in known_of[task]:
            found[task, metric] = 100 * known_of[task][metric]
    if all(known_of.values()):
        found[AVERAGE] = 100 * float(np.mean([of["score"] for of in known_of.values()]))
    return found


def rte_by_pattern(row: BackboneRow) -> list[ByPattern]:
    """The paper's Table 6 of a backbone, from its first seed: what the choice on dev is worth. Empty if only one way
    was tried."""
    lines = []
    for method, cell in row.cells.items():
        run = cell.runs[0]
        found, cites = run.row(method, "RTE"), _cites_table_6(run)
        if method in _COMPARE:
            tried = [(f"{each['name']}: {each['template']}", each["test_accuracy"], each["accuracy"], each["name"])
                     for each in found.get("tried", ()) if known(each.get("test_accuracy"))]  # fmt: skip
        elif "p-tuning" in method and known((found.get("dev") or {}).get("accuracy")):
            tried = [(NAMES.get(method, method), found["accuracy"], found["dev"]["accuracy"], NAMES.get(method))]
        else:
            tried = []
        for what, test, dev, name in tried:
            told = f"{what} ({_COMPARE[method]})" if method in _COMPARE else what
            lines.append(
                ByPattern(
                    told, 100 * test, 100 * dev, TABLE_6.get(name or "") if cites and method != "best-manual" else None
                )
            )
    return lines if len(lines) > 1 else []


_COMPARE = {"best-manual": "zero-shot", "pet-best": "PET"}
"""Methods that try several patterns, and what is done with them."""


def _cites_table_6(run: Run) -> bool:
    found = cited_table(run.results["backbone"], run.options.get("setting", ""))
    return found is not None and found.table == 5


def _values(row: BackboneRow, method: str, table: Table2, columns: Sequence[Column]) -> dict[Column, Value]:
    cell, found = row.cells[method], {}
    scores = []  # [SAMPLES] of each task, the mean of its metrics
    for task in dict.fromkeys(task for task, _ in columns):
        metrics = [metric for of_task, metric in columns if of_task == task]
        samples = metric_samples(cell.runs, method, task, metrics)
        for metric in metrics:
            mean, deviation = _over_seeds(cell.runs, method, task, metric)
            found[task, metric] = Value(mean, deviation, interval(samples[metric]) if samples else None)
        if samples:
            scores.append(np.mean([samples[metric] for metric in metrics], axis=0))
    whole = len(scores) == len(table.relations)
    average = _average(cell, interval(np.mean(scores, axis=0)) if whole else None)
    found[AVERAGE] = replace(average, deviation=None) if method in OVER_PATTERNS else average
    return found


def _average(cell: Cell, found: tuple[float, float] | None) -> Value:
    """Over all tasks; not known if one has no score."""
    return Value(*cell.mean("macro"), found) if cell.scored.all() else Value(math.nan)


def _over_seeds(runs: Sequence[Run], method: str, task: str, metric: str) -> tuple[float, float | None]:
    values = [run.row(method, task).get(metric) for run in runs]
    if not all(known(value) for value in values):
        return math.nan, None
    found = 100 * np.array(values, dtype=float)
    spread = [run.row(method, task).get(f"{metric}_deviation") for run in runs]  # over patterns, not seeds
    if all(known(value) for value in spread):
        return float(found.mean()), 100 * float(np.mean(np.array(spread, dtype=float)))
    return float(found.mean()), float(found.std(ddof=1)) if np.ptp(found) > 0 else None
