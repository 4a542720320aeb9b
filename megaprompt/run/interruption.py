"""Safe interruption: a signal asks a run to stop, and it stops where it can go on from."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megaprompt.distributed.world import World
from megaprompt.engine.trainer import Interrupted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


_outer: Callable[[], bool] | None = None  # of the block around all others, whose answer they share


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether to stop.

    SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (a job's time is nearly over) once: stop after the current step, with a
    checkpoint. A second time: at once. Blocks within others tell the same: what was asked for is not forgotten between
    them.
    """
    global _outer
    if _outer is not None:
        yield _outer
        return
    asked = False

    def handler(number: int, _: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logger.warning("stopping after this step (%s); once more to stop at once", signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, handler) for number in _SIGNALS}
    except ValueError:  # not in the main thread, as in a notebook's worker: signals are the caller's business
        before = {}
    try:
        _outer = lambda: asked  # noqa: E731
        yield _outer
    finally:
        _outer = None
        for number, old in before.items():
            signal.signal(number, old)


def stop_if_asked(world: World, should_stop: Callable[[], bool], where: str) -> None:
    """Stop on all ranks if a signal said so on some; all must call it.

    Raises:
        Interrupted: it did.
    """
    if world.max_(torch.tensor(int(should_stop())), "schedule"):
        raise Interrupted(f"interrupted {where}; continue with --resume")
