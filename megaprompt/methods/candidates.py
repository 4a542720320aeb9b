"""Candidates: the ways of learning a prompt among which `best` chooses for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.engine.learner import TrainingSet
from megaprompt.prompting.prompt_encoder import EncoderKind, PromptEncoder
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template
from megaprompt.tasks.task import Task

PAPER = "paper"
"""The candidate that is P-tuning as the paper has it."""


@dataclass(frozen=True)
class Candidate:
    """One way of learning a prompt for a task.

    Args:
        shown: the training examples that stand before the question, by their places in train; not learned from.
        vectors: [pseudo tokens, hidden size] to start with; a random start if None.
    """

    name: str
    template: Template
    shown: tuple[int, ...] = ()
    vectors: Tensor | None = field(default=None, repr=False)

    def before(self, task: Task) -> str:
        """The text of the demonstrations."""
        return task.shown(self.shown)

    def training_set(self, task: Task) -> TrainingSet:
        """What it is learned from.

        Raises:
            MegapromptError: there are no examples.
        """
        before = self.before(task)
        asked = task.training_instances(self.template, before)
        train = [one for i, one in enumerate(asked) if i not in self.shown]
        return TrainingSet(
            task.name,
            task.objective,
            self.template.num_pseudo_tokens,
            train,
            task.instances("dev", self.template, before),
            self.vectors,
            candidate="" if self.name == PAPER else self.name,
            stays=self.name == PAPER,
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
    return [paper, *behind, *anchors][:most]


def how_many_fit(backbone: Backbone, encoder: EncoderKind, pseudo_tokens: int, tasks: int) -> int:
    """For how many candidates of so many tasks the encoders, with gradients and Adam, fit into half of the free memory.

    At least one. (16 bytes for each parameter: at 11B, an LSTM encoder takes 2.1 GB.)
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PromptEncoder(pseudo_tokens, backbone.hidden_size, encoder).parameters())
    cuda = backbone.device.type == "cuda"
    free = torch.cuda.mem_get_info(backbone.device)[0] if cuda else psutil.virtual_memory().available
    return max(1, int(free / 2 / (16 * parameters * tasks)))


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
