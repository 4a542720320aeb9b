"""Training of a run: log, TensorBoard, progress, checkpoints, and going on from one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from megaprompt.console import Update, progress
from megaprompt.distributed.world import World
from megaprompt.engine.learner import Learned, name_of
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.run.checkpoint_writer import CheckpointWriter
from megaprompt.run.checkpoints import Checkpoint, Parts, load_checkpoint
from megaprompt.run.directory import RunDirectory
from megaprompt.run.interruption import stop_signals
from megaprompt.run.progress import ProgressFile

logger = logging.getLogger(__name__)

_STEPS_OF_WAVE = 10_000_000  # more than any has; the numbers of checkpoints grow from wave to wave
_CHECKPOINT_SECONDS = 60.0  # between checkpoints; also twice what one takes, and 20 times what training waits for it
_ENDING_SECONDS = 10.0  # that a job needs to end, beside what the last checkpoint takes


def train_resumably(
    method: str,
    trainer: Trainer,
    run: RunDirectory,
    world: World,
    status: ProgressFile,
    results: dict[str, Any],
    resume: bool,
    wave: int = 1,
) -> dict[str, Learned]:
    """Train until the end, or a signal; goes on from the newest checkpoint if it resumes.

    Args:
        wave: its number, of those that follow one another; only the newest has checkpoints.

    Raises:
        Interrupted: a signal said so on some rank.
    """
    seconds = _restore(trainer, run, world, wave) if resume else 0.0  # before this process started
    if world.is_main:
        status.epochs(run.read_log())
    status.phase(method)
    log = _Log(run, world, trainer, status, wave)
    start = time.monotonic()

    def more() -> dict[str, Any]:
        return {
            "seconds": seconds + time.monotonic() - start,
            "wave": wave,
            "dtype": results["backbone"]["dtype"],
        }

    checkpoints = _Checkpoints(run.path / "state", run, world, trainer, more, (wave - 1) * _STEPS_OF_WAVE)
    shown = progress(method, trainer.progress()[1], world.is_main)
    with log, checkpoints.writer, stop_signals() as should_stop, shown as update:

        def show(done: int, total: int, step: int) -> None:
            update(done, total)
            status.facts(done, total, step)

        learned = trainer.train(checkpoints.hooks(log=log.line, progress=show, should_stop=should_stop))
        checkpoints.save(complete=True)
    results["communication"] = {"steps": log.steps, "sent_bytes_by_rank": world.gather(dict(world.sent))}
    waves = results["timing"].setdefault("seconds_of_waves", {})
    waves[str(wave)] = seconds + time.monotonic() - start
    results["timing"]["training_seconds"] = sum(waves.values())
    return learned


class _Checkpoints:
    """When checkpoints of a training are written. All ranks make the same calls.

    Args:
        more: what stands in the manifest beside that which `_go_on` needs; that of the main rank counts.
        before: numbers of earlier waves, on top of which steps are counted.
    """

    def __init__(
        self,
        directory: Path,
        run: RunDirectory,
        world: World,
        trainer: Trainer,
        more: Callable[[], dict[str, Any]] = dict,
        before: int = 0,
    ) -> None:
        self.writer = CheckpointWriter(directory, world)
        self._run, self._world, self._trainer, self._more, self._before = run, world, trainer, more, before
        self._began = self._waited = 0.0
        self._next = time.monotonic() + _CHECKPOINT_SECONDS

    def hooks(self, **others: Any) -> Hooks:
        """With which a trainer calls for checkpoints."""
        return Hooks(
            should_save=self.is_due,
            save=self.save,
            is_writing=lambda: self.writer.is_writing,
            written=self.written,
            **others,
        )

    def is_due(self) -> bool:
        """Whether it is time for one, on this rank."""
        idle = self._world.is_main and self._trainer.can_be_saved and not self.writer.is_begun
        return idle and time.monotonic() > self._next

    def save(self, complete: bool) -> None:
        """Begin a checkpoint, or write the last one if time suffices: a job may have to end."""
        self.written()
        if not self._trainer.can_be_saved:
            if self._world.is_main:
                logger.warning("the weights are sharded, or have no room for a copy: --resume begins this task anew")
            return
        self._began = time.monotonic()
        states = self._trainer.states()
        if complete and self._is_too_late(states):
            return
        about = {"log_size": self._run.log_size(), "training": self._trainer.shared_state(), **self._more()}
        number = self._before + self._trainer.step
        self.writer.save(number, states, self._world.gather(about)[0], complete=complete)
        self._waited = time.monotonic() - self._began

    def _is_too_late(self, states: Mapping[str, Any]) -> bool:
        """Whether the job would end before all of a checkpoint is written; the one before has its name already."""
        end, now = os.environ.get("SLURM_JOB_END_TIME", ""), time.time()
        known = end.isdecimal() and int(end) > now  # a job that still runs has not ended
        left = int(end) - now - _ENDING_SECONDS if known else float("inf")
        seconds, left = self.writer.seconds_for(states), min(self._world.gather(left))
        if late := seconds > left:
            logger.warning(
                "a checkpoint would take %.0f s, and the job has %.0f s left: what was done since the last one will be "
                "done again; give more time with --signal in the script",
                seconds,
                max(0.0, left),
            )
        return late

    def written(self) -> None:
        """Give the checkpoint that was begun its name, if there is one."""
        if self.writer.is_begun:
            self.writer.finish()
            now = time.monotonic()
            self._next = now + max(_CHECKPOINT_SECONDS, 2 * (now - self._began), 20 * self._waited)


def _restore(trainer: Trainer, run: RunDirectory, world: World, wave: int) -> float:
    """Go on from the newest checkpoint of a wave, with its log, if there is one; returns the seconds until then."""
    checkpoint = load_checkpoint(run.path / "state", world)
    if checkpoint is None or checkpoint.about["wave"] != wave:  # that of the wave before, which has ended
        if world.is_main:
            run.forget_training(trainer.tasks)
        return 0.0
    _go_on(trainer, checkpoint, run, world)
    return checkpoint.about["seconds"]


def _go_on(trainer: Trainer, checkpoint: Checkpoint, run: RunDirectory, world: World) -> None:
    """Take a checkpoint, and forget lines of the log that came after it."""
    trainer.restore(checkpoint.about["training"], checkpoint.read)
    if world.is_main:
        run.truncate_log(checkpoint.about["log_size"])


@contextmanager
def one_after_the_other(
    about: tuple[str, str, str],
    shown: AbstractContextManager[Update],
    should_stop: Callable[[], bool],
    run: RunDirectory,
    world: World,
    status: ProgressFile,
    trainer: Trainer | None = None,
) -> Iterator[Hooks]:
    """Log and progress of a method that trains one task, or candidate, after the other.

    Args:
        about: the method, the task, and the candidate's name if there are several.
        trainer: what goes on from its newest checkpoint, and is saved now and then; each starts anew without.
    """
    checkpoint = None
    if trainer is not None:
        directory = Parts(run.path, world).training(".".join(filter(None, about)))
        checkpoint = load_checkpoint(directory, world)
    if trainer is not None and checkpoint is not None:
        _go_on(trainer, checkpoint, run, world)
    elif world.is_main:
        run.forget(*about)
    with shown as update:

        def log(line: dict[str, Any]) -> None:
            if world.is_main:
                run.append_log({"method": about[0], **line})

        def show(done: int, total: int, step: int) -> None:
            update(done, total)
            status.facts(done, total, step)

        if trainer is None:
            yield Hooks(log=log, progress=show, should_stop=should_stop)
            return

        checkpoints = _Checkpoints(directory, run, world, trainer)
        with checkpoints.writer:
            yield checkpoints.hooks(log=log, progress=show, should_stop=should_stop)
            if world.max_(torch.tensor(int(checkpoints.is_due())), "schedule"):  # answers on test are still to come
                checkpoints.save(complete=True)


class _Log:
    """Lines of log.jsonl, and the same for TensorBoard; only the main rank writes."""

    def __init__(self, run: RunDirectory, world: World, trainer: Trainer, status: ProgressFile, wave: int) -> None:
        self.run, self.world, self.trainer, self.status = run, world, trainer, status
        self._first_step = trainer.step
        path = run.path / "tensorboard" / (f"wave-{wave}" if wave > 1 else "")
        self._board = _tensorboard(path, trainer.step) if world.is_main else None
        world.sent.clear()

    @property
    def steps(self) -> int:
        """Since this process started."""
        return self.trainer.step - self._first_step

    def line(self, line: dict[str, Any]) -> None:
        """Take one line."""
        self.status.epochs([line])
        if self.world.size > 1:
            steps = max(1, self.steps)
            line["sent_bytes_per_step"] = {what: round(count / steps) for what, count in self.world.sent.items()}
        if self._board is None:
            return
        self.run.append_log(line)
        for name, value in line.items():
            if name == "train_loss" or name.startswith("dev_"):
                self._board.add_scalar(f"{name}/{name_of(line)}", value, line["step"])

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(path: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step)  # events after `step` belong to steps that are taken again
