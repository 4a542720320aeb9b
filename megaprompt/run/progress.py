"""Progress of long work: a bar with rate and time left on a terminal, a line now and then in a log file.

And `progress.json` in the directory of a run, which other programs can read while it goes on:

{"state": "running", "phase": "p-tuning", "step": 120, "facts_done": 960, "facts_total": 4800,
 "passes": null, "score": ["p_at_1", "P@1"], "items": "facts",
 "relations": {"P36": {"epoch": 12, "best_dev_p_at_1": 0.38}},
 "seconds": 41.2, "eta_seconds": 164.8, "updated": 1790000000.0}

`state` is running, interrupted, failed or complete. A run that was killed stays "running", but is not updated any more.
`seconds` and `eta_seconds` (null while unknown) are about the phase, since this start. While questions are asked,
`passes` tells how many passes of the backbone there have been, and how many this part takes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file

logger = logging.getLogger(__name__)

_FILE_EVERY = 2.0


class ProgressFile:
    """Keeps progress.json of a run up to date; one that is not `enabled` (not the main rank) does nothing."""

    def __init__(self, run: Path, enabled: bool = True) -> None:
        self._path = run / "progress.json" if enabled else None
        self._state: dict[str, Any] = {"state": "running", "phase": "loading", "step": 0}
        self._state |= {"facts_done": 0, "facts_total": None, "passes": None}
        self._state |= {"score": ["p_at_1", "P@1"], "items": "facts", "relations": {}}
        self._start = time.monotonic()
        self._written: float | None = None  # a run that could not start leaves no file
        self._first: int | None = None

    def phase(self, name: str) -> None:
        """Another part of the work begins."""
        self._start, self._first = time.monotonic(), None
        self._write(phase=name, passes=None)

    def score(self, name: str, heading: str, items: str) -> None:
        """Which metric the lines of the log are about, and what is counted."""
        self._state |= {"score": [name, heading], "items": items}

    def epochs(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of the log: a relation has finished an epoch."""
        key = f"best_dev_{self._state['score'][0]}"
        for line in lines:
            about = self._state["relations"].setdefault(line["relation"], {"epoch": 0, key: 0.0})
            if "diverged" in line:
                about["diverged"] = line["diverged"]
            if "epoch" in line:
                about["epoch"] = line["epoch"]
                about[key] = max(about[key], line[key.removeprefix("best_")])

    def facts(self, done: int, total: int, step: int) -> None:
        """Training goes on."""
        begins = self._first is None
        self._first = done if self._first is None else self._first
        self._state |= {"facts_done": done, "facts_total": total, "step": step}
        self._write_now_and_then(begins)

    def passes(self, done: int, total: int) -> None:
        """Questions are asked."""
        self._state |= {"passes": [done, total]}
        self._write_now_and_then()

    def _write_now_and_then(self, begins: bool = False) -> None:
        if begins or self._written is None or time.monotonic() - self._written >= _FILE_EVERY:
            self._write()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Write down how the block ends."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 1) == 130
            if self._written is not None:
                self._write(state="interrupted" if interrupted else "failed")
            raise
        if self._written is not None:
            self._write(state="complete")

    def _write(self, **changes: Any) -> None:
        self._state |= changes
        if self._path is None:
            return
        now = time.monotonic()
        done, total, first = self._state["facts_done"], self._state["facts_total"], self._first
        eta = (total - done) * (now - self._start) / (done - first) if first is not None and done > first else None
        times = {"seconds": round(now - self._start, 1), "eta_seconds": None if eta is None else round(eta, 1)}
        try:
            write_file(self._path, json.dumps({**self._state, **times, "updated": time.time()}, indent=1).encode())
        except MegapromptError as error:
            logger.warning("%s", error)  # the run matters more
        self._written = time.monotonic()


def read_progress(run: Path) -> dict[str, Any]:
    """What progress.json of a run says.

    Raises:
        UsageError: there is none.
    """
    try:
        return json.loads((run / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}: has no readable progress.json ({error}); give the directory of a run") from error


def describe_progress(progress: Mapping[str, Any]) -> str:
    """The same for a person."""
    seconds = {name: timedelta(seconds=round(progress[name] or 0)) for name in ("seconds", "eta_seconds")}
    lines = [f"{progress['state']}: {progress['phase']}, step {progress['step']}"]
    if total := progress["facts_total"]:
        done = progress["facts_done"]
        items = progress.get("items", "facts")
        lines.append(f"{done} of at most {total} {items} ({100 * done / total:.0f} %)")
    if progress["state"] == "running":
        if passes := progress.get("passes"):
            lines.append(f"pass {passes[0]} of {passes[1]} of what is asked")
        left = f", about {seconds['eta_seconds']} left" if progress["eta_seconds"] is not None else ""
        lines.append(f"{seconds['seconds']} in this phase{left}")
    metric, heading = progress.get("score", ["p_at_1", "P@1"])
    for name, about in progress["relations"].items():
        best = 100 * about[f"best_dev_{metric}"]
        why = ", diverged" * ("diverged" in about)
        lines.append(f"  {name:8} epoch {about['epoch']:4}, best {heading} on dev {best:5.1f} %{why}")
    lines.append(f"last update {max(0, time.time() - progress['updated']):.0f} s ago")
    return "\n".join(lines)
