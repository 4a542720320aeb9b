"""SuperGLUE's tables as Markdown, LaTeX and CSV, and what belongs below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from megaprompt.report.cited_superglue import PAPER
from megaprompt.report.superglue import AVERAGE, OVER_PATTERNS, Block, Column, SuperGlueTable
from megaprompt.report.table2 import Table2
from megaprompt.report.table2_formats import as_tex, in_markdown

HEADINGS = {"accuracy": "Acc.", "macro_f1": "F1", "em": "EM", "f1a": "F1a"}
LOW = " °"
"""Behind values that always giving the most frequent answer reaches, too."""


@dataclass(frozen=True)
class Shown:
    """A value as it is printed."""

    text: str
    interval: str = ""
    best: bool = False  # of the column, among what was measured on a backbone
    cited: bool = False


def headings(table: SuperGlueTable) -> list[str]:
    """Of the columns, the average last."""
    return [f"{task} {HEADINGS[metric]}" for task, metric in table.columns] + [table.average_heading]


def shown_lines(table: SuperGlueTable, block: Block) -> list[tuple[str, list[Shown]]]:
    """The lines of a backbone: what a method is called, and its values; first those measured, then the paper's."""
    columns: list[Column] = [*table.columns, AVERAGE]
    best = {column: block.best(column) for column in columns}
    lines = []
    for line in block.lines:
        values = []
        for column in columns:
            value, low = line.values[column], block.no_better_than_constant(line, column)
            values.append(Shown(value.text + LOW * low, value.interval_text, line.method in best[column] and not low))
        lines.append((line.heading, values))
    for cited in block.cited.lines if block.cited else ():
        found = table.cited_values(cited)
        texts = (v if isinstance(v := found[column], str) else f"{v:.1f}" for column in columns)
        lines.append((f"{cited.what} †", [Shown(text, cited=True) for text in texts]))
    return lines


def legend_of(table: SuperGlueTable) -> list[str]:
    """Sentences that belong below the table."""
    every = [line for block in table.blocks for line in block.lines]
    methods = {line.method for line in every}
    sentences = []
    if methods & {"manual", "best-manual", "manual+fine-tuning"}:
        sentences.append("MP: manual prompts.")
    average = "The average is over all tasks, with the mean of the two metrics of CB and of MultiRC, as in the paper."
    if not table.whole:
        average = "The last column is the mean over the tasks that are there; the paper's average is over seven."
    sentences.append(average)
    seeds = sorted(
        {
            line.seeds
            for line in every
            if line.method not in OVER_PATTERNS and any(value.deviation is not None for value in line.values.values())
        }
    )
    if seeds:
        over = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        sentences.append(f"±: standard deviation over {over} seeds.")
    if methods & {*OVER_PATTERNS}:
        sentences.append("±, of means of patterns: standard deviation over patterns.")
    if any(block.no_better_than_constant(line, column) for block in table.blocks for line in block.lines
           for column in line.values):  # fmt: skip
        sentences.append(f"{LOW.strip()} Not above always giving the same answer.")
    if table.chosen_on_test:
        sentences.append(
            "What was best on these examples was chosen (--select-on validation): other examples score less."
        )
    counts = ", ".join(f"{task} {count}" for task, count in table.examples.items())
    sentences.append(f"Examples that are scored: {counts}.")
    if numbers := sorted({block.cited.table for block in table.blocks if block.cited}):
        tables = " and ".join(f"Table {number}" for number in numbers)
        what = "its P-tuning tunes the model, too"
        sentences.append(f"† Cited, not measured here: {PAPER}, {tables}, on the whole validation sets; {what}.")
    return sentences


def on_intervals(table: SuperGlueTable) -> list[str]:
    """What ranges are, if there are any."""
    every = (value for block in table.blocks for line in block.lines for value in line.values.values())
    if not any(value.interval for value in every):
        return []
    return ["Ranges are 95 % intervals over the choice of examples (bootstrap; those about one text drawn together)."]


def superglue_markdown(table: Table2, found: SuperGlueTable) -> str:
    """The table as Markdown."""

    def formatted(cell: Shown) -> str:
        text = in_markdown(cell.text)
        text = f"**{text}**" if cell.best else f"*{text}*" if cell.cited and cell.text != "–" else text
        return f"{text} ({cell.interval})" if cell.interval else text

    parts = [f"# {in_markdown(table.about())}"]
    names = ["backbone", "method", *headings(found)]
    rows = [
        [in_markdown(block.backbone), in_markdown(what), *map(formatted, values)]
        for block in found.blocks
        for what, values in shown_lines(found, block)
    ]
    align = ["left", "left", *["right"] * (len(names) - 2)]
    text = pd.DataFrame(rows, columns=names, dtype=object).to_markdown(
        index=False, colalign=align if rows else None, disable_numparse=True
    )
    return (
        "\n\n".join([*parts, text or "", *map(in_markdown, (*legend_of(found), *on_intervals(found), *table.notes))])
        + "\n"
    )


def superglue_latex(table: Table2, found: SuperGlueTable) -> str:
    """The table as LaTeX with booktabs, without intervals."""

    def formatted(cell: Shown) -> str:
        text = as_tex(cell.text)
        return rf"\textbf{{{text}}}" if cell.best else rf"\textit{{{text}}}" if cell.cited else text

    def row(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    columns = headings(found)
    lines = [
        "% Made by megaprompt report; needs \\usepackage{booktabs}.",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}",
    ]
    lines += [r"\toprule", row(["", "", *map(as_tex, columns)])]
    for block in found.blocks:
        lines.append(r"\midrule")
        for i, (what, values) in enumerate(shown_lines(found, block)):
            lines.append(row([as_tex(block.backbone) if i == 0 else "", as_tex(what), *map(formatted, values)]))
    notes = (f"{table.about()}.", *legend_of(found), *table.notes)
    lines += [r"\bottomrule", r"\end{tabular}", "", r"{\footnotesize", *map(as_tex, notes), "}"]
    return "\n".join(lines) + "\n"


def superglue_csv(found: SuperGlueTable) -> str:
    """A line per number, for programs, in per cent."""
    lines: list[dict[str, object]] = []
    for block in found.blocks:
        where = {"backbone": block.backbone, "setting": found.setting}
        for line in block.lines:
            for (task, metric), value in line.values.items():
                if value.text != "–":
                    low, high = value.interval or (None, None)
                    about = {"method": line.method, "task": task or found.average_heading, "metric": metric}
                    numbers = {"value": value.mean, "deviation": value.deviation, "low": low, "high": high}
                    shown = {name: None if number is None else f"{number:.4f}" for name, number in numbers.items()}
                    lines.append({**where, **about, **shown, "seeds": line.seeds, "source": "measured"})
        for cited in block.cited.lines if block.cited else ():
            for (task, metric), text in found.cited_values(cited).items():
                about = {"method": cited.what, "task": task or found.average_heading, "metric": metric}
                if text != "–":
                    lines.append({**where, **about, "value": str(text), "source": f"cited: {PAPER}"})
    names = ["backbone", "setting", "method", "task", "metric", "value", "deviation", "low", "high", "seeds", "source"]
    return pd.DataFrame(lines, columns=names, dtype=object).to_csv(index=False, lineterminator="\n")
