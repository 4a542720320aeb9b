"""Scores of one run as tables: what was scored, how numbers are printed, and the table in the terminal.

rich.print(summary_table(read_run(Path("runs/first")).results))
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.errors import MegapromptError, UsageError

DISCRETE = ("majority", "manual", "lpaqa", "autoprompt")
TRAINED = ("fine-tuning", "manual+fine-tuning", "p-tuning")


def methods_in_order(methods: Iterable[str]) -> list[str]:
    """Methods as tables and charts show them: majority, manual and other written prompts, then those that train."""

    def place(method: str) -> tuple[int, str]:
        if method in TRAINED:
            return len(DISCRETE) + 1 + TRAINED.index(method), method
        name = method.removesuffix(" best").removesuffix(" ensemble")  # of a file with several prompts for a relation
        return (DISCRETE.index(name) if name in DISCRETE else len(DISCRETE)), method

    return sorted(methods, key=place)


def known(value: Any) -> bool:
    """Whether a score is a number at all."""
    return isinstance(value, int | float) and math.isfinite(value)


def percent(value: Any) -> str:
    return f"{100 * value:.1f}" if known(value) else "–"


def points(difference: float) -> str:
    """A difference of two scores in per cent, with its sign."""
    return f"{round(difference, 1) or 0.0:+.1f}".replace("-", "−")  # never -0.0


# -------------------------------------------------------------------------------------------------------- runs on disk


@dataclass(frozen=True)
class Run:
    """What a run has written so far."""

    path: Path
    results: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # of config.yaml; none if there is no such file

    def row(self, method: str, relation: str) -> Mapping[str, Any]:
        """The scores of a method on a relation; empty if there are none."""
        return ((self.results["methods"].get(method) or {}).get("relations") or {}).get(relation) or {}


def read_run(path: Path) -> Run:
    """Read a run. What follows the last newline of its log is still being written and is left out.

    Raises:
        UsageError: there is no run.
        MegapromptError: a file is damaged, or of another version.
    """
    file = path / "results.json"
    if not file.is_file():
        raise UsageError(f"{path}: holds no results.json; give the directory of a run, or of several")
    try:
        results = json.loads(file.read_bytes())
        file = path / "log.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        log = [json.loads(line) for line in lines]
        file = path / "config.yaml"
        options = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise MegapromptError(f"{file}: is damaged ({' '.join(str(error).split())}); run the probe again") from error
    if not isinstance(results, dict) or (results.get("format") != 1 and results.get("schema") != 2):
        raise MegapromptError(f"{path / 'results.json'}: was not written by this version of megaprompt; run it again")
    return Run(path, results, log, options if isinstance(options, dict) else {})


# ------------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Row:
    """A relation or an average of one run, and what each method scored there."""

    name: str
    label: str
    type: str
    facts: int  # in test
    cells: dict[str, Mapping[str, Any]]  # method -> p_at_1, p_at_10, mrr, ...; empty if it was not scored

    def scores(self) -> dict[str, float]:
        """P@1 in per cent of the methods that have one."""
        return {m: 100 * cell["p_at_1"] for m, cell in self.cells.items() if known(cell.get("p_at_1"))}

    def best(self, method: str) -> bool:
        return method in leaders(self.scores())

    def gain(self) -> str:
        """P-tuning over manual prompts, in points."""
        scores = self.scores()
        both = {"manual", "p-tuning"} <= set(scores)
        return points(scores["p-tuning"] - scores["manual"]) if both else "–"


def leaders(scores: Mapping[str, float]) -> set[str]:
    """The methods with the best score, to the digits that are shown; none if all are the same."""
    shown = {method: round(score, 1) for method, score in scores.items()}
    best = max(shown.values(), default=0.0)
    return {m for m, score in shown.items() if score == best} if len(set(shown.values())) > 1 else set()


def rows_of(results: Mapping[str, Any]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of relations, of the averages macro and micro, and of the relation types if there are several."""
    methods = {method: results["methods"][method] for method in methods_in_order(results["methods"])}
    about = results["data"]["relations"]

    def row(name: str, label: str, kind: str, over: Sequence[str], *path: str) -> Row:
        cells = {}
        for method, found in methods.items():
            for key in path:
                found = (found or {}).get(key)
            cells[method] = found or {}
        return Row(name, label, kind, sum(about[relation]["facts"]["test"] for relation in over), cells)

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
    """P@1 on test of every relation and method of one run, for a terminal; the best of a row is bold."""
    methods = methods_in_order(results["methods"])
    gain = {"manual", "p-tuning"} <= set(methods)
    backbone, data = results["backbone"]["name"], results["data"]
    title = f"P@1 on test, %: {backbone}, {data['name']}, among {data['vocabulary']['name']}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("relation", "label", "type"):
        table.add_column(column, overflow="fold", no_wrap=column != "label")
    for column in ("test\nfacts", *methods, *(["gain"] if gain else [])):
        table.add_column(Text(column), justify="right", no_wrap=True)
    relations, averages, _ = rows_of(results)
    for i, row in enumerate((*relations, *averages)):
        if i == len(relations):
            table.add_section()
        words = (row.name, row.label if i < len(relations) else "", row.type, str(row.facts))
        scores = [Text(percent(c.get("p_at_1")), "bold" if row.best(m) else "") for m, c in row.cells.items()]
        table.add_row(*map(Text, words), *scores, *([Text(row.gain())] if gain else []))
    return table
