"""Checkpoints of training: a directory for each, with a file for each task, and a manifest with their checksums."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaprompt.distributed.world import World
from megaprompt.errors import MegapromptError
from megaprompt.files import sync_directory, write_file

logger = logging.getLogger(__name__)

FORMAT = 5
_KEPT = 2  # checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    about: dict[str, Any]

    def read(self, task: str) -> dict[str, Any]:
        """The state of one task."""
        return torch.load(self.path / f"{task}.pt", weights_only=True, map_location="cpu")


def save_checkpoint(
    directory: Path, world: World, step: int, states: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write a checkpoint; all ranks call it together, each with the states of other tasks (or none).

    It is written aside and renamed when everything is on the disk; only then older ones than the two newest go.

    Args:
        about: JSON-ready, the same on all ranks; `load_checkpoint` gives it back.

    Raises:
        MegapromptError: on all ranks, if one cannot write. The older checkpoints are still there.
    """
    target = directory / f"step-{step:08}"
    scratch = target.with_name(f".{target.name}.partial")
    failure = _make(scratch) if world.is_main else None
    world.barrier()
    digests, other = _write_states(scratch, states)
    reports = world.gather((digests, failure or other))
    if world.is_main and not any(why for _, why in reports):
        files = {task: digest for part, _ in reports for task, digest in part.items()}
        manifest = {"format": FORMAT, "step": step, "files": files, "about": dict(about)}
        failure = _publish(scratch, target, manifest)
    failures = [why for why in world.gather(failure or other) if why]
    if failures:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
        raise MegapromptError(f"cannot write a checkpoint ({failures[0]}); the older ones are kept")


def _make(scratch: Path) -> str | None:
    """A new directory; returns what went wrong."""
    try:
        for old in scratch.parent.glob(".*.partial"):  # of a run that was killed meanwhile
            shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir(parents=True)
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def _write_states(scratch: Path, states: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], str | None]:
    """The checksums of the files, and what went wrong."""
    digests: dict[str, str] = {}
    try:
        for task, state in states.items():
            buffer = io.BytesIO()
            torch.save(dict(state), buffer)
            write_file(scratch / f"{task}.pt", buffer.getvalue())
            digests[task] = hashlib.sha256(buffer.getvalue()).hexdigest()
    except MegapromptError as error:
        return digests, str(error)
    return digests, None


def _publish(scratch: Path, target: Path, manifest: Mapping[str, Any]) -> str | None:
    """Give a complete checkpoint its name, and delete old ones; returns what went wrong."""
    try:
        write_file(scratch / "manifest.json", json.dumps(manifest, indent=1).encode())
        if target.exists():  # the same step again, after a resume
            shutil.rmtree(target)
        os.rename(scratch, target)
        sync_directory(target.parent)
        for old in _newest_first(target.parent)[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, MegapromptError) as error:
        return str(error)
    return None


def _newest_first(directory: Path) -> list[Path]:
    """Complete checkpoints."""
    return sorted(directory.glob("step-*"), reverse=True)


def load_checkpoint(directory: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint whose checksums are right, the same on all ranks; None if there is none at all.

    Raises:
        MegapromptError: all are damaged, or this version cannot read them.
    """
    found: tuple[Path, dict[str, Any]] | str | None = None
    for path in _newest_first(directory) if world.is_main else ():
        try:
            found = (path, _verified_manifest(path))
            break
        except MegapromptError as error:
            logger.warning("%s; trying an older checkpoint", error)
            found = f"no checkpoint in {directory} can be used; delete it to train from the start"
    found = world.gather(found)[0]
    if isinstance(found, str):
        raise MegapromptError(found)
    return None if found is None else Checkpoint(found[0], found[1]["step"], found[1]["about"])


def _verified_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise MegapromptError(f"{path} was written by another version of megaprompt")
        for task, digest in manifest["files"].items():
            with (path / f"{task}.pt").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise MegapromptError(f"{path}/{task}.pt is damaged (wrong checksum)")
    except (OSError, ValueError, KeyError) as error:
        raise MegapromptError(f"{path} is damaged ({error})") from error
    return manifest


class Parts:
    """What was found of parts of tasks, until the run is complete: files in its directory.

    All ranks make the same calls.
    """

    def __init__(self, run: Path, world: World) -> None:
        self._directory, self._world = run / "state" / "parts", world

    def once(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found the first time, tensors and JSON-ready values.

        Raises:
            MegapromptError: it cannot be written.
        """
        path = self._directory / f"{name}.pt"
        if self._world.gather(path.exists())[0]:
            return torch.load(path, weights_only=True, map_location="cpu")
        found = find()
        if self._world.is_main:
            buffer = io.BytesIO()
            torch.save(found, buffer)
            write_file(path, buffer.getvalue())
        return found

    def forget(self) -> None:
        """Delete them."""
        if self._world.is_main:
            shutil.rmtree(self._directory, ignore_errors=True)
