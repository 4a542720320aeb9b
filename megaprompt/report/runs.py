"""Runs on disk, and what their tables count and score: P@1 of facts, accuracy of examples, ...

read_run(Path("runs/first")).results["methods"]["manual"]["macro"]["p_at_1"]
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megaprompt.errors import MegapromptError, UsageError


@dataclass(frozen=True)
class Run:
    """What a run has written so far."""

    path: Path
    results: dict[str, Any]  # as in schema 2
    log: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # of config.yaml; none if there is no such file
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # of its prompts on other facts, by their name

    @property
    def control(self) -> str | None:
        """What is different on purpose: `random-weights`."""
        return self.results["backbone"].get("control")

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
        evaluations = {}
        for file in sorted(path.glob("evaluations/*.json")):
            evaluations[file.stem] = json.loads(file.read_bytes())
    except (ValueError, yaml.YAMLError) as error:
        raise MegapromptError(f"{file}: is damaged ({' '.join(str(error).split())}); run the probe again") from error
    if not isinstance(results, dict) or (results.get("schema") != 2 and results.get("format") != 1):
        raise MegapromptError(f"{path / 'results.json'}: was not written by this version of megaprompt; run it again")
    return Run(path, as_schema_2(results), log, options if isinstance(options, dict) else {}, evaluations)


def backbone_name(backbone: Mapping[str, Any]) -> str:
    """`gpt2`, or `gpt2 with random weights`; of results.json."""
    control = backbone.get("control")
    return backbone["name"] + (f" with {control.replace('-', ' ')}" if control else "")


def as_schema_2(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results in their present form. Those of format 1 were always P@1 of facts, and an average over all relations."""
    if results.get("schema") == 2:
        return dict(results)
    methods = {name: _with_counts(method) for name, method in results["methods"].items() if method}
    about = {key: value for key, value in results.items() if key != "format"}
    metrics = {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR"}
    return {**about, "schema": 2, "metrics": metrics, "items": "facts", "methods": methods}


def _with_counts(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method of format 1, whose averages did not tell over how many relations they are."""
    rows = list(method.get("relations", {}).values())

    def counted(average: Mapping[str, Any] | None, kind: str | None = None) -> dict[str, Any]:
        scored = [row for row in rows if known(row.get("p_at_1")) and kind in (None, row.get("type"))]
        return {**(average or {}), "relations": len(scored)}

    averages = {name: counted(method.get(name)) for name in ("macro", "micro")}
    by_type = {kind: counted(average, kind) for kind, average in method.get("by_type", {}).items()}
    return {**method, **averages, "by_type": by_type}


def known(value: Any) -> bool:
    """Whether a score is a number at all."""
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------- what is counted and scored


@dataclass(frozen=True)
class Words:
    """How to speak of one kind of question."""

    title: str  # with {models}, {know} (or knows) and {data}
    item: str
    group: str  # of items: has a template, a row in the tables, and the same weight as others in macro averages
    input: str
    gold: str
    query: str
    placeholders: str


_FACTS = Words(
    "What {models} {know} of {data}",
    "fact",
    "relation",
    "subject",
    "object",
    "Each fact is a query: a subject is put into a template, and the model is asked for the object in its place.",
    "In a template, [X] is the subject, [Y] the object, and <3> three learned vectors.",
)
_EXAMPLES = Words(
    "{models} on {data}",
    "example",
    "task",
    "text",
    "right answer",
    "Each example is a query: its text is put into a template, and the model is asked for the answer.",
    "In a template, [Y] is the answer, other names in brackets are its texts, and <3> three learned vectors.",
)

_MEANING = {
    "p_at_1": "the share of {items} whose {gold} is the most likely answer",
    "p_at_10": "the share of {items} whose {gold} is among the ten most likely answers",
    "mrr": "the mean of one over the rank of the {gold}",
    "accuracy": "the share of {items} that are answered right",
    "score": "the mean of the metrics of a task, of which SuperGLUE's average is made",
    "macro_f1": "the mean of the F1 of each answer",
    "em": "the share of questions all of whose {items} are answered right",
    "f1a": "the F1 of the answer 1 over all {items}",
}
_SHARES_OF_RIGHT_ANSWERS = ("p_at_1", "accuracy")
_NOT_IN_PER_CENT = ("mrr",)


@dataclass(frozen=True)
class Scoring:
    """What the tables of a run count, by which metrics, and in which words.

    Args:
        metrics: name -> heading; the first one is the score, by which methods are compared.
    """

    metrics: Mapping[str, str]
    items: str

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Scoring:
        """Of results as in schema 2."""
        return cls(results["metrics"], results["items"])

    @property
    def words(self) -> Words:
        return _FACTS if self.items == "facts" else _EXAMPLES

    def title(self, models: Sequence[str], data: str) -> str:
        """The heading of a report."""
        *others, last = models
        names = f"{', '.join(others)} and {last}" if others else last
        return self.words.title.format(models=names, know="know" if others else "knows", data=data)

    @property
    def groups(self) -> str:
        return self.words.group + "s"

    @property
    def score(self) -> str:
        """The name of the first metric."""
        return next(iter(self.metrics))

    @property
    def heading(self) -> str:
        """What the score is called."""
        return self.metrics[self.score]

    @property
    def dev(self) -> str:
        """The name of the score on dev."""
        return f"dev_{self.score}"

    @property
    def has_micro(self) -> bool:
        """Whether the mean of the score over all items of all groups means something: only if it is one over items."""
        return self.score in _SHARES_OF_RIGHT_ANSWERS

    @property
    def of_right_answers(self) -> str:
        """What the share of right answers is called, which is the score itself for most kinds of question."""
        return self.heading if self.score in _SHARES_OF_RIGHT_ANSWERS else "share of right answers"

    def percent_of(self, cell: Mapping[str, Any]) -> float | None:
        """The score in per cent; None if there is none."""
        value = cell.get(self.score)
        return 100 * value if value is not None and known(value) else None

    def text(self, metric: str, value: Any) -> str:
        """A value of a metric, or of the same on dev, as tables print it."""
        if metric.removeprefix("dev_") in _NOT_IN_PER_CENT:
            return f"{value:.3f}" if known(value) else "–"
        return percent(value)

    def column(self, metric: str) -> str:
        """The heading of a metric's column, with its unit."""
        name = metric.removeprefix("dev_")
        unit = "" if name in _NOT_IN_PER_CENT else ", %"
        return f"{self.metrics[name]}{' on dev' if name != metric else ''}{unit}"

    def average(self, average: str) -> str:
        """What a macro or micro average of the score is called, with its unit."""
        return f"Mean {self.heading} over {self.groups if average == 'macro' else self.items} ({average}), %"

    def meanings(self) -> dict[str, str]:
        """What metrics mean, by heading, as far as that is known here."""
        return {
            heading: _MEANING[name].format(items=self.items, gold=self.words.gold)
            for name, heading in self.metrics.items()
            if name in _MEANING
        }


def beside(name: str, label: str) -> str:
    """The label that stands beside a name; empty if it only repeats the name."""
    return "" if label == name else label


def percent(value: Any) -> str:
    return f"{100 * value:.1f}" if known(value) else "–"


def points(difference: float) -> str:
    """A difference of two scores in per cent, with its sign."""
    return f"{round(difference, 1) or 0.0:+.1f}".replace("-", "−")  # never -0.0


def plural(number: int, thing: str) -> str:
    """`1 relation`, `1,200 relations`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def divergence(method: str, relation: str, cell: Mapping[str, Any], scored: bool) -> str:
    """The sentence about a relation whose training did not go well; `cell` is its row, with `diverged`."""
    why = cell["diverged"]
    kept = "its score is that of the best on dev before" if scored else "it has no score"
    return f"{method}: the training of {relation} diverged at step {why['step']} ({why['reason']}); {kept}."
