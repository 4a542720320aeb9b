"""Several runs joined into the paper's Table 2: a row per backbone; columns MP, FT, MP+FT, P-tuning and other methods.

print(markdown(join([read_run(Path("runs/gpt2-xl")), read_run(Path("runs/bert-large"))])))
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.config import ProbeConfig
from megaprompt.errors import MegapromptError
from megaprompt.report.tables import TRAINED, Run, known, leaders, methods_in_order, points

HEADINGS = {"manual": "MP", "fine-tuning": "FT", "manual+fine-tuning": "MP+FT", "p-tuning": "P-tuning"}
"""What the paper calls the methods."""

Average = Literal["macro", "micro"]
AVERAGES: tuple[Average, Average] = ("macro", "micro")

# ------------------------------------------------------------------------------------------------- what the paper says

SOURCE = "Liu et al., GPT Understands, Too, arXiv:2103.10385, version 1, Table 2"


@dataclass(frozen=True)
class Cited:
    """The paper's P@1, %, of one model (macro over relations)."""

    model: str  # the last part of its transformers name
    hidden_size: int  # tells it from another model in a directory of the same name
    scores: dict[str, float | str]


def _lama_29k(model: str, hidden_size: int, *scores: float | str) -> Cited:
    return Cited(model, hidden_size, dict(zip(("manual", *TRAINED), scores, strict=True)))


CITED = {
    "LAMA-34k": [
        Cited("bert-base-cased", 768, {"manual": 31.1, "lpaqa": 34.1, "autoprompt": 43.3, "p-tuning": 48.3}),
        Cited("bert-large-cased", 1024, {"manual": 32.3, "lpaqa": 39.4, "p-tuning": 50.6}),
    ],
    "LAMA-29k": [
        _lama_29k("bert-base-cased", 768, 31.7, 51.6, 52.1, 52.3),
        _lama_29k("bert-large-cased", 1024, 33.5, 54.0, 55.0, 54.6),
        _lama_29k("roberta-base", 768, 18.4, 49.2, 50.0, 49.3),
        _lama_29k("roberta-large", 1024, 22.1, 52.3, 52.4, 53.5),
        _lama_29k("gpt2-medium", 1024, 20.3, 41.9, 38.2, 46.5),
        _lama_29k("gpt2-xl", 1600, 22.8, 44.9, 46.5, 54.4),
        _lama_29k("megatron-11b", 3072, 23.1, "OOM", "OOM", 64.2),
    ],
}
FACTS_OF_THE_PAPER = {"LAMA-34k": "34,039", "LAMA-29k": "about 29,000"}
"""Test facts, over 41 relations."""


def paper_vocabulary(name: str) -> str | None:
    """LAMA-34k or LAMA-29k, if a vocabulary is called that: `29k-vocab.json` of the paper's code, `lama-34k.txt`."""
    found = re.search(r"(?<![0-9])(29|34)k(?![a-z0-9])", name, re.IGNORECASE)
    return f"LAMA-{found[1]}k" if found else None


def cited_scores(backbone: Mapping[str, Any], vocabulary: str) -> dict[str, float | str]:
    """The paper's figures, if it has any for this model with this vocabulary."""
    name = PurePath(backbone["name"]).name.lower().replace("_", "-")
    for cited in CITED.get(paper_vocabulary(vocabulary) or "", ()):
        if cited.model == name and cited.hidden_size == backbone["hidden_size"]:
            return cited.scores
    return {}


# ------------------------------------------------------------------------------------------------------------- Table 2

_OF_ALL_TRAINING = ("recipe", "batch_size", "max_epochs", "max_steps", "patience", "dtype")
_SETTINGS = {
    "p-tuning": ("template", "encoder", "init", "learning_rate", "weight_decay", *_OF_ALL_TRAINING),
    "autoprompt": ("template", "autoprompt_steps", "dtype"),
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
    scores: np.ndarray  # [runs, relations] P@1 on test, %
    facts: np.ndarray  # [runs, relations] in test

    def mean(self, average: Average = "macro", where: Any = slice(None)) -> tuple[float, float | None]:
        """Mean and standard deviation (of a sample) over seeds of an average over the relations `where`.

        The deviation is None for a single run, and where seeds change nothing, as with prompts that are not learned.
        """
        weights = self.facts[:, where] if average == "micro" else np.ones_like(self.facts[:, where])
        of_run = (self.scores[:, where] * weights).sum(1) / weights.sum(1)
        return float(of_run.mean()), float(of_run.std(ddof=1)) if np.ptp(of_run) > 0 else None


@dataclass(frozen=True)
class BackboneRow:
    """A backbone, as it was set up, and all its methods."""

    name: str
    cells: dict[str, Cell]  # by method
    cited: dict[str, float | str]  # the paper's, by method

    def macro(self) -> dict[str, float]:
        return {method: cell.mean()[0] for method, cell in self.cells.items()}

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
    vocabulary: str
    relations: dict[str, dict[str, Any]]  # label, type, ... by name
    rows: list[BackboneRow]
    methods: list[str]
    notes: list[str]  # what a reader has to know before comparing

    def types(self) -> dict[str, np.ndarray]:
        """Which relations [relations] (bool) are of each type."""
        kinds = np.array([about["type"] for about in self.relations.values()])
        return {kind or "no type": kinds == kind for kind in sorted(set(kinds.tolist()))}


def join(runs: Sequence[Run]) -> Table2:
    """Put runs on the same data together. Runs that differ only in the seed make one row, with means over seeds.

    Raises:
        MegapromptError: the runs are on different data, or have no relation in common.
    """
    first = runs[0].results["data"]
    for run in runs:
        data = run.results["data"]
        for what, mine, other in (
            ("data", data["name"], first["name"]),
            ("vocabulary", data["vocabulary"]["name"], first["vocabulary"]["name"]),
        ):
            if mine != other:
                where = f"{run.path}: its {what} is {mine}, that of {runs[0].path} is {other}"
                raise MegapromptError(f"{where}; give runs on the same data and --vocab")
    everywhere = [name for name in first["relations"] if all(_has_facts(run, name) for run in runs)]
    if not everywhere:
        raise MegapromptError("the runs have no relation in common; give runs over the same relations")
    names = {name: None for run in runs for name in run.results["data"]["relations"]}
    notes = [f"{run.path} is not complete: its scores so far." for run in runs if not run.results.get("complete")]
    if missing := [name for name in names if name not in everywhere]:
        count = f"{len(missing)} relation{'s'[: len(missing) > 1]}"
        notes.append(f"Over the {len(everywhere)} relations of all runs. Left out: {count} ({', '.join(missing)}).")

    setups: list[tuple[Settings, list[Run]]] = []  # of each row: settings, runs
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
    rows = []
    for settings, members in setups:
        label = _label(settings, [other for other, _ in setups])
        cited = cited_scores(members[0].results["backbone"], first["vocabulary"]["name"])
        rows.append(BackboneRow(label, _cells(label, members, everywhere, notes), cited))
    facts = {row.name: {int(n) for cell in row.cells.values() for n in cell.facts.sum(1)} for row in rows}
    if len(set().union(*facts.values())) > 1:
        counts = ", ".join(f"{name} {' or '.join(map(str, sorted(n)))}" for name, n in facts.items() if n)
        notes.append(
            f"The rows have different numbers of test facts ({counts}): an object has to be one token of the backbone, "
            "and --limit-facts may differ. Compare backbones with a vocabulary that they share."
        )
    methods = methods_in_order({method for row in rows for method in row.cells})
    relations = {name: first["relations"][name] for name in everywhere}
    return Table2(first["name"], first["vocabulary"]["name"], relations, rows, methods, notes)


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


def _has_facts(run: Run, relation: str) -> bool:
    about = run.results["data"]["relations"].get(relation)
    return about is not None and about["facts"]["test"] > 0


def _settings(run: Run) -> Settings:
    """What has to be the same in runs that differ only in the seed."""
    backbone, options = run.results["backbone"], _DEFAULTS | run.options
    settings: Settings = {
        "backbone": {"name": backbone["name"], "weights": backbone["fingerprint"]},
        "facts": {"limit_facts": options["limit_facts"]},
    }
    for method, keys in _SETTINGS.items():
        if run.results["methods"].get(method):
            settings[method] = {key: options[key] for key in keys} if run.options else {"run": str(run.path)}
    for text in options["discrete"]:
        name, _, path = text.partition("=")
        settings[f"prompts {name}"] = {name: path}
    return settings


def _cells(label: str, runs: Sequence[Run], relations: Sequence[str], notes: list[str]) -> dict[str, Cell]:
    """The cells of one row; notes get what had to be left out."""
    cells = {}
    for method in methods_in_order({method for run in runs for method in run.results["methods"]}):
        chosen: dict[Any, Run] = {}  # by seed
        for run in runs:
            scored = [name for name in relations if known(run.row(method, name).get("p_at_1"))]
            seed = run.options.get("seed", str(run.path))
            if len(scored) < len(relations):
                if scored:
                    lacking = ", ".join(name for name in relations if name not in scored)
                    notes.append(f"{label}, {method}: left out of {run.path}, which has no score of {lacking}.")
            elif seed not in chosen:
                chosen[seed] = run
        if chosen:
            rows = [[run.row(method, name) for name in relations] for run in chosen.values()]
            scores = np.array([[100 * row["p_at_1"] for row in of_run] for of_run in rows])
            facts = np.array([[float(row["facts"]) for row in of_run] for of_run in rows])
            cells[method] = Cell(tuple(chosen.values()), scores, facts)
    return cells


# ------------------------------------------------------------------------------------------- Table 2 in several formats


@dataclass(frozen=True)
class Shown:
    """A cell as it is printed."""

    text: str
    best: bool = False  # of the row, among what was measured
    cited: bool = False


def lines_of(table: Table2, average: Average) -> tuple[list[Shown], list[list[Shown]]]:
    """Headings, and a line per backbone: its name, and each method, beside it the paper's figure (macro only)."""
    cited = {method for row in table.rows for method in row.cited} if average == "macro" else set()
    methods = methods_in_order({*table.methods, *cited})
    others = set(table.methods) - {"majority", "manual", "p-tuning"}
    over = "p-tuning" in table.methods and bool(others)
    headings = [Shown("backbone")]
    for method in methods:
        heading = HEADINGS.get(method, method)
        headings += [Shown(heading)] * (method in table.methods) + [Shown(f"{heading} †", cited=True)] * (
            method in cited
        )
    headings += [Shown("P-tuning over the best other")] * over
    lines = []
    for row in table.rows:
        means = {method: cell.mean(average)[0] for method, cell in row.cells.items()}
        best = leaders(means)
        line = [Shown(row.name)]
        for method in methods:
            if method in table.methods:
                text = _mean_text(row.cells[method], average) if method in means else "–"
                if method == "p-tuning" and {"p-tuning", "manual"} <= set(means):
                    text += f" ({points(means['p-tuning'] - means['manual'])})"
                line.append(Shown(text, best=method in best))
            if method in cited:
                line.append(Shown(_cited_text(row.cited, method), cited=True))
        if over:
            rest = {method: mean for method, mean in means.items() if method != "p-tuning"}
            text = "–"
            if "p-tuning" in means and rest:
                rival = max(rest, key=lambda method: rest[method])
                text = f"{points(means['p-tuning'] - rest[rival])} ({HEADINGS.get(rival, rival)})"
            line.append(Shown(text))
        lines.append(line)
    return headings, lines


def _mean_text(cell: Cell, average: Average) -> str:
    mean, deviation = cell.mean(average)
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _cited_text(cited: Mapping[str, float | str], method: str) -> str:
    value = cited.get(method, "–")
    if isinstance(value, str):
        return value
    manual = cited.get("manual")
    gain = method == "p-tuning" and isinstance(manual, float)
    return f"{value:.1f}" + (f" ({points(value - manual)})" if gain and isinstance(manual, float) else "")


def legend(table: Table2) -> list[str]:
    """Sentences that belong below the table."""
    names = {"manual": "MP: manual prompts", "fine-tuning": "FT: fine-tuning, given the subject alone"}
    names |= {"manual+fine-tuning": "MP+FT: fine-tuning with the manual prompt"}
    used = [text for method, text in names.items() if any(method in (*row.cells, *row.cited) for row in table.rows)]
    sentences = ["; ".join(used) + "."] if used else []
    if {"manual", "p-tuning"} <= set(table.methods):
        sentences.append("In brackets: P-tuning over MP, in points.")
    seeds = sorted({len(cell.runs) for row in table.rows for cell in row.cells.values() if cell.mean()[1] is not None})
    if seeds:
        over = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        sentences.append(f"±: standard deviation over {over} seeds.")
    if any(row.cited for row in table.rows):
        name = paper_vocabulary(table.vocabulary) or ""
        facts = sorted({int(n) for row in table.rows for cell in row.cells.values() for n in cell.facts.sum(1)})
        here = f"{len(table.relations)} relations" + (f", {facts[-1]:,} test facts" if facts else "")
        sentences.append(
            f"† Cited, not measured here: {SOURCE}, {name} (41 relations, {FACTS_OF_THE_PAPER[name]} test facts). "
            f"Here: {here}."
        )
    return sentences


def markdown(table: Table2) -> str:
    """Table 2 as Markdown."""

    def cell(shown: Shown) -> str:
        text = re.sub(r"([\\|*_`<>\[\]])", r"\\\1", shown.text)
        return f"**{text}**" if shown.best else f"*{text}*" if shown.cited and text != "–" else text

    parts = [f"# P@1 on test, %: {_plain(table)}"]
    for average in AVERAGES:
        headings, lines = lines_of(table, average)
        rule = "|".join(["---", *["---:"] * (len(headings) - 1)])
        rows = ["| " + " | ".join(map(cell, line)) + " |" for line in lines]
        head = "| " + " | ".join(cell(Shown(heading.text)) for heading in headings) + " |"
        parts.append(f"## {average.capitalize()} (mean over {'relations' if average == 'macro' else 'facts'})")
        parts.append("\n".join([head, f"|{rule}|", *rows]))
    notes = [cell(Shown(text)) for text in (*legend(table), *table.notes)]
    return "\n\n".join([*parts, *notes]) + "\n"


def _plain(table: Table2) -> str:
    return f"{table.data}, {len(table.relations)} relations, among {table.vocabulary}"


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "−": "$-$", "–": "--", "†": r"$^\dagger$", "<": "$<$", ">": "$>$", "|": r"\textbar{}"},
}


def latex(table: Table2) -> str:
    """Table 2 as LaTeX with booktabs: macro, then micro."""

    def cell(shown: Shown) -> str:
        text = "".join(_TEX.get(character, character) for character in shown.text)
        return rf"\textbf{{{text}}}" if shown.best else rf"\textit{{{text}}}" if shown.cited else text

    headings, macro = lines_of(table, "macro")
    width = len(headings)
    out = ["% Made by megaprompt report; needs \\usepackage{booktabs}.", rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}"]
    out += [r"\toprule", " & ".join(map(cell, headings)) + r" \\", r"\midrule"]
    out += [
        rf"\multicolumn{{{width}}}{{l}}{{Macro P@1, \%}} \\",
        *(" & ".join(map(cell, line)) + r" \\" for line in macro),
    ]
    out += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{Micro P@1, \%}} \\"]
    for line in lines_of(table, "micro")[1]:
        cells = iter(line)  # the paper has no micro averages: its columns stay empty
        out.append(" & ".join("" if heading.cited else cell(next(cells)) for heading in headings) + r" \\")
    out += [r"\bottomrule", r"\end{tabular}"]
    notes = (f"{_plain(table)}.", *legend(table), *table.notes)
    return "\n".join([*out, "", r"{\footnotesize", *(cell(Shown(text)) for text in notes), "}"]) + "\n"


def as_csv(table: Table2) -> str:
    """Table 2 with a line per number, for programs; P@1 and its standard deviation over seeds in per cent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "backbone",
            "method",
            "average",
            "p_at_1",
            "deviation",
            "seeds",
            "relations",
            "facts",
            "data",
            "vocabulary",
            "source",
        ]
    )
    where = [table.data, table.vocabulary]
    for row in table.rows:
        for average in AVERAGES:
            for method, cell in row.cells.items():
                mean, deviation = cell.mean(average)
                numbers = [f"{mean:.4f}", "" if deviation is None else f"{deviation:.4f}", len(cell.runs)]
                facts = " or ".join(dict.fromkeys(f"{n:.0f}" for n in cell.facts.sum(1)))
                writer.writerow([row.name, method, average, *numbers, len(table.relations), facts, *where, "measured"])
        for method, value in row.cited.items():
            writer.writerow([row.name, method, "macro", value, "", "", 41, "", *where, f"cited: {SOURCE}"])
    return out.getvalue()


def terminal_table(table: Table2) -> Table:
    """A line per backbone and method, for a terminal; the best of a backbone is bold."""
    cited = any(row.cited for row in table.rows)
    shown = Table(title=Text(f"P@1 on test, %: {_plain(table)}"), box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(("backbone", "method", "macro", "micro", "seeds", *(["paper †"] if cited else []))):
        shown.add_column(heading, justify="right" if i > 1 else "left", overflow="fold")
    for row in table.rows:
        best = leaders(row.macro())
        for i, method in enumerate(methods_in_order({*row.cells, *row.cited})):
            cell, style = row.cells.get(method), "bold" if method in best else ""
            texts = [_mean_text(cell, average) if cell else "–" for average in AVERAGES]
            words = [row.name if i == 0 else "", method, *texts, str(len(cell.runs)) if cell else "–"]
            words += [_cited_text(row.cited, method)] if cited else []
            shown.add_row(*(Text(word, style if 2 <= j < 4 else "") for j, word in enumerate(words)))
        shown.add_section()
    shown.caption = Text("\n".join((*legend(table), *table.notes)), justify="left")
    return shown
