"""Training of a run: log, TensorBoard, progress, checkpoints, and going on from one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megaprompt.console import Update, progress
from megaprompt.distributed.world import World
from megaprompt.engine.learner import Learned, name_of
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.run.checkpoints import load_checkpoint, save_checkpoint
from megaprompt.run.directory import RunDirectory
from megaprompt.run.interruption import stop_signals
from megaprompt.run.progress import ProgressFile

_STEPS_OF_WAVE = 10_000_000  # more than any has; the numbers of checkpoints grow from wave to wave
_CHECKPOINT_SECONDS = 60.0  # between checkpoints, and at least 20 times as long as writing one takes


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
    log = _Log(run, world, trainer, status)
    start = saved = time.monotonic()
    pause = _CHECKPOINT_SECONDS

    def save() -> None:
        nonlocal saved, pause
        before = time.monotonic()
        about: dict[str, Any] = {"seconds": seconds + before - start, "log_size": run.log_size(), "wave": wave}
        about |= {"training": trainer.shared_state(), "dtype": results["backbone"]["dtype"]}
        number = (wave - 1) * _STEPS_OF_WAVE + trainer.step
        save_checkpoint(run.path / "state", world, number, trainer.states(), world.gather(about)[0])
        saved = time.monotonic()
        pause = max(_CHECKPOINT_SECONDS, 20 * (saved - before))

    with log, stop_signals() as should_stop, progress(method, trainer.progress()[1], world.is_main) as update:

        def show(done: int, total: int, step: int) -> None:
            update(done, total)
            status.facts(done, total, step)

        hooks = Hooks(
            log=log.line,
            progress=show,
            should_save=lambda: world.is_main and time.monotonic() - saved > pause,
            should_stop=should_stop,
            save=save,
        )
        learned = trainer.train(hooks)
        save()
    results["communication"] = {"steps": log.steps, "sent_bytes_by_rank": world.gather(dict(world.sent))}
    waves = results["timing"].setdefault("seconds_of_waves", {})
    waves[str(wave)] = seconds + time.monotonic() - start
    results["timing"]["training_seconds"] = sum(waves.values())
    return learned


def _restore(trainer: Trainer, run: RunDirectory, world: World, wave: int) -> float:
    """Go on from the newest checkpoint of a wave, with its log, if there is one; returns the seconds until then."""
    checkpoint = load_checkpoint(run.path / "state", world)
    if checkpoint is None or checkpoint.about["wave"] != wave:  # that of the wave before, which has ended
        if world.is_main:
            run.forget_training(trainer.tasks)
        return 0.0
    trainer.restore(checkpoint.about["training"], checkpoint.read)
    if world.is_main:
        run.truncate_log(checkpoint.about["log_size"])
    return checkpoint.about["seconds"]


@contextmanager
def one_after_the_other(
    about: tuple[str, str, str],
    shown: AbstractContextManager[Update],
    should_stop: Callable[[], bool],
    run: RunDirectory,
    world: World,
    status: ProgressFile,
) -> Iterator[Hooks]:
    """Log and progress of a method that trains one task, or candidate, after the other, each from its start.

    Args:
        about: the method, the task, and the candidate's name if there are several.
    """
    if world.is_main:
        run.forget(*about)
    with shown as update:

        def log(line: dict[str, Any]) -> None:
            if world.is_main:
                run.append_log({"method": about[0], **line})

        def show(done: int, total: int, step: int) -> None:
            update(done, total)
            status.facts(done, total, step)

        yield Hooks(log=log, progress=show, should_stop=should_stop)


class _Log:
    """Lines of log.jsonl, and the same for TensorBoard; only the main rank writes."""

    def __init__(self, run: RunDirectory, world: World, trainer: Trainer, status: ProgressFile) -> None:
        self.run, self.world, self.trainer, self.status = run, world, trainer, status
        self._first_step = trainer.step
        self._board = _tensorboard(run.path / "tensorboard", trainer.step) if world.is_main else None
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
