"""Several runs joined into the paper's Table 2: a row per backbone, a cell per method, each a mean over seeds.

join([read_run(Path("runs/gpt2-xl")), read_run(Path("runs/bert-large"))]).rows[0].cells["p-tuning"].mean()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megaprompt.errors import MegapromptError
from megaprompt.report.cited import cited_scores
from megaprompt.report.runs import Run, Scoring, divergence, plural
from megaprompt.report.settings import Settings, is_control_of, label_of, setups_of
from megaprompt.report.tables import MARK, compared, few_in_row, leaders, methods_in_order, over_the_same

Average = Literal["macro", "micro"]
RANDOM = "random weights"
"""The control on the same architecture with random weights."""


@dataclass(frozen=True)
class Cell:
    """A method on a backbone: one run per seed."""

    runs: tuple[Run, ...]
    scores: np.ndarray  # [runs, relations] the score on test, %; NaN for a relation that diverged with some seed
    facts: np.ndarray  # [runs, relations] in test
    diverged: bool  # a relation did, with or without a score

    @property
    def scored(self) -> np.ndarray:
        """Which relations [relations] (bool) the averages are over."""
        return np.isfinite(self.scores).all(0)

    def mean(self, average: Average = "macro", where: np.ndarray | None = None) -> tuple[float, float | None]:
        """Mean and standard deviation (of a sample) over seeds of an average over the relations `where` [relations].

        The mean is NaN if none of them has a score. The deviation is None for a single run, and where seeds change
        nothing, as with prompts that are not learned.
        """
        over = self.scored if where is None else self.scored & where
        if not over.any():
            return math.nan, None
        weights = self.facts[:, over] if average == "micro" else np.ones_like(self.facts[:, over])
        of_run = (self.scores[:, over] * weights).sum(1) / weights.sum(1)
        return float(of_run.mean()), float(of_run.std(ddof=1)) if np.ptp(of_run) > 0 else None


@dataclass(frozen=True)
class BackboneRow:
    """A backbone, as it was set up, and all its methods."""

    name: str
    cells: dict[str, Cell]  # by method
    cited: dict[str, float | str]  # the paper's, by method
    controls: dict[str, dict[str, Cell]] = field(default_factory=dict)  # `on wiki_uni`, `random weights` -> by method

    def means(self, average: Average = "macro") -> dict[str, float]:
        """The averages of the methods that have one."""
        found = {method: cell.mean(average)[0] for method, cell in self.cells.items()}
        return {method: mean for method, mean in found.items() if math.isfinite(mean)}

    def comparable(self, average: Average = "macro") -> dict[str, float]:
        """The averages without those over other relations than those of most methods."""
        means = self.means(average)
        scored = {method: frozenset(np.flatnonzero(self.cells[method].scored)) for method in means}
        return {method: means[method] for method in over_the_same(scored)}

    def best(self, average: Average = "macro") -> set[str]:
        return leaders(self.comparable(average))

    def difference(self, method: str, other: str, average: Average = "macro") -> float | None:
        """Of the averages of two methods over the relations that both have scores of; None if there are none."""
        cells = [self.cells[each] for each in (method, other) if each in self.cells]
        if len(cells) < 2:
            return None
        both = cells[0].scored & cells[1].scored
        gap = cells[0].mean(average, both)[0] - cells[1].mean(average, both)[0]
        return gap if math.isfinite(gap) else None

    def methods_by_runs(self) -> dict[tuple[str, ...], list[str]]:
        """Which methods come from the same runs (their directories)."""
        found: dict[tuple[str, ...], list[str]] = {}
        random = {f"{method}, random weights": cell for method, cell in self.controls.get(RANDOM, {}).items()}
        for method, cell in (self.cells | random).items():
            found.setdefault(tuple(str(run.path) for run in cell.runs), []).append(method)
        return found


@dataclass(frozen=True)
class Table2:
    """Runs on the same data, over the relations that all of them have."""

    data: str
    vocabulary: str | None  # the allowed answers, if they are words
    scoring: Scoring
    relations: dict[str, dict[str, Any]]  # label, type, ... by name
    rows: list[BackboneRow]
    methods: list[str]
    notes: list[str]  # what a reader has to know before comparing

    @property
    def averages(self) -> list[Average]:
        """The averages of the score that mean something."""
        return ["macro", "micro"] if self.scoring.has_micro else ["macro"]

    def types(self) -> dict[str, np.ndarray]:
        """Which relations [relations] (bool) are of each type."""
        kinds = np.array([about["type"] for about in self.relations.values()])
        return {kind or "no type": kinds == kind for kind in sorted(set(kinds.tolist()))}

    def about(self) -> str:
        """On which data."""
        among = f", among {self.vocabulary}" if self.vocabulary else ""
        return f"{self.data}, {plural(len(self.relations), self.scoring.words.group)}{among}"


# ------------------------------------------------------------------------------------------------------------- joining


def join(runs: Sequence[Run]) -> Table2:
    """Put runs on the same data together. Runs that differ only in the seed make one row, with means over seeds.

    Raises:
        MegapromptError: the runs are on different data, or have no relation in common.
    """
    _check_alike(runs)
    first = runs[0].results["data"]
    scoring = Scoring.of(runs[0].results)
    setups, controls = _with_controls(runs)
    everyone, runs = runs, [run for _, members in setups for run in members]
    everywhere = [name for name in first["relations"] if all(_has_facts(run, name) for run in runs)]
    if not everywhere:
        raise MegapromptError(
            f"the runs have no {scoring.words.group} in common; give runs over the same {scoring.groups}"
        )
    names = {name: None for run in runs for name in run.results["data"]["relations"]}
    notes = [f"{run.path} is not complete: its scores so far." for run in everyone if not run.results.get("complete")]
    if missing := [name for name in names if name not in everywhere]:
        count = plural(len(missing), scoring.words.group)
        over = f"Over the {plural(len(everywhere), scoring.words.group)} of all runs."
        notes.append(f"{over} Left out: {count} ({', '.join(missing)}).")
    vocabulary = first["vocabulary"]["name"] if first["vocabulary"] else None
    rows, few = [], list[str]()
    for (settings, members), of_row in zip(setups, controls, strict=True):
        label = label_of(settings, [other for other, _ in setups])
        paper = {} if members[0].control else cited_scores(members[0].results["backbone"], vocabulary, everywhere)
        cells = _cells(label, members, everywhere, scoring, notes)
        few += few_in_row(label, [run.results for run in members], everywhere)
        rows.append(BackboneRow(label, cells, paper, _control_cells(cells, of_row, everywhere, scoring)))
    notes += _notes_on_counts(rows, scoring, vocabulary)
    notes += few
    methods = methods_in_order({method for row in rows for method in row.cells})
    relations = {name: first["relations"][name] for name in everywhere}
    return Table2(first["name"], vocabulary, scoring, relations, rows, methods, notes)


def _check_alike(runs: Sequence[Run]) -> None:
    """See that runs can stand in one table."""

    def told(run: Run) -> dict[str, str]:
        data, scoring = run.results["data"], Scoring.of(run.results)
        vocabulary = data["vocabulary"]["name"] if data["vocabulary"] else "none"
        return {"data": data["name"], "vocabulary": vocabulary, "score": f"{scoring.score} of {scoring.items}"}

    first = told(runs[0])
    for run in runs:
        for what, mine in told(run).items():
            if mine != first[what]:
                where = f"{run.path}: its {what} is {mine}, that of {runs[0].path} is {first[what]}"
                raise MegapromptError(f"{where}; give runs on the same data and --vocab")


def _has_facts(run: Run, relation: str) -> bool:
    about = run.results["data"]["relations"].get(relation)
    return about is not None and about["facts"]["test"] > 0


def _cells(
    label: str, runs: Sequence[Run], relations: Sequence[str], scoring: Scoring, notes: list[str]
) -> dict[str, Cell]:
    """The cells of one row; notes get what had to be left out, and what diverged."""
    cells = {}
    for method in methods_in_order({method for run in runs for method in run.results["methods"]}):
        chosen: dict[Any, Run] = {}  # by seed
        for run in runs:
            seed = run.options.get("seed", str(run.path))
            if not _is_usable(label, run, method, relations, scoring, notes):
                continue
            other = chosen.setdefault(seed, run)
            if any(
                scoring.percent_of(run.row(method, n)) != scoring.percent_of(other.row(method, n)) for n in relations
            ):
                notes.append(f"{label}, {method}: left out of {run.path}, which has the seed of {other.path}.")
        if not chosen:
            continue
        rows = [[run.row(method, name) for name in relations] for run in chosen.values()]
        scores = np.array([[scoring.percent_of(row) for row in of_run] for of_run in rows], dtype=float)
        scores[:, ~np.isfinite(scores).all(0)] = np.nan  # all seeds are averaged over the same relations
        facts = np.array([[float(row["facts"]) for row in of_run] for of_run in rows])
        diverged = any(row.get("diverged") for of_run in rows for row in of_run)
        cell = cells[method] = Cell(tuple(chosen.values()), scores, facts, diverged)
        if cell.scored.sum() < len(relations):
            over = f"over {cell.scored.sum()} of {len(relations)} {scoring.groups}"
            notes.append(f"{MARK.strip()} {label}, {method}: averages {over}. {compared(scoring)}")
    return cells


def _with_controls(runs: Sequence[Run]) -> tuple[list[tuple[Settings, list[Run]]], list[list[Run]]]:
    """What makes the rows, and the controls of each. Controls of nothing that is there make rows themselves."""
    setups = setups_of([run for run in runs if not run.control])
    controls: list[list[Run]] = [[] for _ in setups]
    alone = []
    for run in runs:
        if run.control:
            of_rows = [
                mine for (settings, _), mine in zip(setups, controls, strict=True) if is_control_of(run, settings)
            ]
            for mine in of_rows:
                mine.append(run)
            if not of_rows:
                alone.append(run)
    others = setups_of(alone)
    return [*setups, *others], [*controls, *([] for _ in others)]


def _control_cells(
    cells: Mapping[str, Cell], controls: Sequence[Run], relations: Sequence[str], scoring: Scoring
) -> dict[str, dict[str, Cell]]:
    """The same methods on other facts, with the prompts of the cells, and on the backbone with random weights."""

    def cell(found: Sequence[tuple[Run, Mapping[str, Any]]]) -> Cell | None:
        rows = [[(of_run or {}).get(name) or {} for name in relations] for _, of_run in found]
        scores = np.array([[scoring.percent_of(row) for row in of_run] for of_run in rows], dtype=float)
        if not found or not np.isfinite(scores).all(0).any():
            return None
        scores[:, ~np.isfinite(scores).all(0)] = np.nan
        facts = np.array([[float(row.get("facts", 0)) for row in of_run] for of_run in rows])
        return Cell(
            tuple(run for run, _ in found), scores, facts, any(row.get("diverged") for of_run in rows for row in of_run)
        )

    result: dict[str, dict[str, Cell]] = {}
    for method, measured in cells.items():
        for name in dict.fromkeys(name for run in measured.runs for name in run.evaluations):
            of_runs = [(run, run.evaluations.get(name, {}).get("methods", {}).get(method)) for run in measured.runs]
            if one := cell([(run, found["relations"]) for run, found in of_runs if found]):
                result.setdefault(f"on {name}", {})[method] = one
        by_seed = {run.options.get("seed", str(run.path)): run for run in reversed(controls)}
        random = [(run, run.results["methods"].get(method)) for run in by_seed.values()]
        if one := cell([(run, found["relations"]) for run, found in random if found]):
            result.setdefault(RANDOM, {})[method] = one
    return result


def _is_usable(label: str, run: Run, method: str, relations: Sequence[str], scoring: Scoring, notes: list[str]) -> bool:
    """Whether a run has a score of every relation that did not diverge; notes get what is lacking."""
    lacking = [name for name in relations if scoring.percent_of(run.row(method, name)) is None]
    unexplained = [name for name in lacking if not run.row(method, name).get("diverged")]
    if unexplained:
        if len(lacking) < len(relations):
            why = f"which has no score of {', '.join(unexplained)}"
            notes.append(f"{label}, {method}: left out of {run.path}, {why}.")
        return False
    for name in relations:
        if run.row(method, name).get("diverged"):
            sentence = divergence(method, name, run.row(method, name), name not in lacking)
            notes.append(f"{MARK.strip()} {run.path}, {sentence}")
    return len(lacking) < len(relations)


def _notes_on_counts(rows: Sequence[BackboneRow], scoring: Scoring, vocabulary: str | None) -> list[str]:
    """What to say if the rows are about different numbers of test items."""
    counts = {row.name: {int(n) for cell in row.cells.values() for n in cell.facts.sum(1)} for row in rows}
    if len(set().union(*counts.values())) <= 1:
        return []
    told = ", ".join(f"{name} {' or '.join(map(str, sorted(n)))}" for name, n in counts.items() if n)
    why = "--limit-examples, or their data, may differ."
    if scoring.items == "facts":
        why = "--limit-facts, or their data, may differ."
    if vocabulary is not None:
        why = "an object has to be one token of the backbone, and --limit-facts may differ. Compare backbones with a "
        why += "vocabulary that they share."
    return [f"The rows have different numbers of test {scoring.items} ({told}): {why}"]
