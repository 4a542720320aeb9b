"""The one interface of all methods, and what a run offers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from megaprompt.backbone import Backbone
from megaprompt.distributed.loss_scale import LossScale
from megaprompt.distributed.world import World
from megaprompt.engine.learner import Learned, Prompt
from megaprompt.engine.passes import Workplace
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import Split, Task


class Scored(NamedTuple):
    """What a method has to say of one task."""

    row: dict[str, Any]  # what results.json says beside the metrics
    answers: Answers | None  # on test; None if there is nothing to answer with
    way: Task | None = None  # in which the task was asked, if in another one


Scores = Mapping[str, float]
ShouldStop = Callable[[], bool]
ScoreTask = Callable[[Task, ShouldStop], Mapping[str, Scored]]


class Context(Protocol):
    """What a run offers to a method: what is asked of which backbone, and a place for what comes out.

    All ranks make the same calls.
    """

    @property
    def tasks(self) -> Mapping[str, Task]: ...

    @property
    def backbone(self) -> Backbone: ...

    @property
    def size(self) -> PassSize: ...

    @property
    def world(self) -> World: ...

    @property
    def seed(self) -> int: ...

    @property
    def loss_scale(self) -> LossScale:
        """For training in float16; no scaling otherwise."""

    def at(self, task: Task) -> Workplace:
        """Where all ranks share the questions of a task."""

    def answer(
        self, task: Task, template: Template, split: Split, prompt: Prompt | None = None, before: str = ""
    ) -> Answers:
        """Ask one split of a task with a template behind some text, and with what was learned for its pseudo tokens."""

    def measure(self, task: Task, split: Split, answers: Answers) -> dict[str, float]:
        """The metrics of such answers."""

    def row(self, task: Task, template: Template, dev: Scores | None = None, **more: Any) -> dict[str, Any]:
        """What results.json says of a task beside the metrics; `dev` are the metrics on dev."""

    def rows(self, column: str) -> Mapping[str, dict[str, Any]]:
        """What results.json says of a method that has run, by task; nothing if it has not."""

    def is_scored(self, columns: Sequence[str], task: str) -> bool:
        """Whether `each_task` has scored a task by methods, now or before an interruption."""

    def once(self, name: str, find: Callable[[], int]) -> int:
        """What was found the first time in this run, also after an interruption."""

    def kept(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Likewise, of what may hold tensors; the name may be a path."""

    def each_task(
        self,
        columns: Sequence[str],
        score: ScoreTask,
        *,
        names: Sequence[str] | None = None,
        title: str = "",
        own_progress: bool = False,
    ) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """Score all tasks by methods, and write down what is known of each at once: a stopped run goes on there.

        Returns the rows of results.json, by column and task.

        Args:
            columns: names of the methods in results and reports.
            names: of the tasks, if others are scored in other calls; averages are made when all have been.
            score: gets a task and a function that tells whether to stop; gives what each method says of the task.
            title: what the user is told that is being done; the methods, if not given.
            own_progress: `score` shows its progress.

        Raises:
            Interrupted: a signal said so on some rank.
        """

    def baseline(self, column: str, rows: Mapping[str, dict[str, Any]]) -> None:
        """Write down rows that are known without asking anything."""

    def train(self, method: str, trainer: Trainer, wave: int = 1) -> dict[str, Learned]:
        """Train with log, progress and checkpoints; goes on where a stopped run was. Each wave of tasks is trained in a
        call of its own, after the one before has been scored."""

    def train_one(
        self, method: str, task: Task, should_stop: ShouldStop, candidate: str = "", trainer: Trainer | None = None
    ) -> AbstractContextManager[Hooks]:
        """Log and progress of a method that trains one task, or candidate, after the other: each from its start, or, if
        there is a trainer, with checkpoints, and on from where a stopped run was."""

    def save_prompt(
        self, method: str, task: Task, template: Template, dev: Scores, *, before: str = "", kept: Prompt | None = None
    ) -> None:
        """Write what was learned or chosen to a file of its own."""

    def save_template(self, name: str, task: Task, template: str) -> None:
        """Write a template that was found, as `--discrete` reads them."""

    def trainable_backbone(self) -> AbstractContextManager[tuple[Backbone, dict[str, Any] | None]]:
        """The backbone with its original weights, to be trained, and the DeepSpeed configuration for that. The frozen
        one is let go of."""


class Method(Protocol):
    """A way to ask."""

    @property
    def columns(self) -> Sequence[str]:
        """What it is called in results and reports; one that gives several answers has several."""

    def check(self, context: Context) -> None:
        """Tell what is missing before anything is computed.

        Raises:
            MegapromptError: a task lacks what the method needs.
        """

    def run(self, context: Context) -> None:
        """Ask all tasks."""
