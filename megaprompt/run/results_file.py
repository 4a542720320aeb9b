"""results.json of a run: made, gone on with, and written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprompt import __version__
from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.errors import MegapromptError
from megaprompt.report.html import write_report
from megaprompt.run.directory import SCHEMA, RunDirectory
from megaprompt.run.environment import environment, peak_memory
from megaprompt.run.origin import digest_of_examples
from megaprompt.tasks.lama.questions import AskFor
from megaprompt.tasks.task import SPLITS, Task


@dataclass
class ResultsFile:
    """The results so far, and their file, which the main rank writes."""

    run: RunDirectory
    results: dict[str, Any]
    world: World
    _next: float = 0.0  # when the file may be written again where that takes long
    _put_off: bool = False

    def save(self, report: bool = True, soon: bool = False) -> None:
        """Write the results so far, and the report. Where they are large, `soon` may leave it to a later call. All
        ranks must call it."""
        peak, before = peak_memory(self.world), self.results.get("peak_memory_bytes", [])
        self.results["peak_memory_bytes"] = list(map(max, peak, before)) if len(before) == len(peak) else peak
        self._put_off = soon and time.monotonic() < self._next
        if not self._put_off:
            self._write()
            if report and self.world.is_main:
                write_report(self.run.path)

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Write what was put off when the block ends, however it does. (And nothing else: job scripts see by the file's
        time whether anything was done.)"""
        try:
            yield
        finally:
            if self._put_off:
                self._put_off = False
                self._write()

    def _write(self) -> None:
        if self.world.is_main:
            start = time.monotonic()
            self.run.write_results(self.results)
            self._next = time.monotonic() + 20 * (time.monotonic() - start)


def new_results(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    world: World,
    *,
    data: str,
    ask_for: AskFor | None = None,
) -> dict[str, Any]:
    """results.json before anything was asked.

    Args:
        data: its name.
        ask_for: how facts are answered, if they are facts.
    """
    objectives = [task.objective for task in tasks.values()]
    vocabulary = ask_for and ask_for.vocabulary
    return {
        "schema": SCHEMA,
        "complete": False,
        "megaprompt": __version__,
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "dtype": _name(backbone),
            "causal": backbone.causal,
            "hidden_size": backbone.hidden_size,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters()),
            **({} if backbone.random_weights is None else {"control": "random-weights"}),
        },
        "metrics": {name: heading for objective in objectives for name, heading in objective.metrics.items()},
        "items": objectives[0].items,
        "selects": list(objectives[0].selects),
        "few": objectives[0].few,
        "data": {
            "name": data,
            "answers": ask_for and ask_for.answers,
            "vocabulary": vocabulary and {"name": vocabulary.name, "tokens": int(vocabulary.allowed.sum())},
            "relations": {name: _describe(task) for name, task in tasks.items()},
        },
        "methods": {},
        "environment": environment(world),
        "timing": {},
    }


def _describe(task: Task) -> dict[str, Any]:
    return {
        "label": task.label,
        "type": task.type,
        "template": task.manual,
        "facts": {split: len(task.examples[split]) for split in SPLITS},
        "left_out": dict(task.left_out),
        "usable": dict(task.usable),
        "sha256": digest_of_examples(task),
        "balanced": len(set(Counter(example.answer for example in task.examples["test"]).values())) == 1,
    }


def go_on_with(results: dict[str, Any], backbone: Backbone, world: World, run: Path) -> None:
    """See that a run goes on with the same backbone, and note where it does.

    Raises:
        MegapromptError: its weights or their precision are others.
    """
    before = results["backbone"]
    if before["fingerprint"] != backbone.fingerprint:
        raise MegapromptError(f"--resume: the weights of {backbone.name} are not those that {run} was started with")
    if before["dtype"] != (dtype := _name(backbone)):
        raise MegapromptError(
            f"--resume: {run} was started in {before['dtype']}, not in {dtype}; give --dtype {before['dtype']} or "
            f"the same --deepspeed"
        )
    if results["environment"] != (here := environment(world)):
        results.setdefault("earlier_environments", []).append(results["environment"])
        results["environment"] = here


def _name(backbone: Backbone) -> str:
    return str(backbone.model.dtype).removeprefix("torch.")
