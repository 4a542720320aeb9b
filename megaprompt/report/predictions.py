"""What the methods of a backbone answered on test, from the predictions that runs have written.

A method is right about a fact if it ranks the object first.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaprompt.errors import MegapromptError
from megaprompt.report.runs import Run
from megaprompt.report.table2 import BackboneRow

Item = tuple[str, str, str, int]  # relation, input, gold, and which of several items with the same words

_OTHERS = 4  # answers behind the first one that are kept


class Answer(NamedTuple):
    """What a model says about an item."""

    text: str
    probability: float  # NaN if it was not written
    right: bool
    rank: int | None = None  # of the gold; None where answers are not ranked, or its rank is not known
    of_gold: float = math.nan  # probability of the gold
    others: tuple[tuple[str, float], ...] = ()  # the next answers with their probabilities, likeliest first


@dataclass(frozen=True)
class Answers:
    """What the methods of one backbone answered on test. Only items that were asked with every seed count."""

    items: list[Item]
    right: dict[str, np.ndarray]  # method -> [items] share of the seeds that are right; NaN if not asked
    first: dict[str, list[Answer | None]]  # method -> [items] of the first seed; None if not asked


def read_answers(row: BackboneRow, relations: Sequence[str], whole: Mapping[str, int] | None = None) -> Answers:
    """The predictions of all methods and seeds of a backbone. Methods without predictions, as majority, are left out.

    Args:
        whole: of how many items of each relation, the first ones, all of an answer is kept (`Answer.others`); of others
            that would only take memory.

    Raises:
        MegapromptError: a file is damaged.
    """
    runs = {run.path: run for cell in row.cells.values() for run in cell.runs}
    seeds = {method: [run.path for run in cell.runs] for method, cell in row.cells.items()}
    place: dict[Item, int] = {}
    right: dict[tuple[str, Path], dict[int, bool]] = defaultdict(dict)  # (method, run) -> place of the item
    given: dict[str, dict[int, Answer]] = defaultdict(dict)  # method -> place; of the first seed
    for relation in relations:
        before, most = len(place), (whole or {}).get(relation, 0)
        for path, run in runs.items():
            seen: Counter[tuple[str, ...]] = Counter()
            for method, input_, gold, answer in _predictions(run, relation):
                if path not in seeds.get(method, ()):
                    continue
                words = (method, input_, gold)
                index = place.setdefault((relation, input_, gold, seen[words]), len(place))
                seen[words] += 1
                right[method, path][index] = answer.right
                if path == seeds[method][0]:
                    given[method][index] = answer if index - before < most else answer._replace(others=())
    shares: dict[str, np.ndarray] = {}
    for method, paths in seeds.items():
        if all(right[method, path] for path in paths):
            of_seeds = np.full((len(paths), len(place)), np.nan)
            for i, path in enumerate(paths):
                of_seeds[i, list(right[method, path])] = list(right[method, path].values())
            shares[method] = of_seeds.mean(0)
    first = {method: [given[method].get(index) for index in range(len(place))] for method in shares}
    return Answers(list(place), shares, first)


def _predictions(run: Run, relation: str) -> Iterator[tuple[str, str, str, Answer]]:
    """Method, input, gold and answer of every line."""
    path = run.path / "predictions" / f"{relation}.jsonl"
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for text in file:
                line = json.loads(text)
                ranked = "rank" in line
                input_, gold = (line["subject"], line["object"]) if ranked else (line["input"], line["gold"])
                yield line["method"], str(input_), str(gold), _ranked(line) if ranked else _told(line)
    except (ValueError, KeyError, TypeError) as error:
        raise MegapromptError(f"{path}: is damaged ({error!r}); run the probe again") from error


def _ranked(line: Mapping[str, Any]) -> Answer:
    """Of a fact, whose answers are ranked."""
    (best, probability), *others = [(text, _known(p)) for text, p in line.get("top") or [("–", None)]]
    following = tuple(others[:_OTHERS])
    return Answer(best, probability, line["rank"] == 1, line["rank"], _known(line.get("probability")), following)


def _told(line: Mapping[str, Any]) -> Answer:
    """Of an item that says itself whether it was answered right; WSC's was judged by what was written."""
    written = f" (“{line['written']}”)" if "written" in line else ""
    return Answer(f"{line['answer']}{written}", _known(line.get("probability")), bool(line["right"]))


def _known(probability: float | None) -> float:
    return math.nan if probability is None else probability
