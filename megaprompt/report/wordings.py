"""Several wordings of one run together: mean and standard error, and an entry for BEAR's leaderboard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaprompt.files import write_file
from megaprompt.report.runs import Run, Scoring, known, plural

ENTRY = "leaderboard_entry.json"


def over_wordings(results: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Mean and standard error of the score over all items, and over how many wordings; None if there are not several.

    As on BEAR's leaderboard (arXiv 2404.04113): each wording is scored over all facts, then the wordings are averaged.
    """
    score = Scoring.of(results).score
    columns = ["manual", *(name for name in results["methods"] if name.startswith("wording "))]
    averages = [(results["methods"].get(name) or {}).get("micro") or {} for name in columns]
    values = [each[score] for each in averages if known(each.get(score))]
    if len(values) < max(2, len(columns)):
        return None
    return *mean_and_error(values), len(values)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of at least two values."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def notes_of_answers(results: Mapping[str, Any]) -> list[str]:
    """Sentences about wordings and answers."""
    notes, scoring = [], Scoring.of(results)
    if (found := over_wordings(results)) is not None:
        mean, error, count = found
        notes.append(
            f"{count} manual wordings: {scoring.heading} {100 * mean:.1f} ± {100 * error:.1f} % over {scoring.items} "
            "(mean and standard error)."
        )
    about = results["data"]["relations"].values()
    if balanced := sum(bool(each.get("balanced")) for each in about):
        notes.append(
            f"In {balanced} of {plural(len(about), scoring.words.group)}, every answer of test is right equally often: "
            "there a prompt gains nothing by knowing what is frequent."
        )
    return notes


def write_entry(run: Run, out: Path) -> None:
    """Write what BEAR's leaderboard wants to know, if the run has it: all facts of its relations in all wordings, and
    of causal models with a beginning-of-text token, as LM Pub Quiz sets it."""
    results = run.results
    found, backbone = over_wordings(results), results["backbone"]
    about = results["data"]["relations"].values()
    of_all = all(each["facts"]["test"] == each.get("usable", {}).get("candidates") for each in about)
    begins = run.options.get("bos") == "always" or not backbone.get("causal", True)
    if found is None or results["data"].get("answers") != "candidates" or not of_all or not begins or run.control:
        (out / ENTRY).unlink(missing_ok=True)
        return
    entry = {
        "model_name": backbone["name"],
        "model_url": None,
        "model_family": None,
        "model_type": "CLM" if backbone.get("causal", True) else "MLM",
        "num_params": backbone["parameters"],
        "num_tokens": None,
        "size_pretraining_GB": None,
        "source": None,
        "accuracy": {"mean": found[0], "sem": found[1]},
    }
    write_file(out / ENTRY, (json.dumps(entry, indent=1) + "\n").encode())
