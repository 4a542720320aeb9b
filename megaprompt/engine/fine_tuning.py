"""Fine-tuning: the baselines that train the whole language model on one relation (the paper's Table 2, FT and MP+FT).

Facts, packing, loss, data order, early stopping and evaluation are those of the prompts; only what is trained differs.
The model goes back to its original weights for every relation, so it is loaded anew each time. A model that is sharded
by DeepSpeed is trained by DeepSpeed's ZeRO-3 optimizer: gradients, float32 master weights and Adam's state are
partitioned, and offloaded if the configuration says so. Otherwise every rank has all of them.

As with prompts, and unlike in the paper's code, there is no dropout.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.distributed.launch import World
from megaprompt.distributed.zero3 import shard
from megaprompt.engine.evaluation import metrics, predict
from megaprompt.engine.training import Course, Hooks, Interrupted, backward_passes, new_optimizer
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Recipe
from megaprompt.tasks.task import Task

logger = logging.getLogger(__name__)


class FineTuner:
    """Trains a whole backbone on one relation.

    Args:
        backbone: loaded as trainable, with the same DeepSpeed configuration.
        task: its queries have no pseudo tokens.
        deepspeed: a ZeRO-3 configuration with its precision; None for PyTorch alone.
        world: all ranks; they make this object and call its methods together.

    Raises:
        MegapromptError: there is nothing to learn from.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        recipe: Recipe,
        *,
        seed: int = 0,
        size: PassSize,
        world: World,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        if not len(task.train) or not len(task.dev):
            raise MegapromptError(f"relation {task.relation} needs facts in both train and dev for fine-tuning")
        self.backbone, self.size, self.world = backbone, size, world
        self.course = Course(task, recipe, seed)
        self.optimizer: Any = new_optimizer(backbone.parameters(), recipe)
        self.engine = None
        if deepspeed is not None:
            self.engine = shard(backbone, deepspeed, self.optimizer)
            self.optimizer = self.engine.optimizer

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self.engine is None:
            loss.backward()
        else:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed takes the mean over the ranks

    def train_step(self) -> None:
        """One optimizer step on the next batch.

        Raises:
            MegapromptError: the loss is not a number.
        """
        course, train = self.course, self.course.task.train
        batch = course.next_batch()
        losses = backward_passes(
            self.backbone,
            None,
            [train.queries[i] for i in batch],
            [train.objects[i] for i in batch],
            torch.full((len(batch),), 1 / len(batch), dtype=torch.float64),
            self._backward,
            world=self.world,
            everyone=self.world,
            size=self.size,
        )
        if failure := course.add_loss(losses):
            raise MegapromptError(failure)  # on all ranks: they know all losses
        for group in self.optimizer.param_groups:
            group["lr"] = course.learning_rate
        if self.engine is None:
            for parameter in self.backbone.parameters():
                if parameter.grad is not None:
                    self.world.sum_(parameter.grad, "gradients")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.engine.step()
            course.skipped += self.optimizer.overflow
        course.step += 1

    def train(self, allowed: Tensor, hooks: Hooks, keep: Callable[[], Any]) -> Any:
        """Train until the relation stops early or has had all of its epochs.

        Args:
            allowed: bool [vocabulary], the tokens that count as answers on dev.
            keep: called when the model is the best so far on dev. The weights are not kept: they are too many.

        Returns:
            What `keep` gave for the best model.

        Raises:
            Interrupted: `hooks.should_stop` said so on some rank.
            MegapromptError: a loss is not a number.
        """
        course, dev = self.course, self.course.task.dev
        kept = None
        while course.active:
            self.train_step()
            if self.world.max_(torch.tensor(int(hooks.should_stop())), "schedule"):
                raise Interrupted(
                    f"interrupted; continue with --resume, which fine-tunes {course.task.relation} from its start"
                )
            if course.epoch_is_over:
                rank = predict(
                    self.backbone, dev.queries, dev.objects, None, allowed=allowed, world=self.world, size=self.size
                ).rank
                line = course.end_epoch(metrics(rank))
                if line["best"]:
                    kept = keep()
                hooks.log({"time": time.time(), "step": course.step, **line, "stopped": not course.active})
            batch = course.recipe.batch_size
            hooks.progress(course.step * batch, course.steps * batch, course.step)
        return kept
