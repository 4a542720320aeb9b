"""`megaprompt rerun RUN --out NEW`: repeat a run from its own configuration, and tell whether the same comes out."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from megaprompt.config import ProbeConfig, RerunConfig, SuperGlueConfig, from_yaml
from megaprompt.errors import MegapromptError
from megaprompt.report.runs import Run, read_run
from megaprompt.run.directory import RunDirectory
from megaprompt.run.merge import kind_of

_SETTLED = ("pass_tokens", "candidates")
"""Options that a run settles by the memory that it finds, if they are not given: a rerun takes what was settled."""


class Comparison(NamedTuple):
    """What a run and its rerun have in common.

    Args:
        origins: a line for each thing from which results come, and that differs.
        rows: method -> macro score before and now, the number of predictions, and of those that differ.
    """

    origins: list[str]
    rows: dict[str, tuple[float | None, float | None, int, int]]

    @property
    def same(self) -> bool:
        """Whether all scores and predictions are the same."""
        return all(before == now and not differ for before, now, _, differ in self.rows.values())


def repeated(config: RerunConfig) -> ProbeConfig | SuperGlueConfig:
    """The options of a run, for another directory.

    Raises:
        UsageError: there is no run.
        MegapromptError: it is not complete, or has no config.yaml.
    """
    run = read_run(config.run)
    if not run.results.get("complete"):
        raise MegapromptError(f"{config.run}: is not complete; continue it with --resume first")
    if not run.options:
        raise MegapromptError(f"{config.run}: has no config.yaml, which says what to repeat; give a whole run")
    options = from_yaml(kind_of(run), config.run / "config.yaml")
    settled = {
        name: run.results[name]
        for name in _SETTLED
        if name in run.results and getattr(options, name, run.results[name]) is None
    }
    return dataclasses.replace(options, out=config.out, resume=config.resume, **settled)


def compare(run: Path, again: Path) -> Comparison:
    """A run beside another one that was given the same options.

    Raises:
        UsageError: one of them is no run.
        MegapromptError: a file is damaged.
    """
    before, now = read_run(run), read_run(again)
    answers = [_answers(each) for each in (before, now)]
    score = next(iter(before.results["metrics"]))
    rows = {}
    for method in {**before.results["methods"], **now.results["methods"]}:
        pairs = list(zip_longest(*(each.get(method, []) for each in answers)))
        macro = [each.results["methods"].get(method, {}).get("macro", {}).get(score) for each in (before, now)]
        rows[method] = (macro[0], macro[1], len(pairs), sum(one != other for one, other in pairs))
    return Comparison(_origins_that_differ(before.results, now.results), rows)


def _answers(run: Run) -> dict[str, list[dict[str, Any]]]:
    """What each method of a run predicted, without probabilities, which differ by rounding between machines; of the
    best answers only the first."""
    directory, found = RunDirectory(run.path), defaultdict(list)
    for relation in run.results["data"]["relations"]:
        for line in directory.read_predictions(relation):
            top = line.get("top") or [[None]]
            found[line["method"]].append({**line, "relation": relation, "probability": None, "top": top[0][0]})
    return found


def _origins_that_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was not told before is not compared."""
    lines = []
    for what, then, today in (
        ("backbone", before["backbone"], now["backbone"]),
        ("data", before["data"].get("files", {}), now["data"]["files"]),
        ("asked of", _digests(before), _digests(now)),
        ("environment", before.get("environment", {}), now["environment"]),
    ):
        for name in then:
            if name in today and then[name] != today[name]:
                lines.append(f"{what} {name}: {_text(today[name])}, was {_text(then[name])}")
    return lines


def _digests(results: Mapping[str, Any]) -> dict[str, str]:
    return {name: row["sha256"] for name, row in results["data"]["relations"].items() if "sha256" in row}


def _text(value: Any) -> str:
    return f"{value[:16]}{'…' * (len(value) > 16)}" if isinstance(value, str) else json.dumps(value)
