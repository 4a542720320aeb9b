"""The files of a run. Every file is complete or absent: it is written aside, flushed to disk, and renamed.

config.yaml                 the whole configuration, enough to repeat the run
progress.json               how far it is, for other programs to read (see `progress`)
results.json                scores of every method so far; "complete" says whether that is all
prompts/P36.safetensors     learned prompt vectors [pseudo tokens, hidden size], with what they belong to
predictions/P36.jsonl       subject, object, rank and best answers per fact and method
state/checkpoint.pt         training as of its last checkpoint
log.jsonl, tensorboard/     one line per relation and epoch
report.html, *.png          see `report`
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from megaprompt.config import ProbeConfig, from_yaml, to_yaml
from megaprompt.errors import MegapromptError, UsageError

_MAY_CHANGE = {"out", "resume", "check", "deepspeed", "row_tokens", "pass_tokens"}
"""Options that do not change results (beyond rounding), so a resumed run may have others."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens meanwhile.

    Raises:
        MegapromptError: the disk is full or the directory cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise MegapromptError(f"cannot write {path} ({error.strerror or error}); free space or change --out") from error


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
        path = self.path / "predictions" / f"{relation}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def write_predictions(self, relation: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_file(self.path / "predictions" / f"{relation}.jsonl", text.encode())

    # ------------------------------------------------------------------------------------------------------------- log

    def append_log(self, line: Mapping[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def log_size(self) -> int:
        """Bytes in the log."""
        path = self.path / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def truncate_log(self, size: int) -> None:
        """Forget log lines after `size` bytes: they belong to steps that will be taken again."""
        if self.log_size() > size:
            os.truncate(self.path / "log.jsonl", size)

    # ------------------------------------------------------------------------------------------------------ checkpoint

    @property
    def checkpoint(self) -> Path:
        return self.path / "state" / "checkpoint.pt"

    def save_checkpoint(self, state: Mapping[str, Any]) -> float:
        """Write the checkpoint; returns the seconds that it took."""
        start = time.monotonic()
        scratch = self.checkpoint.with_name(".checkpoint.pt.partial")
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            scratch.unlink(missing_ok=True)
            raise MegapromptError(f"cannot write {self.checkpoint} ({error}); the older checkpoint is kept") from error
        return time.monotonic() - start

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if there is none.

        Raises:
            MegapromptError: it is damaged.
        """
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise MegapromptError(
                f"{self.checkpoint} is damaged ({str(error).splitlines()[0]}); delete it to train again from the start"
            ) from error


# ------------------------------------------------------------------------------------------------------- saved prompts


@dataclass(frozen=True)
class SavedPrompt:
    """A learned prompt as it stands in a file; the encoder that made it is not needed (paper, section 3.2)."""

    relation: str
    template: str
    backbone: str
    fingerprint: str  # of the backbone's weights
    data: str  # that it was learned with
    vectors: Tensor  # [pseudo tokens, hidden size] float32
    label: str = ""
    dev_p_at_1: float = float("nan")
    path: Path = Path()

    _TEXT = ("relation", "template", "backbone", "fingerprint", "data", "label")

    def save(self, path: Path) -> None:
        """Write the file, and read it back: a prompt that is empty or not finite is not worth having.

        Raises:
            MegapromptError: it cannot be written.
        """
        metadata = {name: getattr(self, name) for name in self._TEXT}
        metadata |= {"format": "megaprompt prompt 1", "dev_p_at_1": repr(self.dev_p_at_1)}
        write_file(path, save_safetensors({"prompts": self.vectors.float().contiguous().cpu()}, metadata))
        SavedPrompt.load(path)

    @classmethod
    def load(cls, path: Path) -> SavedPrompt:
        """Read a prompt.

        Raises:
            MegapromptError: the file is no prompt, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, vectors = file.metadata() or {}, file.get_tensor("prompts")
        except (OSError, SafetensorError) as error:
            raise MegapromptError(f"{path}: cannot be read as a prompt ({error})") from error
        if metadata.get("format") != "megaprompt prompt 1":
            raise MegapromptError(f"{path}: is not a prompt of megaprompt; give a directory that probe wrote")
        if not vectors.numel() or not vectors.isfinite().all():
            raise MegapromptError(f"{path}: the prompt is empty or not finite; learn it again")
        text = {name: metadata[name] for name in cls._TEXT}
        return cls(vectors=vectors, dev_p_at_1=float(metadata["dev_p_at_1"]), path=path, **text)


def load_prompts(directory: Path) -> dict[str, SavedPrompt]:
    """The prompts of a run, or of a directory of prompt files, by relation.

    Raises:
        UsageError: there are none.
    """
    below = directory / "prompts"
    paths = sorted((below if below.is_dir() else directory).glob("*.safetensors"))
    if not paths:
        raise UsageError(f"--prompts {directory}: no *.safetensors there; give a run that has learned prompts")
    return {prompt.relation: prompt for prompt in map(SavedPrompt.load, paths)}
