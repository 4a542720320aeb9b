"""Safe interruption: a signal asks a run to stop, and it stops where it can go on from."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether to stop.

    SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (a job's time is nearly over) once: stop after the current step, with a
    checkpoint. A second time: at once.
    """
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
        yield lambda: asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)
