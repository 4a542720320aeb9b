"""How prompts are optimized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """How the prompts of one relation, or the weights of the backbone, are optimized, with Adam."""

    learning_rate: float
    weight_decay: float
    decay: float  # the learning rate is multiplied by this after every epoch
    batch_size: int
    max_epochs: int
    patience: int  # stop after dev was scored so many times without getting better
    max_steps: int | None = None  # if given, stop after so many steps, with the learning rate falling linearly to 0
    warmup_steps: int = 0  # over which the learning rate rises linearly
    start_near_embeddings: bool = False  # initial vectors close to the backbone's mean token embedding
    ties: Literal["worse", "kept", "better"] = "worse"  # equal scores on dev; see `engine.best`
    full_batches: bool = False  # what is left of an epoch behind its last full batch is not used
    among_allowed: bool = False  # the loss is among the allowed answers, not among all tokens
    dev_every: int | None = None  # steps after which dev is scored; if not given, it is scored after every epoch
    grouped: bool = False  # instances that are scored together follow each other in every epoch
    linear: bool = False  # the learning rate falls linearly to 0 also where there are only epochs
    decoupled: bool = False  # AdamW, without weight decay of biases and norms
    clip: float | None = None  # the gradients of all that is trained have at most this norm together
    dropout: bool = False  # the model drops activations while its weights are trained

    def used(self, facts: int) -> int:
        """How many of so many training facts an epoch uses; all of them where they do not fill one batch."""
        return facts - facts % self.batch_size if self.full_batches and facts >= self.batch_size else facts

    def steps(self, facts: int) -> int:
        """Optimizer steps for a relation with so many training facts, if it does not stop early."""
        steps = self.max_epochs * math.ceil(self.used(facts) / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rate(self, facts: int, epoch: int, step: int) -> float:
        """The learning rate of the next step, after so many epochs and steps."""
        falling = 1 - step / self.steps(facts) if self.linear or self.max_steps is not None else 1.0
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * self.decay**epoch * min(rising, falling)


@dataclass(frozen=True)
class Tuning:
    """Recipes for what is trained together, where weights of the backbone are: as many steps of the same batches.

    Args:
        weights: of the model, and of a classifier on it.
        prompts: of the prompt encoder.
    """

    weights: Recipe
    prompts: Recipe


RECIPES = {
    # It scores dev before each of 100 epochs, hence 99 that can be chosen; the score before the first is never chosen.
    "paper": Recipe(1e-5, 5e-4, 0.98, batch_size=8, max_epochs=99, patience=20, ties="better", full_batches=True),
    "fine-tuning": Recipe(5e-6, 5e-4, 0.98, batch_size=8, max_epochs=100, patience=20),
    "fast": Recipe(
        1e-3,
        5e-4,
        1.0,
        batch_size=8,
        max_epochs=1000,
        patience=20,
        max_steps=100,
        dev_every=25,
        warmup_steps=20,
        start_near_embeddings=True,
        among_allowed=True,
    ),
}
"""`paper` does what the code of the paper does; `fast` was chosen on dev (see docs/asking.md)."""


def chosen(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """A recipe with the options that were given (not None) put in."""
    return dataclasses.replace(recipe, **{name: value for name, value in options.items() if value is not None})


def chosen_tuning(tuning: Tuning, of_weights: Mapping[str, Any], of_prompts: Mapping[str, Any]) -> Tuning:
    """The same for recipes of weights and prompts."""
    return Tuning(chosen(tuning.weights, of_weights), chosen(tuning.prompts, of_prompts))
