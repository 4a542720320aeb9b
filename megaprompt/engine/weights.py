"""The backbone's own weights as what is tuned: by PyTorch, or, if they are sharded, by DeepSpeed's ZeRO-3 optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import shard
from megaprompt.engine.learner import new_optimizer
from megaprompt.prompting.recipe import Recipe
from megaprompt.seeds import seed_of


class Weights:
    """All parameters of a backbone, with Adam.

    With ZeRO-3, gradients, float32 master weights and Adam's state are partitioned over the ranks, and offloaded if the
    configuration says so. Otherwise every rank has all of them.

    Args:
        backbone: loaded as trainable, with the same DeepSpeed configuration.
        recipe: of the weights; what is trained beside them has its own, with as many steps.
        deepspeed: a ZeRO-3 configuration with its precision; None for PyTorch alone.
        world: all ranks; they make this object and call its methods together.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, world: World, deepspeed: dict[str, Any] | None) -> None:
        self.backbone, self.recipe, self.world = backbone, recipe, world
        self.optimizer: Any = new_optimizer(backbone.parameters(), recipe)
        self.engine = None
        self._norm_of_others = 0.0  # of gradients, in the step that is taken
        if deepspeed is not None:
            self.engine = shard(backbone, deepspeed, self.optimizer, recipe.clip)
            self.optimizer = self.engine.optimizer
            # DeepSpeed clips what it has itself; the norm is over everything that is trained.
            norms = self.optimizer._get_norm_groups
            self.optimizer._get_norm_groups = lambda: [*norms(), self._norm_of_others * self.optimizer.loss_scale]

    @contextmanager
    def learning(self, *seed: object) -> Iterator[None]:
        """Within this context the model drops activations if the recipe says so: always the same for a seed and number
        of ranks, if passes are of the same size."""
        if not self.recipe.dropout:
            yield
            return
        model, device = self.backbone.model, self.backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(*seed, "dropout", self.world.rank))
            model.train()
            try:
                yield
            finally:
                model.eval()

    @property
    def scale(self) -> float:
        """By what `backward` multiplies the gradients of tensors that are not among the weights."""
        return 1.0 if self.engine is None else self.world.size * self.optimizer.loss_scale

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one pass; the last one completes a step's."""
        if self.engine is None:
            loss.backward()
        else:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed takes the mean over the ranks

    def step(self, learning_rate: float, others: Sequence[nn.Parameter] = ()) -> bool:
        """Take a step; returns whether it was skipped, since gradients overflowed.

        Args:
            others: what is trained beside the weights, with its gradients, which are clipped together with theirs.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = [parameter.grad for parameter in others if parameter.grad is not None]
        if self.engine is not None:
            self._norm_of_others = torch.nn.utils.get_total_norm(gradients).item()
            self.engine.step()
            if self.recipe.clip is not None and not self.optimizer.overflow:
                norm = self.optimizer._global_grad_norm
                torch.nn.utils.clip_grads_with_norm_(others, self.recipe.clip, torch.as_tensor(norm))
            return bool(self.optimizer.overflow)
        own = [parameter for parameter in self.backbone.parameters() if parameter.grad is not None]
        for parameter in own:
            assert parameter.grad is not None
            self.world.sum_(parameter.grad, "gradients")
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_([*own, *others], self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return False

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of them only."""
        return self.engine is not None

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on exactly, of weights that are not sharded; not copied."""
        return {
            "parameters": [parameter.detach() for parameter in self.backbone.parameters()],
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.put_back(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])

    def copy(self) -> list[Tensor] | None:
        """The weights as they are, on the CPU; None if they are sharded, or a rank has too little memory for it. All
        ranks must call it."""
        size = sum(parameter.nbytes for parameter in self.backbone.parameters())
        if self.sharded or self.world.free_host_memory() < 2 * size:
            return None
        return [parameter.detach().to("cpu", copy=True) for parameter in self.backbone.parameters()]

    @torch.no_grad()
    def put_back(self, copy: Sequence[Tensor]) -> None:
        """Let the weights be those of a `copy`."""
        for parameter, values in zip(self.backbone.parameters(), copy, strict=True):
            parameter.copy_(values)
