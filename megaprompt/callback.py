"""What a model learns while it is trained: a callback for transformers' Trainer that probes it every so many steps.

from megaprompt.callback import ProbeCallback
from megaprompt.config import ProbeConfig
config = ProbeConfig(backbone="my model", data="world", methods=("manual",), out=Path("runs/training"))
trainer.add_callback(ProbeCallback(config, tokenizer, every=500))

Each time a run is written to OUT/step-0000500, ..., with a report of its own; `megaprompt report OUT` shows what was
learned when.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from megaprompt.backbone import Backbone
from megaprompt.backbone.borrowed import borrowed
from megaprompt.config import ProbeConfig, from_yaml
from megaprompt.distributed.world import World
from megaprompt.engine.trainer import Interrupted
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.run.directory import RunDirectory
from megaprompt.run.job import probe

logger = logging.getLogger(__name__)


class ProbeCallback(TrainerCallback):
    """Probes the model before the first step, after every so many, and after the last one.

    What goes wrong the first time is raised; later it is logged, and training goes on (where several processes train,
    only if all of them know of it).

    Args:
        config: of `megaprompt probe`; its `backbone` is what reports call the model, its `out` holds a run for each
            step. All methods that leave the weights as they are can be used.
        tokenizer: of the model.
        every: steps of the optimizer.

    Raises:
        UsageError: a method would train the weights.
    """

    def __init__(self, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase, every: int) -> None:
        if training := [method for method in config.methods if "fine-tuning" in method]:
            raise UsageError(f"--methods {training[0]}: would train the weights of a model that is being trained")
        if every < 1:
            raise UsageError(f"every={every}: give a number of steps above 0")
        self._config, self._tokenizer, self._every = config, tokenizer, every
        self._done: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._probe(more["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step % self._every == 0:
            self._probe(more["model"], state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._probe(more["model"], state.global_step)

    def _probe(self, model: PreTrainedModel, step: int) -> None:
        """All processes of the training share the questions."""
        if step in self._done:
            return
        out = self._config.out / f"step-{step:07d}"
        config = dataclasses.replace(self._config, out=out, resume=(out / "config.yaml").is_file())
        world = World(device=model.device)
        if dist.is_initialized():
            world = World(dist.get_rank(), dist.get_world_size(), model.device)
        found = RunDirectory(out).read_results()
        try:
            with borrowed(model, self._tokenizer, config.backbone) as backbone:
                if not found.get("complete"):
                    probe(config, world, backbone)
                else:
                    _must_be_the_same(out, found, config, backbone)  # as after a training that is continued
        except (MegapromptError, OSError, torch.OutOfMemoryError) as error:
            told = isinstance(error, MegapromptError)  # to all processes alike
            if isinstance(error, Interrupted) or not self._done or (world.size > 1 and not told):
                raise
            logger.warning("step %d is not probed: %s", step, error)
        self._done.add(step)


def _must_be_the_same(out: Path, found: Mapping[str, Any], config: ProbeConfig, backbone: Backbone) -> None:
    """See that what was probed before was this.

    Raises:
        MegapromptError: it was another training, or another question.
    """
    before = dataclasses.replace(from_yaml(ProbeConfig, out / "config.yaml"), out=out, resume=config.resume)
    differs = {"weights": found["backbone"]["fingerprint"] != backbone.fingerprint, "options": before != config}
    if what := next((name for name, other in differs.items() if other), None):
        raise MegapromptError(f"{out}: holds a probe of other {what}; give another out, or delete it")
