"""Several runs over parts of the relations, such as the tasks of a job array, put together as if they were one.

Relations do not influence each other, so what comes out is what one run over all of them would have given.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaprompt.config import ProbeConfig, SuperGlueConfig, from_yaml
from megaprompt.errors import MegapromptError
from megaprompt.files import write_file
from megaprompt.report.runs import Run, read_run
from megaprompt.run.averages import summarize
from megaprompt.run.directory import MAY_CHANGE, RunDirectory

logger = logging.getLogger(__name__)


def kind_of(run: Run) -> type[ProbeConfig] | type[SuperGlueConfig]:
    """Of which command a run is, by its options.

    Raises:
        MegapromptError: of none.
    """
    for kind in (ProbeConfig, SuperGlueConfig):
        if run.options.keys() <= {option.name for option in dataclasses.fields(kind)}:
            return kind
    raise MegapromptError(f"{run.path / 'config.yaml'}: has options of no command; take it from the run again")


def merge_runs(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write config.yaml, results.json, log.jsonl, prompts of all methods and predictions of all complete runs into one
    directory.

    Raises:
        MegapromptError: no run is complete, or they do not belong together.
    """
    found = [read_run(path) for path in runs]
    complete = [run for run in found if run.results.get("complete")]
    for run in found:
        if not run.results.get("complete"):
            logger.warning("%s is not complete and left out; continue it with --resume", run.path)
    if not complete:
        raise MegapromptError(f"{out}: none of its runs is complete; continue them with --resume")
    _check_alike(complete)
    counts = Counter(name for run in complete for name in run.results["data"]["relations"])
    for name, count in counts.items():
        if count > 1:
            raise MegapromptError(
                f"{out}: {count} of its runs have the relation {name}; keep one of them, or give them to megaprompt "
                "report one by one to compare them"
            )
    order = sorted(counts, key=lambda name: (len(name), name))
    merged = {**_together([run.results for run in complete], order), "complete": len(complete) == len(found)}
    log = sorted((line for run in complete for line in run.log), key=lambda line: line.get("time", 0.0))
    write_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
    if templates := [text for run in complete for text in _templates_of(run)]:
        write_file(out / "autoprompt.jsonl", "".join(templates).encode())
    for run in complete:
        for files in ("prompts/**/*.safetensors", "predictions/*.jsonl", "submission/*/*.jsonl"):
            for path in run.path.glob(files):
                write_file(out / path.relative_to(run.path), path.read_bytes())
    if all(run.options for run in complete):  # which differ only in what changes no results
        config = from_yaml(kind_of(complete[0]), complete[0].path / "config.yaml")
        parts: dict[str, Any] = {config.PARTS: tuple(order)}
        RunDirectory(out).write_config(dataclasses.replace(config, out=out, **parts))
    RunDirectory(out).write_results(merged)
    return merged


def _templates_of(run: Run) -> list[str]:
    path = run.path / "autoprompt.jsonl"
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _check_alike(runs: Sequence[Run]) -> None:
    """See that runs differ in nothing but their relations.

    Raises:
        MegapromptError: names what differs.
    """
    first, *others = runs
    for run in others:
        for (what, key), mine in _told(run.results).items():
            if mine != (other := _told(first.results)[what, key]):
                raise MegapromptError(
                    f"{run.path}: its {what} is not that of {first.path} ({key} {mine}, not {other}); merge only what "
                    "is alike"
                )
        mine, other = (", ".join(each.results["methods"]) for each in (run, first))
        if run.results["methods"].keys() != first.results["methods"].keys():
            raise MegapromptError(
                f"{run.path}: its methods are not those of {first.path} ({mine}, not {other}); merge only what is alike"
            )
        files, theirs = (each.results["data"].get("files", {}) for each in (run, first))
        if changed := [name for name in files.keys() & theirs.keys() if files[name] != theirs[name]]:
            raise MegapromptError(
                f"{run.path}: {min(changed)} was not the same file when {first.path} read it; merge only what is alike"
            )
    _check_options([run for run in runs if run.options])


def _told(results: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """What has to be the same. Beside the score, tasks may have metrics of their own."""
    keys = (("backbone", "fingerprint"), ("backbone", "dtype"), ("data", "name"), ("data", "vocabulary"))
    return {(what, key): results[what][key] for what, key in keys} | {("score", "name"): next(iter(results["metrics"]))}


def _check_options(runs: Sequence[Run]) -> None:
    """See that runs were given the same options, as far as options change results.

    Raises:
        MegapromptError: names the first option that differs, and its two values.
    """

    def shown(value: Any) -> str:
        """A value as the command line takes it."""
        if value is None:
            return "(not given)"
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    if not runs:
        return
    # What --deepspeed may change, the precision, is compared by itself.
    kind = kind_of(runs[0])
    may_differ = MAY_CHANGE | {kind.PARTS}
    for option in dataclasses.fields(kind):
        values = [shown(run.options.get(option.name, option.default)) for run in runs]
        for run, value in zip(runs, values, strict=True):
            if option.name not in may_differ and value != values[0]:
                flag = f"--{option.name.replace('_', '-')}"
                raise MegapromptError(
                    f"{run.path}: has {flag} {value}, {runs[0].path} has {flag} {values[0]}; merge only what is alike"
                )


def _together(parts: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The results of one run over the relations of all parts, in this order."""
    first = parts[0]

    def rows_of(path: Sequence[str]) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for part in parts:
            found: Any = part
            for key in (*path, "relations"):
                found = found[key]
            rows |= found
        return {name: rows[name] for name in order}

    methods = {method: rows_of(("methods", method)) for method in first["methods"]}
    metrics = {name: heading for part in parts for name, heading in part["metrics"].items()}
    files = {name: digest for part in parts for name, digest in part["data"].get("files", {}).items()}
    commands = [command for part in parts for command in part.get("commands", ())]
    return {
        **first,
        **({"commands": commands} if commands else {}),  # older runs do not tell
        "metrics": metrics,
        "data": {**first["data"], **({"files": files} if files else {}), "relations": rows_of(("data",))},
        "methods": {method: {"relations": rows, **summarize(rows, list(metrics))} for method, rows in methods.items()},
        "timing": {"training_seconds": sum(part["timing"].get("training_seconds", 0.0) for part in parts)},
        "peak_memory_bytes": [peak for part in parts for peak in part["peak_memory_bytes"]],
    }
