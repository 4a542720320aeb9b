"""Progress of long work, a bar with rate and time left on a terminal, a line now and then in a log file; and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG_EVERY = 30.0  # seconds


class Update(Protocol):
    """Tells how much is done, of how much in all (None: as before), and what else is to be said."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}/s" if task.speed else "")


@contextmanager
def progress(description: str, total: int, enabled: bool = True, unit: str = "facts") -> Iterator[Update]:
    """Show the progress of `total` units while the block runs; only ranks that talk to the user enable it."""
    if not enabled:
        yield lambda done, total=None, note="": None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)

            def redraw(done: int, total: int | None = None, note: str = "") -> None:
                more = f" ({note})" if note else ""
                bar.update(task, completed=done, total=total, description=description + more)

            yield redraw
    else:
        start = last = time.monotonic()
        first: int | None = None
        latest = total

        def update(done: int, total: int | None = None, note: str = "") -> None:
            nonlocal last, first, latest
            first, latest = done if first is None else first, latest if total is None else total
            now = time.monotonic()
            if now - last >= _LOG_EVERY:
                last = now
                rate = (done - first) / (now - start)
                said = [f"{done}/{latest} {unit}"]
                if rate:
                    said.append(f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
                    said.append(f"{(latest - done) / rate:.0f} s left")
                if note:
                    said.append(note)
                print(f"{description}: {', '.join(said)}", file=sys.stderr, flush=True)

        yield update
        print(f"{description}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def show(table: object) -> None:
    """Print a table; into a file or pipe as wide as most terminals."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    console.print(table)
