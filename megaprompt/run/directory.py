"""The files of a run. Every file is complete or absent: it is written aside, flushed to disk, and renamed.

config.yaml                 the whole configuration, enough to repeat the run
progress.json               how far it is, for other programs to read (see `progress`)
results.json                scores of every method so far; "complete" says whether that is all
prompts/P36.safetensors     learned prompt vectors [pseudo tokens, hidden size], with what they belong to
predictions/P36.jsonl       subject, object, rank and best answers per fact and method
state/step-00000150/        a checkpoint of training: one file per relation, and a manifest with their checksums
autoprompt.jsonl            prompts that AutoPrompt found, for `--discrete`
log.jsonl, tensorboard/     one line per relation and epoch
report.html, *.png          see `report`
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaprompt.config import ProbeConfig, from_yaml, to_yaml
from megaprompt.distributed.launch import World
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import sync_directory, write_file

logger = logging.getLogger(__name__)

_MAY_CHANGE = {"out", "resume", "check", "deepspeed", "relation_groups", "row_tokens", "pass_tokens"}
"""Options that do not change results (beyond rounding), so a resumed run may have others."""


class RunDirectory:
    """The directory of one run. Only the main rank writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: ProbeConfig) -> RunDirectory:
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
                what = "holds another run" if saved.exists() else "is not empty"
                raise UsageError(f"--out {run.path} {what}; choose another directory, or continue it with --resume")
            return run
        if not saved.exists():
            raise UsageError(f"--resume: {run.path} holds no run (no config.yaml); start one without --resume")
        before = from_yaml(ProbeConfig, saved)
        for field in dataclasses.fields(config):
            old, new = getattr(before, field.name), getattr(config, field.name)
            if field.name not in _MAY_CHANGE and old != new:
                flag = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"--resume: {run.path} was started with {flag} {old}, not {new}; leave {flag} out")
        return run

    def write_config(self, config: ProbeConfig) -> None:
        write_file(self.path / "config.yaml", to_yaml(dataclasses.replace(config, resume=False, check=False)).encode())

    # --------------------------------------------------------------------------------------------------------- results

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_file(self.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n")

    def read_results(self) -> dict[str, Any]:
        """What `write_results` wrote last; empty if it never did."""
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def read_predictions(self, relation: str) -> list[dict[str, Any]]:
        """The prediction lines of a relation so far."""
        return _json_lines(self.path / "predictions" / f"{relation}.jsonl")

    def write_predictions(self, relation: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_file(self.path / "predictions" / f"{relation}.jsonl", text.encode())

    def write_discrete(self, templates: Mapping[str, str]) -> None:
        """The prompts that were found, by relation, as `--discrete` reads them."""
        rows = ({"relation": relation, "template": template} for relation, template in templates.items())
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(self.path / "autoprompt.jsonl", text.encode())

    # ------------------------------------------------------------------------------------------------------------- log

    def append_log(self, line: Mapping[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return _json_lines(self.path / "log.jsonl")

    def log_size(self) -> int:
        """Bytes in the log."""
        path = self.path / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def truncate_log(self, size: int) -> None:
        """Forget log lines after `size` bytes: they belong to steps that will be taken again."""
        if self.log_size() > size:
            os.truncate(self.path / "log.jsonl", size)

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def save_checkpoint(
        self, world: World, step: int, states: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint; all ranks call it together, each with the states of other relations (or none).

        It is written aside and renamed when everything is on the disk; only then older ones than the two newest go.

        Args:
            about: JSON-ready, the same on all ranks; `load_checkpoint` gives it back.

        Raises:
            MegapromptError: on all ranks, if one cannot write. The older checkpoints are still there.
        """
        target = self.path / "state" / f"step-{step:08}"
        scratch = target.with_name(f".{target.name}.partial")
        failure: str | None = None
        digests: dict[str, str] = {}
        try:
            if world.is_main:
                for old in scratch.parent.glob(".*.partial"):  # of a run that was killed meanwhile
                    shutil.rmtree(old, ignore_errors=True)
                scratch.mkdir(parents=True)
        except OSError as error:
            failure = f"{error.strerror or error}"
        world.barrier()
        try:
            for relation, state in states.items():
                buffer = io.BytesIO()
                torch.save(dict(state), buffer)
                write_file(scratch / f"{relation}.pt", buffer.getvalue())
                digests[relation] = hashlib.sha256(buffer.getvalue()).hexdigest()
        except MegapromptError as error:
            failure = failure or str(error)
        reports = world.gather((digests, failure))
        if world.is_main and not any(why for _, why in reports):
            files = {relation: digest for part, _ in reports for relation, digest in part.items()}
            manifest = {"format": CHECKPOINT_FORMAT, "step": step, "files": files, "about": dict(about)}
            try:
                write_file(scratch / "manifest.json", json.dumps(manifest, indent=1).encode())
                if target.exists():  # the same step again, after a resume
                    shutil.rmtree(target)
                os.rename(scratch, target)
                sync_directory(target.parent)
                for old in self._checkpoints()[_KEPT:]:
                    shutil.rmtree(old, ignore_errors=True)
            except (OSError, MegapromptError) as error:
                failure = str(error)
        failures = [why for why in world.gather(failure) if why]
        if failures:
            if world.is_main:
                shutil.rmtree(scratch, ignore_errors=True)
            raise MegapromptError(f"cannot write a checkpoint ({failures[0]}); the older ones are kept")

    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return sorted((self.path / "state").glob("step-*"), reverse=True)

    def load_checkpoint(self, world: World) -> Checkpoint | None:
        """The newest checkpoint whose checksums are right, the same on all ranks; None if there is none at all.

        Raises:
            MegapromptError: all are damaged, or this version cannot read them.
        """
        found: tuple[Path, dict[str, Any]] | str | None = None
        if world.is_main:
            paths = self._checkpoints()
            for path in paths:
                try:
                    found = (path, _verified_manifest(path))
                    break
                except MegapromptError as error:
                    logger.warning("%s; trying an older checkpoint", error)
                    found = f"no checkpoint in {self.path / 'state'} can be used; delete it to train from the start"
        found = world.gather(found)[0]
        if isinstance(found, str):
            raise MegapromptError(found)
        return None if found is None else Checkpoint(found[0], found[1]["step"], found[1]["about"])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, or none; an answer may hold what `splitlines` takes for the end of a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


CHECKPOINT_FORMAT = 2
_KEPT = 2  # checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    about: dict[str, Any]

    def read(self, relation: str) -> dict[str, Any]:
        """The state of one relation."""
        return torch.load(self.path / f"{relation}.pt", weights_only=True, map_location="cpu")


def _verified_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != CHECKPOINT_FORMAT:
            raise MegapromptError(f"{path} was written by another version of megaprompt")
        for relation, digest in manifest["files"].items():
            with (path / f"{relation}.pt").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise MegapromptError(f"{path}/{relation}.pt is damaged (wrong checksum)")
    except (OSError, ValueError, KeyError) as error:
        raise MegapromptError(f"{path} is damaged ({error})") from error
    return manifest


# ------------------------------------------------------------------------------------------------------- saved prompts
