"""Several runs over parts of the relations, such as the tasks of a job array, put together as if they were one.

Relations do not influence each other, so what comes out is what one run over all of them would have given.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprompt.config import ProbeConfig, from_yaml
from megaprompt.errors import MegapromptError
from megaprompt.files import write_file
from megaprompt.run.averages import summarize
from megaprompt.run.directory import RunDirectory

logger = logging.getLogger(__name__)


def merge_runs(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write config.yaml, results.json, log.jsonl, prompts and predictions of all complete runs into one directory.

    Raises:
        MegapromptError: no run is complete, or they do not belong together.
    """
    found = {run: RunDirectory(run).read_results() for run in runs}
    complete = {run: results for run, results in found.items() if results.get("complete")}
    for run in found.keys() - complete.keys():
        logger.warning("%s is not complete and left out; continue it with --resume", run)
    if not complete:
        raise MegapromptError(f"{out}: none of its runs is complete; continue them with --resume")
    first, *others = complete.values()
    for run, results in complete.items():
        for what, key in (("backbone", "fingerprint"), ("data", "name"), ("data", "vocabulary")):
            if results[what][key] != first[what][key]:
                raise MegapromptError(
                    f"{run}: its {what} is not that of {next(iter(complete))}; merge only what is alike"
                )
        if results["methods"].keys() != first["methods"].keys():
            raise MegapromptError(
                f"{run}: its methods are not those of {next(iter(complete))}; merge only what is alike"
            )
    counts = Counter(name for results in complete.values() for name in results["data"]["relations"])
    for name, count in counts.items():
        if count > 1:
            raise MegapromptError(
                f"{out}: {count} of its runs have the relation {name}; keep one of them, or give them to megaprompt "
                "report one by one to compare them"
            )
    order = sorted(counts, key=lambda name: (len(name), name))

    def together(path: Sequence[str]) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for results in complete.values():
            part: Any = results
            for key in (*path, "relations"):
                part = part[key]
            rows |= part
        return {name: rows[name] for name in order}

    methods = {method: together(("methods", method)) for method in first["methods"]}
    merged = {
        **first,
        "complete": len(complete) == len(found),
        "data": {**first["data"], "relations": together(("data",))},
        "methods": {
            method: {
                "relations": rows,
                **summarize(rows, list(first.get("metrics", {"p_at_1": "", "p_at_10": "", "mrr": ""}))),
            }
            for method, rows in methods.items()
        },
        "timing": {"training_seconds": sum(r["timing"].get("training_seconds", 0.0) for r in (first, *others))},
        "peak_memory_bytes": [peak for r in (first, *others) for peak in r["peak_memory_bytes"]],
    }
    log = sorted((line for run in complete for line in RunDirectory(run).read_log()), key=lambda line: line["time"])
    write_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
    for run in complete:
        for path in (*run.glob("prompts/*.safetensors"), *run.glob("predictions/*.jsonl")):
            write_file(out / path.relative_to(run), path.read_bytes())
    configs = [from_yaml(ProbeConfig, run / "config.yaml") for run in complete if (run / "config.yaml").exists()]
    joined = {dataclasses.replace(config, relations=tuple(order), out=out) for config in configs}
    if len(joined) == 1:  # otherwise they were not set up alike, and no configuration would give this result
        RunDirectory(out).write_config(joined.pop())
    RunDirectory(out).write_results(merged)
    return merged
