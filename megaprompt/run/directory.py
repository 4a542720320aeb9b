"""The files of a run. Every file is complete or absent: it is written aside, flushed to disk, and renamed.

config.yaml                 the whole configuration, enough to repeat the run
progress.json               how far it is, for other programs to read (see `progress`)
results.json                scores of every method so far; "complete" says whether that is all
prompts/P36.safetensors     learned prompt vectors [pseudo tokens, hidden size], with what they belong to
prompts/best/, manual/ ...  the same of other methods; of text alone without vectors
evaluations/NAME.json       scores of the prompts on other facts (`megaprompt evaluate --report`)
predictions/P36.jsonl       subject, object, rank and best answers per fact and method
submission/manual/CB.jsonl  the answers of a method in the data's own format, if it has one
state/                      until the run is complete:
state/step-00000150/        a checkpoint of training: one file per relation, and a manifest with their checksums
state/parts/                what a search has found so far
autoprompt.jsonl            prompts that AutoPrompt found, for `--discrete`
log.jsonl, tensorboard/     one line for each time that a relation is scored on dev; what was tried and chosen of each
report.html, *.png          see `report`
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megaprompt.config import RunConfig, from_yaml, to_yaml
from megaprompt.errors import UsageError
from megaprompt.files import write_file

logger = logging.getLogger(__name__)

SCHEMA = 2
"""Of results.json and of the lines of predictions."""

MAY_CHANGE = {"out", "resume", "check", "deepspeed", "relation_groups", "row_tokens", "pass_tokens"}
"""Options that do not change results (beyond rounding), so a resumed run may have others."""


class RunDirectory:
    """The directory of one run. Only the main rank writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: RunConfig) -> RunDirectory:
        """The directory for a new run, or of one to go on with. Nothing is written yet.

        Raises:
            UsageError: the directory holds another run, or there is nothing to resume, or with other options.
        """
        run = cls(config.out)
        saved = run.path / "config.yaml"
        if not config.resume:
            # A hidden file is what is left of a write that was killed.
            if run.path.exists() and (
                not run.path.is_dir() or any(not path.name.startswith(".") for path in run.path.iterdir())
            ):
                what = "is not empty" if run.path.is_dir() else "is a file"
                what = "holds another run" if saved.exists() else what
                raise UsageError(f"--out {run.path} {what}; choose another directory, or continue it with --resume")
            return run
        if not saved.exists():
            raise UsageError(f"--resume: {run.path} holds no run (no config.yaml); start one without --resume")
        before = from_yaml(type(config), saved)
        for field in dataclasses.fields(config):
            old, new = getattr(before, field.name), getattr(config, field.name)
            if field.name not in MAY_CHANGE and old != new:
                flag = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"--resume: {run.path} was started with {flag} {old}, not {new}; leave {flag} out")
        return run

    def write_config(self, config: RunConfig) -> None:
        write_file(self.path / "config.yaml", to_yaml(dataclasses.replace(config, resume=False, check=False)).encode())

    # --------------------------------------------------------------------------------------------------------- results

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_file(self.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n")

    def read_results(self) -> dict[str, Any]:
        """What `write_results` wrote last; empty if it never did."""
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_evaluation(self, name: str, scores: Mapping[str, Any]) -> None:
        """Scores of the run's prompts on other facts, which its report shows beside its own."""
        text = json.dumps(scores, indent=1, ensure_ascii=False)
        write_file(self.path / "evaluations" / f"{name}.json", text.encode() + b"\n")

    def read_predictions(self, relation: str) -> list[dict[str, Any]]:
        """The prediction lines of a relation so far."""
        return _json_lines(self.path / "predictions" / f"{relation}.jsonl")

    def write_predictions(self, relation: str, lines: Iterable[Mapping[str, Any]]) -> None:
        self._write_lines(f"predictions/{relation}.jsonl", lines)

    def write_submission(self, method: str, task: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """The answers of a method in the data's own format."""
        self._write_lines(f"submission/{method}/{task}.jsonl", lines)

    def replace_predictions(self, relation: str, method: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the lines of one method about a relation, instead of those that it has."""
        kept = [line for line in self.read_predictions(relation) if line["method"] != method]
        self.write_predictions(relation, [*kept, *({"schema": SCHEMA, "method": method, **line} for line in lines)])

    def replace_template(self, name: str, relation: str, template: str) -> None:
        """Write a template that was found, instead of that which the relation has, as `--discrete` reads them."""
        kept = [line for line in _json_lines(self.path / f"{name}.jsonl") if line["relation"] != relation]
        self._write_lines(f"{name}.jsonl", [*kept, {"relation": relation, "template": template}])

    def _write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_file(self.path / name, text.encode())

    # ------------------------------------------------------------------------------------------------------------- log

    def append_log(self, *lines: Mapping[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def mend_log(self) -> None:
        """Cut off a last line that is not whole: the disk was full, or the process killed."""
        path = self.path / "log.jsonl"
        text = path.read_bytes() if path.exists() else b""
        self.truncate_log(text.rfind(b"\n") + 1)

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return _json_lines(self.path / "log.jsonl")

    def log_size(self) -> int:
        """Bytes in the log."""
        path = self.path / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def forget_training(self, tasks: Collection[str]) -> None:
        """Leave out the log lines of prompts that were learned for tasks, which name no method."""
        self._keep(lambda line: "method" in line or line["relation"] not in tasks)

    def forget(self, method: str, task: str, candidate: str = "") -> None:
        """Leave out the log lines of a method about a task and candidate (none if it has no name): it is done again
        from its start."""
        about = (method, task, candidate)
        self._keep(lambda line: (line.get("method"), line["relation"], line.get("candidate", "")) != about)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = self.read_log()
        kept = [line for line in lines if wanted(line)]
        if len(kept) < len(lines):
            write_file(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log_choices(self, methods: Mapping[str, Mapping[str, Any]]) -> None:
        """Append what methods, as in results.json, tried and chose for each relation."""
        self._keep(lambda line: "tried" not in line)  # of an earlier end that was interrupted
        lines = (
            {"time": time.time(), "method": method, "relation": relation, "chosen": row.get("chosen", tried[0])}
            | {"tried": tried}
            for method, found in methods.items()
            for relation, row in found["relations"].items()
            if (tried := row.get("tried"))
        )
        self.append_log(*lines)

    def truncate_log(self, size: int) -> None:
        """Forget log lines after `size` bytes: they belong to steps that will be taken again."""
        if self.log_size() > size:
            os.truncate(self.path / "log.jsonl", size)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, or none; an answer may hold what `splitlines` takes for the end of a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
