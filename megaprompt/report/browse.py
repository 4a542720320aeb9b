"""The items of test with all that was answered, as a page holds them so that a reader can search them.

A page has to open fast, so that it holds so many items of each relation as fit into a number of bytes; the files of
predictions have all. `browse.js` shows what is written here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaprompt.report.comparison import compared_pair
from megaprompt.report.predictions import Answer, Answers
from megaprompt.report.runs import beside
from megaprompt.report.table2 import BackboneRow, Table2
from megaprompt.report.tables import methods_in_order

MOST_BYTES = 8_000_000  # about: the largest page opens within a second
_BYTES_OF_ANSWER = 55
_BYTES_OF_ITEM = {"facts": 40, "examples": 700}


@dataclass(frozen=True)
class Browsed:
    """What a page holds of the items of test."""

    data: str  # JSON that can stand in a script element
    methods: list[str]
    pair: tuple[int, int]  # of the methods, which are set against each other at first
    relations: list[tuple[str, str, int]]  # name, label (empty if it repeats the name), items on the page
    asked: int  # items of which there are answers

    @property
    def held(self) -> int:
        return sum(count for _, _, count in self.relations)


def quotas(table: Table2) -> dict[str, int]:
    """How many items of each relation fit into a page: the same number of all, more where others have fewer."""
    methods = sum(len(row.cells) for row in table.rows)
    each = _BYTES_OF_ITEM[table.scoring.items] + _BYTES_OF_ANSWER * methods
    left, found = MOST_BYTES // each, {}
    counts = {name: about["facts"]["test"] for name, about in table.relations.items()}
    for place, name in enumerate(sorted(counts, key=lambda name: counts[name])):
        found[name] = left // (len(counts) - place)
        left -= min(counts[name], found[name])
    return found


def browsed(table: Table2, asked: Sequence[Answers]) -> Browsed | None:
    """What a page holds; None if there are no predictions.

    Args:
        asked: the answers of each row of the table, read with these `quotas`.
    """
    columns: dict[str, dict[tuple[str, str, str, int], Answer | None]] = {}
    items: dict[tuple[str, str, str, int], None] = {}
    pair = None
    for row, answers in zip(table.rows, asked, strict=True):
        methods = methods_in_order(answers.first)
        if pair is None and methods:
            chosen = compared_pair(row, methods) if len(methods) > 1 else (methods[0], methods[0])
            pair = (len(columns) + methods.index(chosen[0]), len(columns) + methods.index(chosen[1]))
        for method in methods:
            columns[_name(table, row, method)] = dict(zip(answers.items, answers.first[method], strict=True))
        items |= dict.fromkeys(answers.items)
    if pair is None:
        return None
    limits, held = quotas(table), Counter[str]()
    shown = []
    for item in items:
        if held[item[0]] < limits[item[0]]:
            held[item[0]] += 1
            shown.append(item)
    relations = [
        (name, beside(name, about["label"]), held[name]) for name, about in table.relations.items() if held[name]
    ]
    data = _packed(shown, columns, {name: label or name for name, label, _ in relations})
    return Browsed(data, list(columns), pair, relations, len(items))


def _name(table: Table2, row: BackboneRow, method: str) -> str:
    return f"{row.name}: {method}" if len(table.rows) > 1 else method


def _packed(
    items: Sequence[tuple[str, str, str, int]],
    columns: Mapping[str, Mapping[tuple[str, str, str, int], Answer | None]],
    relations: Mapping[str, str],
) -> str:
    """Columns of numbers, by which texts are named: each stands there once. `relations` are names with what is shown.

    Ranks are 1 where an answer is right, 0 where it is wrong and its rank is not known, and -1 where it was not asked.
    Probabilities are in thousandths, -1 if they are not known. `said` has the answers, likeliest first, each followed
    by its probability.
    """
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    def said(answer: Answer | None) -> list[int]:
        if answer is None:
            return []
        each = ((answer.text, answer.probability), *answer.others)
        return [number for text, probability in each for number in (word(text), _thousandths(probability))]

    methods = []  # first, since short numbers are for texts that are said often
    for method, answers in columns.items():
        found = [answers.get(item) for item in items]
        methods.append(
            {
                "name": method,
                "rank": [-1 if each is None else 1 if each.right else each.rank or 0 for each in found],
                "gold": [-1 if each is None else _thousandths(each.of_gold) for each in found],
                "said": [said(each) for each in found],
            }
        )
    places = {name: place for place, name in enumerate(relations)}
    packed = {
        "groups": list(relations.values()),
        "group": [places[item[0]] for item in items],
        "gold": [word(item[2]) for item in items],
        "input": [word(item[1]) for item in items],
        "methods": methods,
        "words": list(words),
    }
    text = json.dumps(packed, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # nothing in it ends the script element, or begins a comment


def _thousandths(probability: float) -> int:
    return round(1000 * probability) if math.isfinite(probability) else -1
