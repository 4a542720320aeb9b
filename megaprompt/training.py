"""Training: prompts of many relations, learned together through one frozen backbone.

A *step* gives every relation that is still active one optimizer step on its own batch of facts; it takes one or more
*passes* of the backbone, each over facts of many relations (see `packing`). The loss of a relation is the mean
cross-entropy over its batch, at the token before the object, over the whole vocabulary. The loss of a step is their
sum, and since no prompt occurs in another relation's queries, each relation gets exactly the gradient that it would
get alone. Its initial weights and data order depend only on (seed, relation, epoch), so it also *is* as it would be
alone, on any number of ranks.

The backbone never sees the prompt encoders, only their output, a matrix of a few vectors. Its gradient is all that
passes and ranks add up; each rank then runs it through its own replica of the encoders. So what is communicated is
[pseudo tokens, hidden size] however large the encoders are.

Differences from the paper's code, on purpose: the backbone stays in evaluation mode (no dropout), so runs repeat and
packing is exact; the loss is taken at the output just before the object, for training and ranking alike; the test
split is read once, with the best prompts on dev.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaprompt.backbone import CausalBackbone
from megaprompt.distributed.launch import World
from megaprompt.distributed.schedule import my_passes
from megaprompt.errors import MegapromptError
from megaprompt.evaluation import metrics, predict
from megaprompt.packing import PassSize, pack
from megaprompt.prompt_encoder import EncoderKind, new_prompt_encoder, seed_of
from megaprompt.template import Query


@dataclass(frozen=True)
class Recipe:
    """How the prompts of one relation are optimized, with Adam."""

    learning_rate: float
    weight_decay: float
    decay: float  # the learning rate is multiplied by this after every epoch
    batch_size: int
    max_epochs: int
    patience: int  # stop after so many epochs without a better P@1 on dev
    max_steps: int | None = None  # if given, stop after so many steps, with the learning rate falling linearly to 0
    warmup_steps: int = 0  # over which the learning rate rises linearly
    start_near_embeddings: bool = False  # initial vectors close to the backbone's mean token embedding

    def steps(self, facts: int) -> int:
        """Optimizer steps for a relation with so many training facts, if it does not stop early."""
        steps = self.max_epochs * math.ceil(facts / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rate(self, facts: int, epoch: int, step: int) -> float:
        """The learning rate of the next step, after so many epochs and steps."""
        falling = 1.0 if self.max_steps is None else 1 - step / self.steps(facts)
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * self.decay**epoch * min(rising, falling)


RECIPES = {
    "paper": Recipe(1e-5, 5e-4, 0.98, batch_size=8, max_epochs=100, patience=20),
    "fast": Recipe(
        5e-4,
        5e-4,
        1.0,
        batch_size=8,
        max_epochs=100,
        patience=20,
        max_steps=150,
        warmup_steps=10,
        start_near_embeddings=True,
    ),
}
"""`paper` is what the code of the paper sets; `fast` was chosen on dev (see the README)."""


@dataclass(frozen=True)
class Examples:
    """Queries and the token ids of their objects."""

    queries: list[Query]
    objects: list[int]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Task:
    """One relation to learn. Its queries number their pseudo tokens from 0."""

    relation: str
    num_pseudo_tokens: int
    train: Examples
    dev: Examples


class _Learner:
    """One relation while it is trained: its encoder, optimizer, place in the data, and best prompts so far."""

    def __init__(self, task: Task, backbone: CausalBackbone, kind: EncoderKind, recipe: Recipe, seed: int) -> None:
        self.task, self.recipe, self.seed = task, recipe, seed
        # Single precision whatever the backbone's, except that a double-precision backbone asks for the same.
        dtype = torch.float64 if backbone.model.dtype == torch.float64 else torch.float32
        self.encoder = new_prompt_encoder(
            task.num_pseudo_tokens,
            backbone.hidden_size,
            kind,
            seed=seed,
            relation=task.relation,
            near=backbone.embedding_statistics if recipe.start_near_embeddings else None,
            dtype=dtype,
        ).to(backbone.device)
        self.optimizer = torch.optim.Adam(
            self.encoder.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.epoch = 0  # finished epochs
        self.cursor = 0  # facts of the current epoch that were used
        self.step = 0  # finished optimizer steps
        self.epoch_loss = 0.0  # sum over them
        self.best: dict[str, Any] = {"p_at_1": -1.0, "mrr": -1.0, "epoch": 0, "prompts": None}
        self.improved_in = 0  # the last epoch with a better P@1
        self.active = recipe.max_epochs > 0

    def next_batch(self) -> list[int]:
        """Indices of the next training facts; the order is a function of (seed, relation, epoch)."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.task.relation, "epoch", self.epoch))
        order = torch.randperm(len(self.task.train), generator=generator)
        batch = order[self.cursor : self.cursor + self.recipe.batch_size].tolist()
        self.cursor += len(batch)
        return batch

    def update(self) -> None:
        """One step of Adam on the gradients that the encoder's parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @property
    def learning_rate(self) -> float:
        return self.recipe.rate(len(self.task.train), self.epoch, self.step)

    @property
    def steps(self) -> int:
        return self.recipe.steps(len(self.task.train))

    @property
    def epoch_is_over(self) -> bool:
        return self.cursor >= len(self.task.train) or self.step >= self.steps

    def end_epoch(self, scores: Mapping[str, float], prompts: Tensor) -> dict[str, Any]:
        """Take the dev scores of the epoch that is over; returns the line for the log."""
        rate = self.learning_rate
        self.epoch += 1
        better = scores["p_at_1"] > self.best["p_at_1"]
        if better:
            self.improved_in = self.epoch
        # Among equal P@1, which are frequent on few facts, the better ranking is kept; only P@1 counts for patience.
        if (scores["p_at_1"], scores["mrr"]) > (self.best["p_at_1"], self.best["mrr"]):
            better = True
            self.best = {**scores, "epoch": self.epoch, "prompts": prompts.detach().cpu().clone()}
        line = {
            "relation": self.task.relation,
            "epoch": self.epoch,
            "train_loss": self.epoch_loss / self.cursor,
            "dev_p_at_1": scores["p_at_1"],
            "dev_mrr": scores["mrr"],
            "best": better,
            "learning_rate": rate,
        }
        self.cursor, self.epoch_loss = 0, 0.0
        stale = self.epoch - self.improved_in
        self.active = self.step < self.steps and stale < self.recipe.patience
        return line

    _PROGRESS = ("epoch", "cursor", "step", "epoch_loss", "best", "improved_in", "active")

    def state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self._PROGRESS}
        if self.active:
            state |= {"encoder": self.encoder.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._PROGRESS:
            setattr(self, name, state[name])
        if self.active:
            self.encoder.load_state_dict(state["encoder"])
            self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class Learned:
    """What training found for one relation."""

    prompts: Tensor  # [pseudo tokens, hidden size], best on dev
    epochs: int  # that were trained
    best_epoch: int
    dev: dict[str, float]  # scores on dev of these prompts


@dataclass
class Hooks:
    """What a caller may want to do while training goes on. All run on every rank, at the same steps."""

    log: Callable[[dict[str, Any]], None] = lambda line: None  # one line per relation and epoch
    progress: Callable[[int, int, int], None] = lambda done, total, step: None  # facts done, facts at most, steps
    should_stop: Callable[[], bool] = lambda: False  # asked on each rank; one True stops all, after a checkpoint
    after_step: Callable[[bool], None] = lambda stopping: None  # the place to save the trainer's state


class Interrupted(MegapromptError):
    """Training stopped because it was asked to; the checkpoint has everything up to there."""

    exit_code = 130


class Trainer:
    """Trains the prompts of several relations on one backbone.

    Args:
        size: how much one pass computes; it changes speed and memory, not results.
        seed: everything random follows from it and the relations' names.
    """

    def __init__(
        self,
        backbone: CausalBackbone,
        tasks: Sequence[Task],
        recipe: Recipe,
        *,
        encoder: EncoderKind = "lstm",
        seed: int = 0,
        size: PassSize,
        world: World,
    ) -> None:
        for task in tasks:
            if not len(task.train) or not len(task.dev):
                raise MegapromptError(f"relation {task.relation} needs facts in both train and dev to learn a prompt")
            if not task.num_pseudo_tokens:
                raise MegapromptError(f"relation {task.relation}: its template has no pseudo tokens, nothing to learn")
        self.backbone, self.size, self.world = backbone, size, world
        self.learners = [_Learner(task, backbone, encoder, recipe, seed) for task in tasks]
        self.step = 0

    # ------------------------------------------------------------------------------------------------------- one step

    def _gather(self, picks: Sequence[tuple[_Learner, Examples, Sequence[int]]]) -> tuple[list[Query], list[int]]:
        """Queries and objects of several relations, pseudo tokens renumbered to rows of their joint prompt matrix."""
        queries, objects, offset = [], [], 0
        for learner, examples, indices in picks:
            for i in indices:
                tokens, target = examples.queries[i]
                queries.append(Query(tuple(t if t >= 0 else t - offset for t in tokens), target))
                objects.append(examples.objects[i])
            offset += learner.task.num_pseudo_tokens
        return queries, objects

    def _pass_losses(self, prompts: Tensor, queries: list[Query], objects: list[int], weights: Tensor) -> Tensor:
        """The losses [Q] of the queries, summed over ranks; `prompts.grad` gets the gradient of their weighted sum."""
        losses = torch.zeros(len(queries), dtype=torch.float64)
        for indices in my_passes(queries, self.world, self.size):
            batch = pack([queries[i] for i in indices], self.size.row_tokens).to(prompts.device)
            logits = self.backbone(batch, prompts)
            gold = torch.tensor([objects[i] for i in indices], dtype=torch.int64, device=prompts.device)
            rows = logits.index_select(0, batch.target_of_query)
            if rows.dtype in (torch.float16, torch.bfloat16):
                rows = rows.float()
            loss = cross_entropy(rows, gold, reduction="none")
            (loss * weights[indices].to(loss)).sum().backward()
            losses[indices] = loss.detach().double().cpu()
        return self.world.sum_(losses)

    def train_step(self) -> list[_Learner]:
        """One optimizer step for every active relation; returns those whose epoch is over.

        Raises:
            MegapromptError: a loss is not a number.
        """
        active = [learner for learner in self.learners if learner.active]
        picks = [(learner, learner.task.train, learner.next_batch()) for learner in active]
        queries, objects = self._gather(picks)
        weights = torch.cat([torch.full((len(batch),), 1 / len(batch), dtype=torch.float64) for *_, batch in picks])
        outputs = torch.cat([learner.encoder() for learner in active])
        prompts = outputs.detach().requires_grad_()
        losses = self._pass_losses(prompts, queries, objects, weights)
        self.step += 1
        assert prompts.grad is not None  # even of a rank without facts: zeros, from its empty passes
        outputs.backward(self.world.sum_(prompts.grad))
        start = 0
        for learner, _, batch in picks:
            loss = losses[start : start + len(batch)].sum().item()
            start += len(batch)
            if not math.isfinite(loss):
                raise MegapromptError(
                    f"the loss of {learner.task.relation} is {loss} in step {self.step}; lower --learning-rate "
                    f"(it is {learner.learning_rate:g}), or use --dtype float32"
                )
            learner.epoch_loss += loss
            learner.update()
        return [learner for learner in active if learner.epoch_is_over]

    @torch.no_grad()
    def _evaluate(self, learners: Sequence[_Learner]) -> list[dict[str, float]]:
        """Dev scores with the current prompts."""
        picks = [(learner, learner.task.dev, range(len(learner.task.dev))) for learner in learners]
        queries, objects = self._gather(picks)
        prompts = torch.cat([learner.encoder() for learner in learners])
        rank = predict(
            self.backbone, queries, objects, prompts, allowed=self._allowed, world=self.world, size=self.size
        ).rank
        return [metrics(part) for part in rank.split([len(learner.task.dev) for learner in learners])]

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self, allowed: Tensor, hooks: Hooks) -> dict[str, Learned]:
        """Train until every relation has stopped; returns the best prompts of each on dev.

        Args:
            allowed: bool [vocabulary], the tokens that count as answers on dev.

        Raises:
            Interrupted: `hooks.should_stop` said so on some rank.
        """
        self._allowed = allowed
        while any(learner.active for learner in self.learners):
            ended = self.train_step()
            if ended:
                for learner, scores in zip(ended, self._evaluate(ended), strict=True):
                    with torch.no_grad():
                        line = learner.end_epoch(scores, learner.encoder())
                    hooks.log({"time": time.time(), "step": self.step, **line})
            done, total = self.facts()
            hooks.progress(done, total, self.step)
            stopping = bool(self.world.sum_(torch.tensor(float(hooks.should_stop()))) > 0)
            hooks.after_step(stopping)
            if stopping:
                raise Interrupted(f"interrupted after step {self.step}; continue with --resume")
        return {
            learner.task.relation: Learned(
                learner.best["prompts"],
                learner.epoch,
                learner.best["epoch"],
                {name: value for name, value in learner.best.items() if name not in ("epoch", "prompts")},
            )
            for learner in self.learners
        }

    def facts(self) -> tuple[int, int]:
        """Training facts used so far, and in all if no active relation stops early (last batches counted as full)."""
        done = total = 0
        for learner in self.learners:
            done += learner.step * learner.recipe.batch_size
            total += (learner.steps if learner.active else learner.step) * learner.recipe.batch_size
        return done, total

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `load_state_dict` needs to go on exactly."""
        return {"step": self.step, "learners": {learner.task.relation: learner.state() for learner in self.learners}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step = state["step"]
        for learner in self.learners:
            learner.restore(state["learners"][learner.task.relation])
