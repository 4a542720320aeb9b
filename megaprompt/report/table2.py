"""Several runs joined into the paper's Table 2: a row per backbone, a cell per method, each a mean over seeds.

join([read_run(Path("runs/gpt2-xl")), read_run(Path("runs/bert-large"))]).rows[0].cells["p-tuning"].mean()
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megaprompt.config import ProbeConfig
from megaprompt.errors import MegapromptError
from megaprompt.report.cited import cited_scores
from megaprompt.report.runs import Run, Scoring, divergence, plural
from megaprompt.report.tables import MARK, compared, leaders, methods_in_order, over_the_same

Average = Literal["macro", "micro"]
AVERAGES: tuple[Average, Average] = ("macro", "micro")

_OF_ALL_TRAINING = ("recipe", "batch_size", "max_epochs", "max_steps", "patience")
_SETTINGS = {
    "p-tuning": ("template", "encoder", "init", "learning_rate", "weight_decay", *_OF_ALL_TRAINING),
    "autoprompt": ("template", "autoprompt_steps"),
    "fine-tuning": ("fine_tuning_rate", *_OF_ALL_TRAINING[1:]),
    "manual+fine-tuning": ("fine_tuning_rate", *_OF_ALL_TRAINING[1:]),
}
"""Options that change what a method gives. The others are the same for all runs of a table, or change no results."""

_DEFAULTS: dict[str, Any] = {option.name: option.default for option in dataclasses.fields(ProbeConfig)}
"""For a config.yaml of a version that did not know an option yet."""

Settings = dict[str, dict[str, Any]]  # backbone, facts, and each method that has settings -> options


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
        for method, cell in self.cells.items():
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
    everywhere = [name for name in first["relations"] if all(_has_facts(run, name) for run in runs)]
    if not everywhere:
        raise MegapromptError(
            f"the runs have no {scoring.words.group} in common; give runs over the same {scoring.groups}"
        )
    names = {name: None for run in runs for name in run.results["data"]["relations"]}
    notes = [f"{run.path} is not complete: its scores so far." for run in runs if not run.results.get("complete")]
    if missing := [name for name in names if name not in everywhere]:
        count = plural(len(missing), scoring.words.group)
        over = f"Over the {plural(len(everywhere), scoring.words.group)} of all runs."
        notes.append(f"{over} Left out: {count} ({', '.join(missing)}).")
    vocabulary = first["vocabulary"]["name"] if first["vocabulary"] else None
    setups = _setups(runs)
    rows = []
    for settings, members in setups:
        label = _label(settings, [other for other, _ in setups])
        paper = cited_scores(members[0].results["backbone"], vocabulary) if scoring.score == "p_at_1" else {}
        rows.append(BackboneRow(label, _cells(label, members, everywhere, scoring, notes), paper))
    notes += _notes_on_counts(rows, scoring)
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


def _setups(runs: Iterable[Run]) -> list[tuple[Settings, list[Run]]]:
    """Runs that differ only in the seed, or in methods, and what they have in common: a pair for each row."""
    setups: list[tuple[Settings, list[Run]]] = []
    for run in runs:
        settings = _settings(run)
        for of_row, members in setups:
            # A run that only fine-tunes may stand beside one that learns prompts.
            if all(of_row[part] == settings[part] for part in of_row.keys() & settings.keys()):
                of_row |= settings
                members.append(run)
                break
        else:
            setups.append((settings, [run]))
    return setups


def _settings(run: Run) -> Settings:
    """What has to be the same in runs that differ only in the seed."""
    backbone, options = run.results["backbone"], _DEFAULTS | run.options
    settings: Settings = {
        # The precision in force: --dtype is often not given, and a DeepSpeed configuration may say it.
        "backbone": {"name": backbone["name"], "weights": backbone["fingerprint"], "dtype": backbone["dtype"]},
        "facts": {key: options.get(key) for key in ("limit_facts", "limit_examples", "setting", "patterns")},
    }
    for method, keys in _SETTINGS.items():
        if run.results["methods"].get(method):
            settings[method] = {key: options[key] for key in keys} if run.options else {"run": str(run.path)}
            if "fine-tuning" in method and run.options:
                # Weights are trained in float32 unless something says otherwise, also where the frozen ones are not.
                said = options["dtype"] or options["deepspeed"]
                settings[method]["dtype"] = backbone["dtype"] if said else "float32"
    for text in options["discrete"]:
        name, _, path = text.partition("=")
        settings[f"prompts {name}"] = {name: path}
    return settings


def _label(settings: Settings, all_settings: Sequence[Settings]) -> str:
    """The backbone's name, and what tells its row from others of the same name."""
    like = [other for other in all_settings if other["backbone"]["name"] == settings["backbone"]["name"]]
    told: dict[str, None] = {}
    for part, options in settings.items():
        others = [other[part] for other in like if part in other]
        for key, value in options.items():
            several = len({str(other[key]) for other in others if key in other}) > 1
            if several or (key == "run" and len(like) > 1):  # nothing else is known of a run without configuration
                told[f"{key.replace('_', '-')} {'not given' if value is None else value}"] = None
    name = settings["backbone"]["name"]
    return f"{name} ({', '.join(told)})" if told else name


def _cells(
    label: str, runs: Sequence[Run], relations: Sequence[str], scoring: Scoring, notes: list[str]
) -> dict[str, Cell]:
    """The cells of one row; notes get what had to be left out, and what diverged."""
    cells = {}
    for method in methods_in_order({method for run in runs for method in run.results["methods"]}):
        chosen: dict[Any, Run] = {}  # by seed
        for run in runs:
            seed = run.options.get("seed", str(run.path))
            if seed not in chosen and _is_usable(label, run, method, relations, scoring, notes):
                chosen[seed] = run
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


def _notes_on_counts(rows: Sequence[BackboneRow], scoring: Scoring) -> list[str]:
    """What to say if the rows are about different numbers of test items."""
    counts = {row.name: {int(n) for cell in row.cells.values() for n in cell.facts.sum(1)} for row in rows}
    if len(set().union(*counts.values())) <= 1:
        return []
    told = ", ".join(f"{name} {' or '.join(map(str, sorted(n)))}" for name, n in counts.items() if n)
    why = "an object has to be one token of the backbone, and --limit-facts may differ"
    return [
        f"The rows have different numbers of test {scoring.items} ({told}): {why}. Compare backbones with a "
        "vocabulary that they share."
    ]
