"""Table 2 as Markdown, LaTeX, CSV and in the terminal.

print(markdown(join([read_run(Path("runs/gpt2-xl")), read_run(Path("runs/bert-large"))])))
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.report.cited import FACTS_OF_THE_PAPER, SOURCE, paper_vocabulary
from megaprompt.report.runs import plural, points
from megaprompt.report.table2 import Average, BackboneRow, Cell, Table2
from megaprompt.report.tables import MARK, lead_of, methods_in_order
from megaprompt.report.wordings import mean_and_error

HEADINGS = {"manual": "MP", "fine-tuning": "FT", "manual+fine-tuning": "MP+FT", "p-tuning": "P-tuning"}
HEADINGS |= {"p-tuning+fine-tuning": "P-tuning+FT"}
HEADINGS |= {"lpaqa": "LPAQA", "e-bert": "E-BERT", "autoprompt": "AutoPrompt", "best-manual": "best MP"}
"""What the paper calls the methods."""
_GAINS = ("p-tuning", "best")  # beside whose scores stands what they gain over manual prompts


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
    lead = lead_of(table.methods) or ""
    over = bool(lead and set(table.methods) - {"majority", "manual", lead})
    headings = [Shown("backbone")]
    for method in methods:
        heading = HEADINGS.get(method, method)
        headings += [Shown(heading)] * (method in table.methods)
        headings += [Shown(f"{heading} †", cited=True)] * (method in cited)
    headings += [Shown(f"{HEADINGS.get(lead, lead)} over the best other")] * over
    lines = []
    for row in table.rows:
        best = row.best(average)
        line = [Shown(row.name)]
        for method in methods:
            if method in table.methods:
                line.append(Shown(_measured_text(row, method, average), best=method in best))
            if method in cited:
                line.append(Shown(_cited_text(row.cited, method), cited=True))
        lines.append(line + [Shown(_over_the_best_other(row, lead, average))] * over)
    return headings, lines


def _measured_text(row: BackboneRow, method: str, average: Average) -> str:
    if method not in row.cells:
        return "–"
    gain = row.difference(method, "manual", average) if method in _GAINS else None
    return _mean_text(row.cells[method], average) + (f" ({points(gain)})" if gain is not None else "")


def _mean_text(cell: Cell, average: Average) -> str:
    mean, deviation = cell.mean(average)
    return with_deviation(mean, deviation) + MARK * (cell.diverged and not math.isnan(mean))


def relation_text(cell: Cell, place: int) -> str:
    """The mean and deviation over seeds of one relation."""
    return with_deviation(*cell.mean("macro", np.arange(cell.scores.shape[1]) == place))


def with_deviation(mean: float, deviation: float | None) -> str:
    """`45.7 ± 0.8`; a dash if it is not known."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _cited_text(cited: Mapping[str, float | str], method: str) -> str:
    value = cited.get(method, "–")
    if isinstance(value, str):
        return value
    manual = cited.get("manual")
    gain = method == "p-tuning" and isinstance(manual, float)
    return f"{value:.1f}" + (f" ({points(value - manual)})" if gain and isinstance(manual, float) else "")


def _over_the_best_other(row: BackboneRow, lead: str, average: Average) -> str:
    others = [method for method in methods_in_order(row.cells) if method != lead]
    found = {method: row.difference(lead, method, average) for method in others}
    gaps = {method: gap for method, gap in found.items() if gap is not None}
    if not gaps:
        return "–"
    rival = min(gaps, key=lambda method: gaps[method])
    return f"{points(gaps[rival])} ({HEADINGS.get(rival, rival)})"


def legend(table: Table2) -> list[str]:
    """Sentences that belong below the table."""
    given = f"given the {table.scoring.words.input} alone"
    items, group = table.scoring.items, table.scoring.words.group
    names = {"manual": "MP: manual prompts", "best-manual": "best MP: of several manual prompts the best on dev"}
    names |= {"in-context": f"in-context: training {items} before the question, as many as is best on dev"}
    names |= {"fine-tuning": f"FT: fine-tuning, {given}", "manual+fine-tuning": "MP+FT: fine-tuning with MP"}
    names |= {"p-tuning+fine-tuning": "P-tuning+FT: P-tuning with the model tuned as well; P-tuning: with it frozen"}
    names |= {"best": f"best: for each {group} what is best on dev of all that was tried"}
    used = [text for method, text in names.items() if any(method in (*row.cells, *row.cited) for row in table.rows)]
    sentences = ["; ".join(used) + "."] if used else []
    if "manual" in table.methods and (gains := [HEADINGS.get(m, m) for m in _GAINS if m in table.methods]):
        sentences.append(f"In brackets: {' and '.join(gains)} over MP, in points.")
    seeds = sorted({len(cell.runs) for row in table.rows for cell in row.cells.values() if cell.mean()[1] is not None})
    if seeds:
        over = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        sentences.append(f"±: standard deviation over {over} seeds.")
    found = {row.name: _over_wordings(row) for row in table.rows}
    if several := {name: each for name, each in found.items() if each}:
        told = (f"{name} {mean:.1f} ± {error:.1f}" for name, (mean, error) in several.items())
        heading = f"{table.scoring.heading} over {items}, mean and standard error over manual wordings"
        sentences.append(f"{heading}: {', '.join(told)}.")
    if any(row.cited for row in table.rows):
        name = paper_vocabulary(table.vocabulary or "") or ""
        facts = sorted({int(n) for row in table.rows for cell in row.cells.values() for n in cell.facts.sum(1)})
        here = (
            f"{table.data}, "
            + plural(len(table.relations), "relation")
            + (f", {facts[-1]:,} test facts" if facts else "")
        )
        sentences.append(
            f"† Cited, not measured here: {SOURCE}, {name} (41 relations, {FACTS_OF_THE_PAPER[name]} test facts). "
            f"Here: {here}."
        )
    return sentences


def _over_wordings(row: BackboneRow) -> tuple[float, float] | None:
    """Mean and standard error of the score over all facts, %, over manual wordings; None if there are not several."""
    columns = ["manual", *(method for method in row.cells if method.startswith("wording "))]
    means = [row.cells[method].mean("micro")[0] for method in columns if method in row.cells]
    return mean_and_error(means) if len(means) > 1 else None


def _frame(table: Table2, average: Average) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table's texts, and its cells, in the same places."""
    headings, lines = lines_of(table, average)
    texts = [heading.text for heading in headings]
    # A method of the user's may be called as another column is; columns have to differ, if only by a space.
    columns = [text + " " * texts[:i].count(text) for i, text in enumerate(texts)]
    cells = pd.DataFrame(lines, columns=columns, dtype=object)
    return cells.map(lambda cell: cell.text), cells


def in_markdown(text: str) -> str:
    """Text whose characters mean nothing else there."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def markdown(table: Table2) -> str:
    """Table 2 as Markdown."""

    def formatted(cell: Shown) -> str:
        text = in_markdown(cell.text)
        return f"**{text}**" if cell.best else f"*{text}*" if cell.cited and text != "–" else text

    parts = [f"# {in_markdown(f'{table.scoring.heading} on test, %: {table.about()}')}"]
    for average in table.averages:
        cells = _frame(table, average)[1].map(formatted).rename(columns=in_markdown)
        align = ["left", *["right"] * (len(cells.columns) - 1)]
        text = cells.to_markdown(index=False, colalign=align, disable_numparse=True)
        parts += [f"## {table.scoring.average(average)}", text or ""]
    return "\n\n".join([*parts, *map(in_markdown, (*legend(table), *table.notes))]) + "\n"


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "−": "$-$", "–": "--", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "°": r"$^\circ$"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}"},
}


def as_tex(text: str) -> str:
    """Text as LaTeX; pandas' own escaping leaves out half of these."""
    return "".join(_TEX.get(character, character) for character in text)


def latex(table: Table2) -> str:
    """Table 2 as LaTeX with booktabs: a table for each average."""

    def command(cell: Shown) -> str:
        return "textbf: --rwrap" if cell.best else "textit: --rwrap" if cell.cited else ""

    parts = ["% Made by megaprompt report; needs \\usepackage{booktabs}."]
    for average in table.averages:
        texts, cells = _frame(table, average)
        style = texts.style.hide(axis="index").format(as_tex).format_index(as_tex, axis="columns")
        style = style.apply(lambda _, cells=cells: cells.map(command), axis=None)
        columns = "l" + "r" * (len(texts.columns) - 1)
        parts += [f"{as_tex(table.scoring.average(average))}\n", style.to_latex(hrules=True, column_format=columns)]
    notes = (f"{table.about()}.", *legend(table), *table.notes)
    return "\n".join([*parts, r"{\footnotesize", *map(as_tex, notes), "}"]) + "\n"


def as_csv(table: Table2) -> str:
    """Table 2 with a line per number, for programs; the score and its standard deviation over seeds in per cent."""
    score = table.scoring.score
    where = {"data": table.data, "vocabulary": table.vocabulary}
    lines: list[dict[str, object]] = []
    for row in table.rows:
        every = {"measured": row.cells, **{f"measured {name}": cells for name, cells in row.controls.items()}}
        for source, average, method in ((s, a, m) for s, cells in every.items() for a in table.averages for m in cells):
            cell = every[source][method]
            mean, deviation = cell.mean(average)
            lines.append(
                {
                    "backbone": row.name,
                    "method": method,
                    "average": average,
                    score: f"{mean:.4f}",
                    "deviation": None if deviation is None else f"{deviation:.4f}",
                    "seeds": str(len(cell.runs)),
                    "relations": str(cell.scored.sum()),
                    "facts": " or ".join(dict.fromkeys(f"{n:.0f}" for n in cell.facts[:, cell.scored].sum(1))),
                    **where,
                    "source": source,
                }
            )
        for method, value in row.cited.items():
            about = {"backbone": row.name, "method": method, "average": "macro", "relations": "41"}
            lines.append({**about, score: str(value), **where, "source": f"cited: {SOURCE}"})
    names = ["backbone", "method", "average", score, "deviation", "seeds", "relations", "facts", *where, "source"]
    return pd.DataFrame(lines, columns=names, dtype=object).to_csv(index=False, lineterminator="\n")


def terminal_table(table: Table2) -> Table:
    """A line per backbone and method, for a terminal; the best of a backbone is bold."""
    cited = any(row.cited for row in table.rows)
    title = Text(f"{table.scoring.heading} on test, %: {table.about()}")
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["backbone", "method", *table.averages, "seeds", *(["paper †"] if cited else [])]
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if i > 1 else "left", overflow="fold")
    for row in table.rows:
        best = row.best()
        for i, method in enumerate(methods_in_order({*row.cells, *row.cited})):
            cell, style = row.cells.get(method), "bold" if method in best else ""
            texts = [Text(_mean_text(cell, average) if cell else "–", style) for average in table.averages]
            words = [str(len(cell.runs)) if cell else "–", *([_cited_text(row.cited, method)] if cited else [])]
            shown.add_row(Text(row.name if i == 0 else ""), Text(method), *texts, *map(Text, words))
        shown.add_section()
    shown.caption = Text("\n".join((*legend(table), *table.notes)), justify="left")
    return shown
