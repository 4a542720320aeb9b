"""Checkpoints of training: a directory for each, with a file for each task, and a manifest with their checksums.

`checkpoint_writer` writes them.
"""

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


def prepare(scratch: Path) -> str | None:
    """A new directory to write a checkpoint into; returns what went wrong."""
    try:
        for old in scratch.parent.glob(".*.partial"):  # of a run that was killed meanwhile
            discard(old)
        scratch.mkdir(parents=True)
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def discard(scratch: Path) -> None:
    """Delete what will not become a checkpoint."""
    shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, target: Path, step: int, files: Mapping[str, str], about: Mapping[str, Any]) -> str | None:
    """Give a checkpoint that is complete its name, and delete old ones; returns what went wrong.

    Args:
        files: the checksum of each task's file.
        about: JSON-ready; `load_checkpoint` gives it back.
    """
    manifest = {"format": FORMAT, "step": step, "files": files, "about": about}
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
    """Complete checkpoints. (Numbers of late waves have more digits than others.)"""
    return sorted(directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def load_checkpoint(directory: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint whose checksums are right, the same on all ranks, which share the work of reading; None if
    there is none at all.

    Raises:
        MegapromptError: all are damaged, or this version cannot read them.
    """
    paths = world.gather(_newest_first(directory))[0]
    for path in paths:
        manifest = world.gather(_manifest(path) if world.is_main else "")[0]
        found = world.gather(manifest if isinstance(manifest, str) else _damage(path, manifest, world))
        if not (damage := next(filter(None, found), None)):
            return Checkpoint(path, manifest["step"], manifest["about"])
        if world.is_main:
            logger.warning("%s; trying an older checkpoint", damage)
    if paths:
        raise MegapromptError(f"no checkpoint in {directory} can be used; delete it to train from the start")
    return None


def _manifest(path: Path) -> dict[str, Any] | str:
    """What stands in the manifest of a checkpoint, or why it cannot be used."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{path} was written by another version of megaprompt"
        return {key: manifest[key] for key in ("step", "files", "about")}
    except (OSError, ValueError, KeyError) as error:
        return f"{path} is damaged ({error})"


def _damage(path: Path, manifest: Mapping[str, Any], world: World) -> str | None:
    """What is wrong with this rank's share of the files, if anything is."""
    for task, digest in list(manifest["files"].items())[world.rank :: world.size]:
        try:
            with (path / f"{task}.pt").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{path}/{task}.pt is damaged (wrong checksum)"
        except OSError as error:
            return f"{path} is damaged ({error})"
    return None


class Parts:
    """What was found of parts of tasks, until the run is complete: files in its directory.

    All ranks make the same calls.
    """

    def __init__(self, run: Path, world: World) -> None:
        self._directory, self._world = run / "state" / "parts", world

    def training(self, name: str) -> Path:
        """A directory for checkpoints of one of several trainings; those of others, which are over, are deleted."""
        directory = self._directory / "training" / name.replace("/", "-")
        if self._world.is_main:
            for other in set(directory.parent.glob("*")) - {directory}:
                shutil.rmtree(other, ignore_errors=True)
        return directory

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


def forget(run: Path, world: World) -> None:
    """Delete what a run would go on from, since it is complete."""
    if world.is_main:
        shutil.rmtree(run / "state", ignore_errors=True)
