"""One task while it is learned: its place in the data, its epochs, its best score on dev, and what is trained for it.

The initial weights and the order of the data depend on (seed, task, epoch) only, so that a task is learned as it would
be alone, whatever is learned beside it, and on any number of ranks. Several candidates of one task, which are learned
to take the best, differ in template, start or recipe, and in nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megaprompt.backbone import Backbone
from megaprompt.distributed.loss_scale import LossScale
from megaprompt.engine.best import Best, Learned, Prompt
from megaprompt.errors import MegapromptError
from megaprompt.prompting.prompt_encoder import EncoderKind, PromptEncoder, new_prompt_encoder
from megaprompt.prompting.recipe import Recipe
from megaprompt.seeds import seed_of
from megaprompt.tasks.objective import Objective
from megaprompt.tasks.task import Instance


@dataclass(frozen=True)
class TrainingSet:
    """What one task, or one candidate of it, is learned from. Its queries number their pseudo tokens from 0.

    Args:
        vectors: [pseudo tokens, hidden size] to start with.
        candidate: its name, if the task has several.
        contender: what competes with others of the task, the candidate if empty; those of one are compared together.
        recipe: another than that of all.
        stays: whether it goes on to its end however it compares with the other candidates.

    Raises:
        MegapromptError: there is nothing to learn from.
    """

    task: str
    objective: Objective
    num_pseudo_tokens: int
    train: Sequence[Instance] = field(repr=False)
    dev: Sequence[Instance] = field(repr=False)
    vectors: Tensor | None = field(default=None, repr=False)
    candidate: str = ""
    contender: str = ""
    recipe: Recipe | None = None
    stays: bool = True

    @property
    def name(self) -> str:
        """Of the task, and of the candidate if there are several."""
        return name_of(self.about)

    @property
    def about(self) -> dict[str, str]:
        """The same for the log."""
        return {"relation": self.task, **({"candidate": self.candidate} if self.candidate else {})}

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.dev):
            items = self.objective.items
            raise MegapromptError(f"relation {self.task} needs {items} in both train and dev to learn from")


def name_of(about: Mapping[str, Any]) -> str:
    """The name of a training set, from `about` or a line of the log."""
    return f"{about['relation']}.{about['candidate']}" if "candidate" in about else str(about["relation"])


def new_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Adam:
    """Adam as the recipe has it. If its weight decay is decoupled, biases and norms (vectors) have none."""
    if not recipe.decoupled:
        return torch.optim.Adam(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) < 2].append(parameter)  # of ZeRO-3's, as a whole
    decays = zip(groups, (recipe.weight_decay, 0.0), strict=True)
    found = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    return torch.optim.AdamW(found, recipe.learning_rate, fused=True)


class Learner:
    """One task while it is learned. Modules may be missing: a task may have no pseudo tokens, or no head."""

    def __init__(
        self,
        data: TrainingSet,
        recipe: Recipe,
        seed: int,
        *,
        backbone: Backbone,
        encoder: EncoderKind,
        loss_scale: LossScale,
    ) -> None:
        recipe = data.recipe or recipe
        self.data, self.recipe, self.seed, self.loss_scale = data, recipe, seed, loss_scale
        self.skipped = 0  # steps whose gradients overflowed
        self.epoch = 0  # finished epochs
        self.cursor = 0  # instances of the current epoch that were used
        self.step = 0  # finished optimizer steps
        self.loss, self.seen = 0.0, 0  # sum of losses since dev was scored, and over how many instances
        self.best = Best.of(data.objective, len(data.dev))
        self.diverged: dict[str, Any] | None = None
        self.dropped: int | None = None
        self.active = recipe.max_epochs > 0
        self.encoder = _new_encoder(data, recipe, seed, backbone, encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, data.task, "head"))
            head = data.objective.new_head(backbone.hidden_size)
        self.head = None if head is None else head.to(backbone.device)
        self.parameters = [p for module in (self.encoder, self.head) if module is not None for p in module.parameters()]
        self.optimizer = new_optimizer(self.parameters, recipe) if self.parameters else None

    # -------------------------------------------------------------------------------------------------------- the data

    def next_batch(self) -> list[int]:
        """Indices of the next training instances; the order is a function of (seed, task, epoch)."""
        if self.epoch_is_over:
            self.epoch, self.cursor = self.epoch + 1, 0
        order = _order(self.data, seed_of(self.seed, self.data.task, "epoch", self.epoch), self.recipe.grouped)
        batch = order[self.cursor : self.cursor + self.recipe.batch_size]
        self.cursor += len(batch)
        return batch

    def rate(self, recipe: Recipe | None = None) -> float:
        """The learning rate of the next step, or that of another recipe."""
        return (recipe or self.recipe).rate(len(self.data.train), self.epoch, self.step)

    @property
    def steps(self) -> int:
        return self.recipe.steps(len(self.data.train))

    @property
    def epoch_is_over(self) -> bool:
        return self.cursor >= self.recipe.used(len(self.data.train))

    @property
    def dev_is_due(self) -> bool:
        """Whether it is time to score dev."""
        every = self.recipe.dev_every
        due = self.epoch_is_over if every is None else self.step % every == 0
        return self.active and (due or self.step >= self.steps)

    # ---------------------------------------------------------------------------------------------------------- a step

    def end_step(self, losses: Tensor, overflow: bool) -> None:
        """Take the losses [batch] of a step, and the step on the parameters' gradients, unless they overflowed."""
        self.loss += losses.mean().item() * len(losses)
        self.seen += len(losses)
        self.skipped += overflow
        if not overflow:
            self.update()
        elif self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale = self.loss_scale.after_step(overflow)
        self.step += 1

    def update(self) -> None:
        """One step of Adam."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def retire(self, reason: str) -> dict[str, Any]:
        """Stop, since there is no way to go on; returns the line for the log."""
        advice = f"lower the learning rate (it is {self.rate():g}), or --dtype float32"
        self.diverged = {"step": self.step + 1, "reason": f"{reason} in step {self.step + 1}; {advice}"}
        self.active = False
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return {**self.data.about, "diverged": self.diverged["reason"], "stopped": True}

    def drop(self) -> None:
        """Stop, since other candidates are better."""
        self.dropped, self.active = self.step, False

    def take_dev(self, scores: Mapping[str, float], keep: Callable[[], Any]) -> dict[str, Any]:
        """Take scores on dev, and what `keep` gives if they are the best so far; returns the line for the log."""
        epoch = self.epoch + 1  # the one that it is in, or that is just over
        better = self.best.take(scores, epoch, keep, self.recipe.ties)
        line = {
            **self.data.about,
            "epoch": epoch,
            "train_loss": self.loss / self.seen,
            **{f"dev_{name}": scores[name] for name in self.data.objective.selects},
            "best": better,
            "learning_rate": self.rate(),
            "skipped_steps": self.skipped,
        }
        self.loss, self.seen = 0.0, 0
        self.active = self.step < self.steps and self.best.stale < self.recipe.patience
        return line | {"stopped": not self.active}

    def prompt(self) -> Prompt:
        """What has been learned so far, on the CPU."""
        vectors = torch.zeros(0, 0) if self.encoder is None else self.encoder().detach().cpu().clone()
        head = {} if self.head is None else self.head.state_dict()
        return Prompt(vectors, {name: value.detach().cpu().clone() for name, value in head.items()})

    def result(self) -> Learned:
        """What was best on dev."""
        epochs, best = self.epoch + (self.cursor > 0), self.best  # also one that was not finished
        return Learned(best.kept, epochs, best.epoch, best.scores, self.diverged, self.dropped)

    # --------------------------------------------------------------------------------------------- stop, and go on

    _PROGRESS = ("epoch", "cursor", "step", "skipped", "loss", "seen", "active", "diverged", "dropped")

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on exactly; without modules and optimizer once it has stopped."""
        state = {name: getattr(self, name) for name in self._PROGRESS}
        state["best"] = self.best.state()
        state["loss_scale"] = dataclasses.asdict(self.loss_scale)
        if self.active and self.optimizer is not None:
            modules = {"encoder": self.encoder, "head": self.head}
            state |= {name: module.state_dict() for name, module in modules.items() if module is not None}
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for name in self._PROGRESS:
            setattr(self, name, state[name])
        self.best.restore(state["best"])
        self.loss_scale = LossScale(**state["loss_scale"])
        for name, module in (("encoder", self.encoder), ("head", self.head), ("optimizer", self.optimizer)):
            if self.active and module is not None:
                module.load_state_dict(state[name])


def _order(data: TrainingSet, seed: int, grouped: bool) -> list[int]:
    """The training instances of an epoch; if grouped, each group where its first instance would be."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()
    if not grouped:
        return order
    groups: dict[Any, list[int]] = {}
    for i in order:
        groups.setdefault(i if data.train[i].group is None else data.train[i].group, []).append(i)
    return [i for group in groups.values() for i in group]


def _new_encoder(
    data: TrainingSet, recipe: Recipe, seed: int, backbone: Backbone, kind: EncoderKind
) -> PromptEncoder | None:
    if not data.num_pseudo_tokens:
        return None
    # Single precision whatever the backbone's, except that a double-precision backbone asks for the same.
    dtype = torch.float64 if backbone.model.dtype == torch.float64 else torch.float32
    return new_prompt_encoder(
        data.num_pseudo_tokens,
        backbone.embedding_size,
        kind,
        seed=seed,
        relation=data.task,
        near=backbone.embedding_statistics if recipe.start_near_embeddings else None,
        vectors=data.vectors,
        dtype=dtype,
    ).to(backbone.device)
