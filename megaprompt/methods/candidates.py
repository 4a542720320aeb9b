"""Candidates: the ways of learning a prompt among which `best` chooses for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megaprompt.engine.learner import TrainingSet
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template
from megaprompt.tasks.task import Example, Task

PAPER = "paper"
"""The candidate that is P-tuning as the paper has it."""
_SLOWER = 0.3
FOLDS = 3
"""Of train, each held out once."""
MOST = 4
"""How many candidates are learned, if they fit."""


def without(task: Task, shown: Collection[int]) -> list[Example]:
    """The training examples that are not shown as demonstrations."""
    return [example for i, example in enumerate(task.examples["train"]) if i not in shown]


def has_folds(task: Task) -> bool:
    """Whether candidates are compared on folds of train as well: dev has too few examples to choose with, and train
    enough to be divided."""
    return len(task.examples["dev"]) < task.objective.few and len(task.examples["train"]) >= 4 * FOLDS


def folds_of(task: Task, shown: Collection[int]) -> list[Task]:
    """The task with train and dev divided anew, so that every example of both is in one dev: for cross-validation.

    None where dev alone is enough (see `has_folds`).
    """
    train, dev = without(task, shown), task.examples["dev"]
    if not has_folds(task):
        return []
    parts = [[*(e for i, e in enumerate(train) if i % FOLDS != k), *dev] for k in range(FOLDS)]
    return [
        dataclasses.replace(task, examples={**task.examples, "train": part, "dev": train[k::FOLDS]})
        for k, part in enumerate(parts)
    ]


@dataclass(frozen=True)
class Candidate:
    """One way of learning a prompt for a task.

    Args:
        shown: the training examples that stand before the question, by their places in train; not learned from.
        vectors: [pseudo tokens, hidden size] to start with; a random start if None.
        rate: the learning rate, as a share of the recipe's.
    """

    name: str
    template: Template
    shown: tuple[int, ...] = ()
    vectors: Tensor | None = field(default=None, repr=False)
    rate: float = 1.0

    def before(self, task: Task) -> str:
        """The text of the demonstrations."""
        return task.shown(self.shown)

    def training_sets(self, task: Task, recipe: Recipe, with_folds: bool) -> list[TrainingSet]:
        """What it is learned from; those behind the first one are folds for cross-validation, where dev has too few
        examples to compare candidates with.

        Raises:
            MegapromptError: there are no examples.
        """
        first = dataclasses.replace(task, examples={**task.examples, "train": without(task, self.shown)})
        folds = folds_of(task, self.shown) if with_folds else []
        recipe = dataclasses.replace(recipe, learning_rate=self.rate * recipe.learning_rate)
        return [self._training_set(each, recipe, self.before(task), fold) for fold, each in enumerate([first, *folds])]

    def _training_set(self, task: Task, recipe: Recipe, before: str, fold: int) -> TrainingSet:
        name = "" if self.name == PAPER else self.name
        return TrainingSet(
            task.name,
            task.objective,
            self.template.num_pseudo_tokens,
            task.training_instances(self.template, before),
            task.instances("dev", self.template, before),
            self.vectors,
            candidate=f"{self.name}-fold-{fold}" if fold else name,
            contender=self.name,
            recipe=recipe,
            stays=self.name == PAPER and not fold,
        )


def candidates(task: Task, paper: Candidate, shown: Sequence[int], most: int) -> list[Candidate]:
    """At most so many, the most useful first.

    Args:
        paper: P-tuning's own.
        shown: demonstrations that are good on dev, by their places in train; maybe none.
    """
    anchors = [] if task.manual is None else [Candidate("anchors", task.manual_template.with_anchors())]
    behind = [
        dataclasses.replace(each, name=f"{each.name}-behind-{len(shown)}", shown=tuple(shown))
        for each in ((*anchors, paper) if shown else ())
    ]
    found = [paper, *behind, *anchors]
    slower = [dataclasses.replace(each, name=f"{each.name}-slower", rate=_SLOWER) for each in found]
    return [*found, *slower][:most]


def rungs_of(recipe: Recipe, most: int) -> dict[int, int]:
    """After how many steps how many of at most so many candidates go on: the better half after each quarter.

    None are dropped by a recipe without a number of steps, or that scores dev after epochs, which differ in length.
    """
    rungs, left = {}, most
    if recipe.max_steps is not None and recipe.dev_every is not None:
        for quarter in (1, 2, 3):
            left = max(1, -(-left // 2))
            rungs[recipe.dev_every * max(1, round(quarter * recipe.max_steps / 4 / recipe.dev_every))] = left
    return rungs
