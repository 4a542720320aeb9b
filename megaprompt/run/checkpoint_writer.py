"""Checkpoints are written while training goes on: states are copied between two steps, and written from a thread."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megaprompt.distributed.world import World
from megaprompt.errors import MegapromptError
from megaprompt.files import sync_directory
from megaprompt.run.checkpoints import discard, prepare, publish

State = Mapping[str, Any]
_PIECE = 1 << 24  # bytes


class CheckpointWriter:
    """Writes checkpoints of a training, one after the other. All ranks make the same calls, each with the states of
    other tasks (or none), and write side by side.

    Copies wait in memory, for no more than a quarter of what is free; a state for which there is no room is written
    where it is, while training waits. Written aside, a checkpoint gets its name when all of it is on the disk; only
    then older ones than the two newest go.
    """

    def __init__(self, directory: Path, world: World) -> None:
        self._directory, self._world = directory, world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._abandoned = threading.Event()
        self._begun: _Begun | None = None
        self._speed: float | None = None  # bytes per second of what was written last

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """What is not complete now never will be."""
        self._abandoned.set()
        self._thread.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------- all ranks

    def save(self, step: int, states: Mapping[str, State], about: Mapping[str, Any], *, complete: bool = False) -> None:
        """Begin a checkpoint; the one that was begun before is completed first.

        Args:
            about: JSON-ready, the same on all ranks; `load_checkpoint` gives it back.
            complete: write it where it is, without copies, and return when it is on the disk.

        Raises:
            MegapromptError: on all ranks, if one cannot write. The older checkpoints are still there.
        """
        self.finish()
        begun = _Begun(self._directory / f"step-{step:08}", step, json.dumps(about))
        failure = self._world.gather(prepare(begun.scratch) if self._world.is_main else None)[0]
        if failure:
            raise _cannot_be_written(failure)
        room = 0 if complete else self._world.free_host_memory() // 4
        for task, state in states.items():
            path, size = begun.scratch / f"{task}.pt", _bytes(state)
            while begun.held() + size > room and begun.waiting:
                begun.waiting.popleft()[0].result()
            if size > room:
                begun.files.append(_now(lambda path=path, state=state: self._write(path, state)))
            else:
                future = self._thread.submit(self._write, path, _copied(state))
                begun.files.append(future)
                begun.waiting.append((future, size))
        self._begun = begun
        if complete:
            self.finish()

    @property
    def is_begun(self) -> bool:
        """Whether a checkpoint is begun, and has no name yet."""
        return self._begun is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._begun is not None and not all(file.done() for file in self._begun.files)

    def finish(self) -> None:
        """Wait for the checkpoint that is begun, if there is one, and give it its name.

        Raises:
            MegapromptError: on all ranks, if one could not write. The older checkpoints are still there.
        """
        if (begun := self._begun) is None:
            return
        written = [file.result() for file in begun.files]
        self._begun = None
        if seconds := sum(file.seconds for file in written):
            self._speed = sum(file.size for file in written) / seconds
        reports = self._world.gather(written)
        failures = [file.failure for part in reports for file in part if file.failure]
        if self._world.is_main and not failures:
            digests = {file.task: file.digest for part in reports for file in part}
            failures = [publish(begun.scratch, begun.target, begun.step, digests, json.loads(begun.about))]
        failure = self._world.gather(failures[0] if failures else None)[0]
        if failure:
            if self._world.is_main:
                discard(begun.scratch)
            raise _cannot_be_written(failure)

    def seconds_for(self, states: Mapping[str, State]) -> float:
        """How long the slowest rank would write these, as fast as it wrote before; 0 if none has. All must call it."""
        own = sum(map(_bytes, states.values())) / self._speed if self._speed else 0.0
        return max(self._world.gather(own))

    # ------------------------------------------------------------------------------------------------------- this rank

    def _write(self, path: Path, state: State) -> _Written:
        """Write a file, without a copy of what is in the host's memory, and its checksum on the way."""
        start = time.monotonic()
        try:
            with path.open("wb") as raw:
                file = _Checked(raw, self._abandoned)
                try:
                    torch.save(dict(state), cast(BinaryIO, file))
                except RuntimeError as error:  # what torch makes of a write that failed
                    raise file.failure or error from error
                raw.flush()
                os.fsync(raw.fileno())
            sync_directory(path.parent)
        except (OSError, RuntimeError) as error:
            why = f"cannot write {path} ({getattr(error, 'strerror', None) or error}); free space or change --out"
            return _Written(path.stem, failure=why)
        return _Written(path.stem, file.digest.hexdigest(), file.size, time.monotonic() - start)


@dataclass(frozen=True)
class _Written:
    task: str
    digest: str = ""
    size: int = 0
    seconds: float = 0.0
    failure: str | None = None


class _Begun:
    """A checkpoint that has no name yet."""

    def __init__(self, target: Path, step: int, about: str) -> None:
        self.target, self.step, self.about = target, step, about  # as it is now: what it tells of changes
        self.scratch = target.with_name(f".{target.name}.partial")
        self.files: list[Future[_Written]] = []
        self.waiting: deque[tuple[Future[_Written], int]] = deque()  # copies that may still be in memory, with bytes

    def held(self) -> int:
        """Bytes of the copies in memory."""
        while self.waiting and self.waiting[0][0].done():
            self.waiting.popleft()
        return sum(size for _, size in self.waiting)


class _Checked:
    """A file that knows the checksum of what was written to it, and can be given up."""

    def __init__(self, file: BinaryIO, abandoned: threading.Event) -> None:
        self._file, self._abandoned = file, abandoned
        self.digest, self.size = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self.digest.update(piece)
            try:
                if self._abandoned.is_set():
                    raise InterruptedError("given up")
                self._file.write(piece)
            except OSError as error:
                self.failure = error
                raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def _bytes(state: State) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor))


def _copied(state: State) -> State:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(state))


def _now(write: Any) -> Future[_Written]:
    """What has been written in this thread."""
    future: Future[_Written] = Future()
    future.set_result(write())
    return future


def _cannot_be_written(failure: str) -> MegapromptError:
    return MegapromptError(f"cannot write a checkpoint ({failure}); the older ones are kept")
