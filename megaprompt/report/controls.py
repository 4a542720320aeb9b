"""What a gain over manual prompts is made of: how the same prompts do where nothing is frequent, and what a model that
knows nothing reaches when it learns the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from megaprompt.report.runs import plural, points
from megaprompt.report.table2 import RANDOM, BackboneRow, Table2
from megaprompt.report.table2_formats import relation_text, with_deviation
from megaprompt.report.tables import lead_of, methods_in_order


@dataclass(frozen=True)
class ControlTable:
    """Scores on test and under one control, over the relations that all methods have there."""

    name: str  # `on wiki_uni`, `random weights`
    relations: list[str]
    macro: dict[str, tuple[str, str]]  # method -> on test, under the control
    by_relation: dict[str, dict[str, tuple[str, str]]]  # relation -> method -> the same


@dataclass(frozen=True)
class ControlSection:
    """The controls of a backbone, and what they say."""

    backbone: str
    sentences: list[str]
    tables: list[ControlTable]


def control_sections(table: Table2) -> list[ControlSection]:
    """Of the backbones that have controls."""
    names = list(table.relations)
    return [
        ControlSection(row.name, _sentences(row, table), [_table(row, name, names) for name in row.controls])
        for row in table.rows
        if row.controls
    ]


def _both(row: BackboneRow, control: str, methods: Sequence[str]) -> np.ndarray:
    """The relations [relations] (bool) that these methods have scores of, on test and under a control."""
    cells = [cells[method] for cells in (row.cells, row.controls[control]) for method in methods]
    return reduce(np.logical_and, [cell.scored for cell in cells])


def _table(row: BackboneRow, control: str, names: Sequence[str]) -> ControlTable:
    methods = methods_in_order(row.controls[control])
    pairs = {method: (row.cells[method], row.controls[control][method]) for method in methods}
    both = _both(row, control, methods)
    macro = {
        method: (with_deviation(*test.mean("macro", both)), with_deviation(*other.mean("macro", both)))
        for method, (test, other) in pairs.items()
    }
    by_relation = {
        name: {method: (relation_text(test, i), relation_text(other, i)) for method, (test, other) in pairs.items()}
        for i, name in enumerate(names)
        if both[i]
    }
    return ControlTable(control, list(by_relation), macro, by_relation)


# ------------------------------------------------------------------------------------------------------------ in words


def _sentences(row: BackboneRow, table: Table2) -> list[str]:
    """What the gain of the lead over manual prompts is made of, as far as it was measured: each sentence is about the
    relations of which all is known that it tells."""
    lead = lead_of(row.cells)
    if lead is None or "manual" not in row.cells:
        return []
    both = row.cells["manual"].scored & row.cells[lead].scored
    if not both.any():
        return []
    manual, learned = (row.cells[method].mean("macro", both)[0] for method in ("manual", lead))
    sentences = [
        f"The gain of {lead} over manual prompts is {points(learned - manual)} points, from {manual:.1f} to "
        f"{learned:.1f} % ({_over(both, table)})."
    ]
    if "majority" in row.cells and (known := both & row.cells["majority"].scored).any():
        sentences.append(
            f"Always giving the answer that is most frequent in train scores "
            f"{row.cells['majority'].mean('macro', known)[0]:.1f} %: a prompt can learn that much without drawing "
            "anything out of the model."
        )
    for control, cells in row.controls.items():
        if control == RANDOM:
            sentences += _on_random_weights(row, lead, table)
        elif {lead, "manual"} <= cells.keys():
            sentences += _on_other_facts(row, lead, control, table)
    return sentences


def _over(where: np.ndarray, table: Table2) -> str:
    return f"over {plural(int(where.sum()), table.scoring.words.group)}"


def _on_random_weights(row: BackboneRow, lead: str, table: Table2) -> list[str]:
    cells = row.controls[RANDOM]
    if lead not in cells or not (where := _both(row, RANDOM, [lead])).any():
        return []
    learned, random = (each[lead].mean("macro", where)[0] for each in (row.cells, cells))
    return [
        f"The same on the same architecture with random weights, which know nothing, reaches {random:.1f} % where "
        f"{lead} has {learned:.1f} % ({_over(where, table)}): so much is learned from the training "
        f"{table.scoring.items} alone."
    ]


def _on_other_facts(row: BackboneRow, lead: str, control: str, table: Table2) -> list[str]:
    where, cells = _both(row, control, [lead, "manual"]), row.controls[control]
    if not where.any():
        return []
    gain, left = (
        each[lead].mean("macro", where)[0] - each["manual"].mean("macro", where)[0] for each in (row.cells, cells)
    )
    found = cells[lead].runs[0].evaluations[control.removeprefix("on ")]
    shares = [
        found["methods"][lead]["relations"][name]["most_frequent"]
        for name, known in zip(table.relations, where, strict=True)
        if known
    ]
    among = "" if found["vocabulary"] == table.vocabulary else f", among {found['vocabulary']}"
    return [
        f"{control[:1].upper()}{control[1:]}{among}, where always giving the most frequent answer would score "
        f"{100 * float(np.mean(shares)):.1f} %, the same prompts score "
        f"{cells[lead].mean('macro', where)[0]:.1f} % and {cells['manual'].mean('macro', where)[0]:.1f} % "
        f"({_over(where, table)}): of {points(gain)} points, {points(left)} remain."
    ]
