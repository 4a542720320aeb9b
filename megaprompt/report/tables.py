"""The scores of one run as rows of tables: what is best, what is gained, what a reader has to know; and the terminal's.

rich.print(summary_table(read_run(Path("runs/first")).results))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.report.runs import (
    Scoring,
    as_schema_2,
    backbone_name,
    beside,
    divergence,
    known,
    percent,
    plural,
    points,
)
from megaprompt.report.wordings import notes_of_answers

WRITTEN = ("majority", "manual", "mean of wordings", "mean of patterns", "best-manual", "in-context", "lpaqa", "e-bert")
SEARCHED = (
    "autoprompt", "fine-tuning", "manual+fine-tuning", "pet", "pet-best", "p-tuning+fine-tuning", "p-tuning", "best"
)  # fmt: skip
_LEARNED = ("best", "p-tuning", "p-tuning+fine-tuning")
MARK = " ‡"
"""Behind scores of a relation whose training diverged, and averages over fewer relations than there are."""
FEW = " §"
"""Behind names of relations with few facts to choose with or to learn from."""


def methods_in_order(methods: Iterable[str]) -> list[str]:
    """Methods as tables and charts show them: majority, manual and other written prompts, then those that train."""

    def place(method: str) -> tuple[int, str]:
        if method in SEARCHED:
            return len(WRITTEN) + 1 + SEARCHED.index(method), method
        if re.fullmatch(r"wording \d+", method):  # of the data, beside the first one
            return WRITTEN.index("manual"), method
        name = method.removesuffix(" best").removesuffix(" ensemble")  # of a file with several prompts for a relation
        return (WRITTEN.index(name) if name in WRITTEN else len(WRITTEN)), method

    return sorted(methods, key=place)


def lead_of(methods: Iterable[str]) -> str | None:
    """The learned prompts that sentences and gains are about: `best`, else p-tuning, with the model frozen if there are
    both; None if there are none."""
    methods = set(methods)
    return next((method for method in _LEARNED if method in methods), None)


def leaders(scores: Mapping[str, float]) -> set[str]:
    """The methods with the best score, to the digits that are shown; none if all are the same."""
    shown = {method: round(score, 1) for method, score in scores.items()}
    best = max(shown.values(), default=0.0)
    return {m for m, score in shown.items() if score == best} if len(set(shown.values())) > 1 else set()


def over_the_same(relations: Mapping[str, frozenset[Any]]) -> set[str]:
    """The methods whose averages can be compared, since they are over the same relations: as many as there are.

    Args:
        relations: that each method has scores of.
    """
    sets = list(relations.values())
    reference = max(sets, key=lambda each: (len(each), sets.count(each)), default=frozenset())
    return {method for method, each in relations.items() if each == reference}


@dataclass(frozen=True)
class Row:
    """A relation or an average of one run, and what each method scored there."""

    name: str
    label: str
    type: str
    items: int  # in test
    weights: dict[str, float]  # of the relations that it is about
    cells: dict[str, Mapping[str, Any]]  # method -> a row or an average of results.json; empty if it was not scored
    of_relations: dict[str, dict[str, float]]  # method -> the relations that it has scores of -> score in per cent
    scoring: Scoring
    few: bool = False  # facts to choose with or to learn from

    @property
    def heading(self) -> str:
        return self.name + FEW * self.few

    def scores(self) -> dict[str, float]:
        """The score in per cent of the methods that have one."""
        found = {method: self.scoring.percent_of(cell) for method, cell in self.cells.items()}
        return {method: score for method, score in found.items() if score is not None}

    def comparable(self) -> dict[str, float]:
        """The scores without averages over other relations than those of most methods."""
        scores = self.scores()
        alike = over_the_same({method: frozenset(self.of_relations[method]) for method in scores})
        return {method: score for method, score in scores.items() if method in alike}

    def best(self, method: str) -> bool:
        return method in leaders(self.comparable())

    def gain(self) -> str:
        """The lead over manual prompts, in points, over the relations that both have scores of."""
        lead = lead_of(self.cells)
        manual, learned = (self.of_relations.get(method or "", {}) for method in ("manual", lead))
        both = manual.keys() & learned.keys()
        if not both or not {"manual", lead} <= self.scores().keys():
            return "–"
        total = sum(self.weights[name] for name in both)
        return points(sum(self.weights[name] * (learned[name] - manual[name]) for name in both) / total)

    def text(self, method: str) -> str:
        """The score of a method as it is printed."""
        cell = self.cells[method]
        value = cell.get(self.scoring.score)
        marked = cell.get("diverged") or (known(value) and len(self.of_relations[method]) < len(self.weights))
        return percent(value) + MARK * bool(marked)


def rows_of(results: Mapping[str, Any]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of relations, of the averages macro and (where that means something) micro, and of the relation types if
    there are several."""
    methods = {method: results["methods"][method] for method in methods_in_order(results["methods"])}
    about, scoring, few = results["data"]["relations"], Scoring.of(results), few_facts(results)

    def row(name: str, label: str, kind: str, over: Sequence[str], *path: str) -> Row:
        cells: dict[str, Mapping[str, Any]] = {}
        of_relations = {}
        for method, found in methods.items():
            rows = (found or {}).get("relations") or {}
            scores = {relation: scoring.percent_of(rows.get(relation) or {}) for relation in over}
            of_relations[method] = {relation: score for relation, score in scores.items() if score is not None}
            for key in path:
                found = (found or {}).get(key)
            scored = [rows[relation] for relation in of_relations[method]]
            # An average of a metric that only some of these relations have would be one over other relations.
            cells[method] = {
                key: value
                for key, value in (found or {}).items()
                if key.removeprefix("dev_") not in scoring.metrics or all(known(each.get(key)) for each in scored)
            }
        items = {relation: about[relation]["facts"]["test"] for relation in over}
        weights = items if name == "micro" else dict.fromkeys(over, 1.0)
        is_few = name in few and path[0] == "relations"
        return Row(name, label, kind, sum(items.values()), weights, cells, of_relations, scoring, is_few)

    relations = [row(name, beside(name, i["label"]), i["type"], [name], "relations", name) for name, i in about.items()]
    averages = [row("macro", f"mean over {scoring.groups}", "", list(about), "macro")]
    if scoring.has_micro:
        averages.append(row("micro", f"mean over {scoring.items}", "", list(about), "micro"))
    types = []
    kinds = sorted({info["type"] for info in about.values()})
    for kind in kinds if len(kinds) > 1 else ():
        same = [name for name, info in about.items() if info["type"] == kind]
        label = f"mean over {plural(len(same), scoring.words.group)}"
        types.append(row(kind or "no type", label, kind, same, "by_type", kind))
    return relations, averages, types


def telling_columns(relations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which of the columns `label` and `type` tell something that the names of the relations do not."""
    labels = any(beside(name, about["label"]) for name, about in relations.items())
    types = any(about["type"] for about in relations.values())
    return ["label"] * labels + ["type"] * types


def filled_columns(rows: Sequence[Row], methods: Iterable[str]) -> list[str]:
    """Which of the metrics, the score on dev and `epochs` are known of any of these methods."""
    cells = [row.cells[method] for method in methods for row in rows]
    columns = [*rows[0].scoring.metrics, rows[0].scoring.dev, "epochs"] if rows else []
    return [column for column in columns if any(known(cell.get(column)) for cell in cells)]


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """Sentences about the marks of one run: relations that diverged, and averages over the others."""
    scoring, (relations, averages, _) = Scoring.of(results), rows_of(results)
    notes = []
    for row in relations:
        for method, cell in row.cells.items():
            if cell.get("diverged"):
                notes.append(divergence(method, row.name, cell, method in row.scores()))
    of_relations, total = averages[0].of_relations, len(relations)
    for method in dict.fromkeys(method for row in averages for method in row.scores()):
        if (count := len(of_relations[method])) < total:
            over = f"averages over {count} of {total} {scoring.groups}"
            notes.append(f"{method}: {over}. {compared(scoring)}")
    return [f"{MARK.strip()} {note}" for note in notes] + note_on_few(results)


def few_facts(results: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The relations with few facts in train or dev, and how many these are, if a method learns or chooses."""
    few = results.get("few", 0)  # of runs that know no such number: none
    if not set(results["methods"]) & {"best-manual", "in-context", *SEARCHED}:
        return {}
    counts = {name: about["facts"] for name, about in results["data"]["relations"].items()}
    return {name: (n["train"], n["dev"]) for name, n in counts.items() if min(n["train"], n["dev"]) < few}


def note_on_few(results: Mapping[str, Any]) -> list[str]:
    """The sentences about relations with few facts, if there are any."""
    scoring, found = Scoring.of(results), few_facts(results)
    if not found:
        return []
    told = ", ".join(f"{name} ({train} and {dev})" for name, (train, dev) in found.items())
    few, selects = results["few"], results["selects"]
    note = f"{FEW.strip()} Fewer than {few} {scoring.items} in train or dev: {told}."
    if len(selects) > 1 and any(dev < few for _, dev in found.values()):
        note += f" On so few in dev {scoring.metrics[selects[-1]]} chooses, not {scoring.metrics[selects[0]]}"
        note += "; best is chosen by cross-validation over train and dev." if "best" in results["methods"] else "."
    return [note]


def few_in_row(label: str, results: Sequence[Mapping[str, Any]], relations: Sequence[str]) -> list[str]:
    """The same of the runs of a row, in short: their own pages name the relations."""
    found = {name: few for each in results for name, few in few_facts(each).items() if name in relations}
    if not found:
        return []
    scoring, few = Scoring.of(results[0]), results[0]["few"]
    which = f"{len(found)} of {plural(len(relations), scoring.words.group)}"
    return [f"{label}: {which} with fewer than {few} {scoring.items} in train or dev, little to choose with."]


def compared(scoring: Scoring) -> str:
    """What becomes of averages over fewer relations than there are."""
    return f"The best is found among averages over the same {scoring.groups}; gains are over those that both have."


def has_gain(results: Mapping[str, Any]) -> bool:
    """Whether there is a column for the gain of the lead over manual prompts."""
    return "manual" in results["methods"] and lead_of(results["methods"]) is not None


def summary_table(results: Mapping[str, Any]) -> Table:
    """The score on test of every relation and method of one run, for a terminal; the best of a row is bold."""
    results = as_schema_2(results)
    scoring, methods, gain = Scoring.of(results), methods_in_order(results["methods"]), has_gain(results)
    title = f"{scoring.heading} on test, %: {backbone_name(results['backbone'])}, {data_and_vocabulary(results)}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    relations, averages, _ = rows_of(results)
    told = telling_columns(results["data"]["relations"])
    for column in (scoring.words.group, *told):
        label = column == "label"
        table.add_column(column, overflow="fold", no_wrap=not label, min_width=12 if label else None)
    for column in (f"test\n{scoring.items}", *methods, *(["gain"] if gain else [])):
        table.add_column(Text(column.replace(" ", "\n")), justify="right", no_wrap=True)
    for i, row in enumerate((*relations, *averages)):
        if i == len(relations):
            table.add_section()
        about = {"label": row.label if i < len(relations) else "", "type": row.type}
        words = (row.heading, *(about[column] for column in told), str(row.items))
        scores = [Text(row.text(method), "bold" if row.best(method) else "") for method in row.cells]
        table.add_row(*map(Text, words), *scores, *([Text(row.gain())] if gain else []))
    if notes := [*notes_of(results), *notes_of_answers(results)]:
        table.caption = Text("\n".join(notes), justify="left")
    return table


def data_and_vocabulary(results: Mapping[str, Any]) -> str:
    """`world, among all tokens`; the data alone if answers are not words of a vocabulary."""
    data = results["data"]
    return f"{data['name']}, among {data['vocabulary']['name']}" if data["vocabulary"] else data["name"]
