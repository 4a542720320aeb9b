"""What was tried for each relation and what was chosen on dev, from the rows `tried` and `chosen` of results.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from megaprompt.report.runs import Scoring, beside, known, plural
from megaprompt.report.tables import few_facts, methods_in_order


@dataclass(frozen=True)
class Tried:
    """One way to ask a relation that was tried on dev."""

    method: str  # that tried it
    what: str
    dev: Mapping[str, float]  # metrics
    examples: int  # of dev, on which it was tried
    dropped: int | None  # after how many steps it was learned no further
    test: float | None  # the score, of wordings
    chosen: bool
    is_template: bool = False


@dataclass(frozen=True)
class Choice:
    """What was tried for one relation."""

    relation: str
    label: str
    chosen: dict[str, str]  # by method
    examples: int  # of dev
    by: str  # which metric chose
    few: bool
    tried: list[Tried]

    @property
    def by_method(self) -> dict[str, list[Tried]]:
        """What each method tried."""
        return {method: [each for each in self.tried if each.method == method] for method in self.chosen}

    @property
    def wordings(self) -> list[Tried]:
        """The wordings of the relation, if there are several."""
        found = [each for each in self.tried if each.is_template and each.test is not None]
        return found if len(found) > 1 else []

    @property
    def spread(self) -> str:
        """Mean and standard deviation of the wordings' scores on test, and the lowest and highest."""
        scores = [100 * each.test for each in self.wordings if each.test is not None]
        if len(scores) < 2:
            return "–"
        return f"{fmean(scores):.1f} ± {stdev(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def choices_of(results: Mapping[str, Any]) -> list[Choice]:
    """Of the relations for which something was tried; `results` as in schema 2."""
    scoring, few = Scoring.of(results), few_facts(results)
    choices = []
    for name, about in results["data"]["relations"].items():
        dev = about["facts"]["dev"]
        tried: list[Tried] = []
        chosen: dict[str, str] = {}
        for method in methods_in_order(results["methods"]):
            row = ((results["methods"][method] or {}).get("relations") or {}).get(name) or {}
            found = [_tried(method, each, row, i == 0, dev, scoring) for i, each in enumerate(row.get("tried", ()))]
            tried += found
            for each in found:
                if each.chosen:
                    chosen[method] = each.what
        if tried:
            by = _by(results, dev, scoring)
            choices.append(Choice(name, beside(name, about["label"]), chosen, dev, by, name in few, tried))
    return choices


def _tried(
    method: str, each: Mapping[str, Any], row: Mapping[str, Any], first: bool, dev: int, scoring: Scoring
) -> Tried:
    """A line of `tried`: the first is what was chosen, where the row does not name it."""
    what = (
        ": ".join(each[key] for key in ("name", "template") if key in each and "template" in each)
        or _demonstrations(each)
        or candidate_in_words(str(each.get("name", "–")))
    )
    chosen = each.get("name") == row["chosen"] if "chosen" in row else first
    metrics = {metric: each[metric] for metric in scoring.metrics if metric in each}
    test = each.get(f"test_{scoring.score}")
    return Tried(
        method, what, metrics, each.get("dev_examples", dev), each.get("dropped_after"),
        test if known(test) else None, chosen, "template" in each and method != "pet-best",
    )  # fmt: skip


def _demonstrations(each: Mapping[str, Any]) -> str:
    count = each.get("demonstrations")
    if count is None:
        return ""
    return f"{plural(count, 'demonstration')}, draw {each['draw'] + 1}" if count else "no demonstrations"


def candidate_in_words(name: str) -> str:
    """What a candidate of `best` is: `paper-behind-4` is `p-tuning, behind 4 demonstrations`."""
    whole, slower = name, " and with a lower learning rate" * name.endswith("-slower")
    start, _, count = name.removesuffix("-slower").partition("-behind-")
    starts = {"paper": "p-tuning", "anchors": "learned vectors among manual words"}
    behind = f", behind {plural(int(count), 'demonstration')}" if re.fullmatch(r"\d+", count) else ""
    return starts[start] + behind + slower if start in starts else whole


def _by(results: Mapping[str, Any], examples: int, scoring: Scoring) -> str:
    """The metric that chooses on so many dev examples; empty if the run is older and does not say."""
    selects: Sequence[str] = results.get("selects", ())
    if not selects:
        return ""
    return scoring.metrics[selects[-1] if examples < results.get("few", 0) else selects[0]]
