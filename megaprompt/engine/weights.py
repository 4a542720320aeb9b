"""The backbone's own weights as what is tuned: by PyTorch, or, if they are sharded, by DeepSpeed's ZeRO-3 optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import shard
from megaprompt.engine.learner import new_optimizer
from megaprompt.prompting.recipe import Recipe


class Weights:
    """All parameters of a backbone, with Adam.

    With ZeRO-3, gradients, float32 master weights and Adam's state are partitioned over the ranks, and offloaded if the
    configuration says so. Otherwise every rank has all of them.

    Args:
        backbone: loaded as trainable, with the same DeepSpeed configuration.
        deepspeed: a ZeRO-3 configuration with its precision; None for PyTorch alone.
        world: all ranks; they make this object and call its methods together.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, world: World, deepspeed: dict[str, Any] | None) -> None:
        self.backbone, self.world = backbone, world
        self.optimizer: Any = new_optimizer(backbone.parameters(), recipe)
        self.engine = None
        if deepspeed is not None:
            self.engine = shard(backbone, deepspeed, self.optimizer)
            self.optimizer = self.engine.optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one pass; the last one completes a step's."""
        if self.engine is None:
            loss.backward()
        else:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed takes the mean over the ranks

    def step(self, learning_rate: float) -> bool:
        """Take a step; returns whether it was skipped, since gradients overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.engine is not None:
            self.engine.step()
            return bool(self.optimizer.overflow)
        for parameter in self.backbone.parameters():
            if parameter.grad is not None:
                self.world.sum_(parameter.grad, "gradients")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return False
