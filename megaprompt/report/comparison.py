"""Two methods on the same test items: where one is right and the other is not, and how sure their difference is.

All is made from the predictions that the runs wrote.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import shorten
from typing import Any

import numpy as np

from megaprompt.report.predictions import Answer, Answers
from megaprompt.report.table2 import BackboneRow
from megaprompt.report.tables import lead_of, methods_in_order

_LETTERS = 240  # of an input that are shown


@dataclass(frozen=True)
class Difference:
    """Share of right answers of one method less that of another on the same items (mean over relations), in points,
    with its 95 % interval."""

    method: str
    other: str
    points: float
    low: float
    high: float
    relations: int
    items: int


@dataclass(frozen=True)
class Example:
    """An item, and what two methods answered."""

    label: str  # of the relation
    input: str
    gold: str
    answers: tuple[Answer, Answer]


@dataclass(frozen=True)
class Knowledge:
    """Where two methods are right, with the first seed of each."""

    first: str
    second: str
    counts: dict[tuple[bool, bool], int]  # (first is right, second is right) -> items
    examples: dict[tuple[bool, bool], list[Example]]


@dataclass(frozen=True)
class Comparison:
    """All that is compared on one backbone."""

    name: str
    knowledge: Knowledge | None
    differences: list[Difference]


def compare(row: BackboneRow, asked: Answers, relations: Mapping[str, Mapping[str, Any]]) -> Comparison | None:
    """Compare `best` or P-tuning (or else the method that scores most) with every other that wrote predictions, on one
    backbone; None if there is nothing to compare.

    Args:
        asked: what the methods of this backbone answered.
        relations: about them, by name.
    """
    methods = methods_in_order(asked.right)
    if len(methods) < 2:
        return None
    pair = compared_pair(row, methods)
    lead = pair[1]
    differences = [difference(asked, lead, method) for method in methods if method != lead]
    labels = {name: about["label"] or name for name, about in relations.items()}
    knowledge = knowledge_of(asked, *pair, labels)
    known = [each for each in differences if each is not None]
    return Comparison(row.name, knowledge, known) if knowledge or known else None


def compared_pair(row: BackboneRow, methods: Sequence[str]) -> tuple[str, str]:
    """The two of several methods that are set against each other, the lead last: as in the paper, what is learned
    against what is written, where both are there, or else the two that score most."""
    macro = row.means()
    best_first = sorted(methods, key=lambda method: -macro.get(method, -math.inf))
    lead = lead_of(methods) or best_first[0]
    if lead_of(methods) and "manual" in methods:
        return "manual", lead
    return next(method for method in best_first if method != lead), lead


# -------------------------------------------------------------------------------------------------- how sure, and which


def difference(asked: Answers, method: str, other: str, *, samples: int = 10_000, seed: int = 0) -> Difference | None:
    """The difference of the shares of right answers (mean over relations) on the items that both methods were asked,
    with a paired bootstrap interval.

    Inputs (subjects) are drawn with replacement within their relation, each with all its items, the same ones for both
    methods: where a subject has several objects its facts are one question, which is right about one of them at most.
    With several seeds an item counts as the share of the seeds that are right: the interval tells of the choice of
    items, not of seeds.

    Returns:
        None if there is no item that both were asked.
    """
    gap = 100 * (asked.right[method] - asked.right[other])  # [items] points
    both = np.isfinite(gap)
    if not both.any():
        return None
    relation, subject = (np.array([item[part] for item in asked.items])[both] for part in (0, 1))
    low, high = bootstrap_interval(gap[both], relation, subject, samples=samples, seed=seed)
    names = np.unique(relation)
    mean = float(np.mean([gap[both][relation == name].mean() for name in names]))
    return Difference(method, other, mean, low, high, len(names), int(both.sum()))


def bootstrap_interval(
    values: np.ndarray, group: np.ndarray, cluster: np.ndarray, *, samples: int, seed: int
) -> tuple[float, float]:
    """The middle 95 % of the mean over groups of group means, when clusters are drawn again within their group.

    Drawing n clusters with replacement is drawing how often each kind of cluster comes, of the same sum and size: one
    multinomial for each group.

    Args:
        values: [N].
        group: [N] relations.
        cluster: [N] what is drawn as a whole, such as the facts of one subject.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(samples)
    names = np.unique(group)
    for name in names:
        mine = group == name
        _, place = np.unique(cluster[mine], return_inverse=True)
        sums = np.round(np.bincount(place, values[mine]), 9)  # equal ones are equal whatever their order
        kinds, counts = np.unique(np.stack([sums, np.bincount(place)]), axis=1, return_counts=True)
        n = counts.sum()
        drawn = generator.multinomial(n, counts / n, size=samples)  # [samples, kinds]
        total += (drawn @ kinds[0]) / (drawn @ kinds[1])
    low, high = np.percentile(total / len(names), (2.5, 97.5))
    return float(low), float(high)


def knowledge_of(
    asked: Answers, first: str, second: str, labels: Mapping[str, str], examples: int = 4
) -> Knowledge | None:
    """Where two methods are right, with the first seed of each, and some examples of each kind.

    Examples are those of which the models are surest, from as many relations as possible.
    """
    kinds: dict[tuple[bool, bool], list[tuple[str, Example]]] = {(True, True): [], (True, False): []}
    kinds |= {(False, True): [], (False, False): []}
    for item, one, two in zip(asked.items, asked.first[first], asked.first[second], strict=True):
        if one is not None and two is not None:
            relation, input_, gold, _ = item
            shown = shorten(input_, _LETTERS, placeholder=" …") if len(input_) > _LETTERS else input_
            kinds[one.right, two.right].append((relation, Example(labels[relation], shown, gold, (one, two))))
    if not any(kinds.values()):
        return None
    chosen = {kind: _surest(kind, found, examples) for kind, found in kinds.items()}
    return Knowledge(first, second, {kind: len(found) for kind, found in kinds.items()}, chosen)


def _surest(kind: tuple[bool, bool], found: Sequence[tuple[str, Example]], count: int) -> list[Example]:
    """The items of which the model is surest, one per relation as long as there are more relations."""

    def probability(example: Example) -> float:
        """Of the right answer, or of the surer wrong one if both are wrong."""
        right = [answer.probability for answer in example.answers if answer.right or not any(kind)]
        return max((p for p in right if math.isfinite(p)), default=0.0)

    by_relation: dict[str, list[Example]] = defaultdict(list)
    for relation, example in sorted(found, key=lambda each: -probability(each[1])):
        by_relation[relation].append(example)
    rounds = zip_longest(*by_relation.values())
    return [example for each in rounds for example in each if example is not None][:count]
