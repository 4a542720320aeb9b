"""What a run offers to its methods: the backbone, the questions, and a place for what comes out (`methods.method`)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megaprompt.backbone import Backbone
from megaprompt.console import progress
from megaprompt.distributed.loss_scale import NO_SCALING, LossScale
from megaprompt.distributed.world import World
from megaprompt.engine.learner import Learned, Prompt
from megaprompt.engine.passes import AfterPass, Questions, Workplace, answers, go_on
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.methods.method import Scores, ScoreTask, ShouldStop
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template
from megaprompt.run.averages import summarize
from megaprompt.run.checkpoints import Parts
from megaprompt.run.directory import RunDirectory
from megaprompt.run.interruption import stop_if_asked, stop_signals
from megaprompt.run.progress import ProgressFile
from megaprompt.run.results_file import ResultsFile
from megaprompt.run.saved_prompts import SavedPrompt, prompt_file
from megaprompt.run.training import one_after_the_other, train_resumably
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import Split, Task


@dataclass
class RunContext:
    """The parts of a run.

    Args:
        load: loads the backbone frozen, or, if told so, to be trained, with the DeepSpeed configuration for that.
        release: lets go of a backbone that was loaded to be trained.
    """

    file: ResultsFile
    status: ProgressFile
    resume: bool
    data_name: str
    tasks: dict[str, Task]
    frozen: Backbone | None
    size: PassSize
    world: World
    seed: int
    half_precision_scale: LossScale
    load: Callable[[bool], tuple[Backbone, dict[str, Any] | None]] = field(repr=False)
    release: Callable[[Backbone], None] = field(repr=False)
    after_pass: AfterPass = field(default_factory=lambda: go_on, init=False, repr=False)

    @property
    def run(self) -> RunDirectory:
        return self.file.run

    @property
    def results(self) -> dict[str, Any]:
        return self.file.results

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone; loaded again if it was let go of."""
        if self.frozen is None:
            self.frozen, _ = self.load(False)
        return self.frozen

    @property
    def loss_scale(self) -> LossScale:
        return self.half_precision_scale if self.backbone.model.dtype == torch.float16 else NO_SCALING

    def at(self, task: Task) -> Workplace:
        return Workplace.shared(self.backbone, self.size, self.world, task.objective, self.after_pass)

    def answer(
        self, task: Task, template: Template, split: Split, prompt: Prompt | None = None, before: str = ""
    ) -> Answers:
        head = None if prompt is None else prompt.head_for(task.objective, self.backbone)
        vectors = None if prompt is None or not template.num_pseudo_tokens else prompt.vectors.to(self.backbone.device)
        questions = Questions(task.instances(split, template, before), task.objective, head)
        return answers(self.at(task), [questions], vectors)[0]

    def measure(self, task: Task, split: Split, answers: Answers) -> dict[str, float]:
        return task.objective.measure(answers, task.examples[split])

    @contextmanager
    def trainable_backbone(self) -> Iterator[tuple[Backbone, dict[str, Any] | None]]:
        if self.frozen is not None:
            self.release(self.frozen)
            self.frozen = None
        gc.collect()  # before the next one is loaded
        backbone, deepspeed = self.load(True)
        try:
            yield backbone, deepspeed
        finally:
            self.release(backbone)

    def row(self, task: Task, template: Template, dev: Scores | None = None, **more: Any) -> dict[str, Any]:
        return _row(task, template, dev) | {name: x for name, x in more.items() if name != "diverged" or x is not None}

    def each_task(
        self,
        columns: Sequence[str],
        score: ScoreTask,
        *,
        names: Sequence[str] | None = None,
        title: str = "",
        own_progress: bool = False,
    ) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        if all(column in self.results["methods"] for column in columns):
            return {column: self.rows(column) for column in columns}
        title = title or " and ".join(columns)
        unfinished = self.results.setdefault("unfinished", {})
        rows = {column: unfinished.setdefault(column, {}) for column in columns}
        todo = [name for name in names or self.tasks if not self.is_scored(columns, name)]
        start, count, timing = time.monotonic(), len(names or self.tasks), self.results["timing"]
        shown = progress(title, count, self.world.is_main and not own_progress, unit="relations")
        earlier = {column: timing.get(column, {}).get("seconds", 0.0) for column in columns}
        with stop_signals() as should_stop, shown as update, self.file.saved_at_the_end():
            for number, name in enumerate(todo, start=count - len(todo) + 1):
                self.status.phase(f"{title} {name}")
                stop_if_asked(self.world, should_stop, f"before {name}")
                with _telling_passes(self, name, None if own_progress else partial(update, number - 1), should_stop):
                    scored = score(self.tasks[name], should_stop)
                for column, (row, found, way) in scored.items():
                    rows[column][name] = row | _measured(self, column, way or self.tasks[name], found)
                    timing[column] = {"seconds": earlier[column] + time.monotonic() - start}
                self.file.save(report=False, soon=True)
                update(number)
        if all(self.is_scored(columns, name) for name in self.tasks):
            for column in columns:
                self.baseline(column, {name: rows[column][name] for name in self.tasks})
                del unfinished[column]
            if not unfinished:
                del self.results["unfinished"]
            self.file.save()
        return rows

    def rows(self, column: str) -> Mapping[str, dict[str, Any]]:
        return self.results["methods"].get(column, {}).get("relations", {})

    def is_scored(self, columns: Sequence[str], task: str) -> bool:
        unfinished = self.results.get("unfinished", {})
        return all(task in unfinished.get(column, {}) or task in self.rows(column) for column in columns)

    def once(self, name: str, find: Callable[[], int]) -> int:
        if name not in self.results:
            self.results[name] = find()
            self.file.save(report=False)
        return int(self.results[name])

    def kept(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return Parts(self.run.path, self.world).once(name, find)

    def baseline(self, column: str, rows: Mapping[str, dict[str, Any]]) -> None:
        self.results["methods"][column] = {"relations": rows, **summarize(rows, list(self.results["metrics"]))}

    def train(self, method: str, trainer: Trainer, wave: int = 1) -> dict[str, Learned]:
        return train_resumably(method, trainer, self.run, self.world, self.status, self.results, self.resume, wave)

    def train_one(
        self, method: str, task: Task, should_stop: ShouldStop, candidate: str = "", trainer: Trainer | None = None
    ) -> AbstractContextManager[Hooks]:
        place = f"{list(self.tasks).index(task.name) + 1} of {len(self.tasks)}{', ' * bool(candidate)}{candidate}"
        unit = "steps" if trainer is None else task.objective.items
        shown = progress(f"{method} {task.name} ({place})", len(task.examples["train"]), self.world.is_main, unit)
        about = (method, task.name, candidate)
        return one_after_the_other(about, shown, should_stop, self.run, self.world, self.status, trainer)

    def save_prompt(
        self, method: str, task: Task, template: Template, dev: Scores, *, before: str = "", kept: Prompt | None = None
    ) -> None:
        if self.world.is_main:
            about = {"relation": task.name, "template": template.text, "label": task.label, "data": self.data_name}
            prompt = SavedPrompt.of(self.backbone, kept, dev, about | {"before": before, "method": method})
            prompt.save(prompt_file(self.run.path, method, task.name))

    def save_template(self, name: str, task: Task, template: str) -> None:
        if self.world.is_main:
            self.run.replace_template(name, task.name, template)


@contextmanager
def _telling_passes(
    context: RunContext, name: str, tell: Callable[..., None] | None, should_stop: ShouldStop
) -> Iterator[None]:
    """Tell of each pass in which a task is asked, and stop behind it if a signal says so; or leave both to others."""

    def told(done: int, total: int) -> None:
        assert tell is not None
        tell(note=f"{name}: pass {done} of {total}")
        context.status.passes(done, total)
        stop_if_asked(context.world, should_stop, f"in {name}")

    before, context.after_pass = context.after_pass, go_on if tell is None else told
    try:
        yield
    finally:
        context.after_pass = before


def _row(task: Task, template: Template, dev: Scores | None) -> dict[str, Any]:
    score = next(iter(task.objective.metrics))
    about = {"type": task.type, "facts": len(task.examples["test"]), "epochs": None, "template": template.text}
    return about | {f"dev_{score}": dev[score] if dev else None, "dev": dict(dev) if dev else None}


def _measured(context: RunContext, column: str, task: Task, found: Answers | None) -> dict[str, float | None]:
    """The metrics of answers on test, which are written down on one rank."""
    if found is None:
        return dict.fromkeys(task.objective.metrics)
    if context.world.is_main:
        _write_down(context.run, column, task, found)
    return dict(task.objective.measure(found, task.examples["test"]))


def _write_down(run: RunDirectory, column: str, task: Task, found: Answers) -> None:
    """Answers on test: as predictions, and in the data's own format for them if it has one."""
    lines = (task.objective.describe(one, found, i) for i, one in enumerate(task.examples["test"]))
    run.replace_predictions(task.name, column, lines)
    if (submission := task.submission(found)) is not None:
        run.write_submission(column, task.name, submission)
