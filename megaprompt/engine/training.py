"""Training: prompts of many relations, learned together through one frozen backbone.

A *step* gives every relation that is still active one optimizer step on its own batch of facts; it takes one or more
*passes* of the backbone, each over facts of many relations (see `packing`). The loss of a relation is the mean
cross-entropy over its batch, at the token before the object, over the whole vocabulary. The loss of a step is their
sum, and since no prompt occurs in another relation's queries, each relation gets exactly the gradient that it would
get alone. Its initial weights and data order depend only on (seed, relation, epoch), so it also *is* as it would be
alone, on any number of ranks.

The backbone never sees the prompt encoders, only their output, a matrix of a few vectors. Its gradient is all that
passes and ranks add up; each rank then runs it through its own replica of the encoders. So what is communicated is
[pseudo tokens, hidden size] however large the encoders are. With relation groups (see `distributed.schedule`) a rank
has only the encoders of its own group's relations, and shares gradients with the replicas of its group only.

Differences from the paper's code, on purpose: the backbone stays in evaluation mode (no dropout), so runs repeat and
packing is exact; the loss is taken at the output just before the object, for training and ranking alike; the test
split is read once, with the best prompts on dev.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megaprompt.backbone import Backbone
from megaprompt.distributed.launch import World
from megaprompt.distributed.loss_scale import NO_SCALING, LossScale
from megaprompt.engine.evaluation import metrics, predict
from megaprompt.engine.schedule import assign, my_passes, padded
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.prompt_encoder import EncoderKind, new_prompt_encoder
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Query
from megaprompt.seeds import seed_of
from megaprompt.tasks.task import Examples, Task

logger = logging.getLogger(__name__)


def new_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Adam:
    """Adam as the recipe has it."""
    return torch.optim.Adam(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def backward_passes(
    backbone: Backbone,
    prompts: Tensor | None,
    queries: Sequence[Query],
    objects: Sequence[int],
    weights: Tensor,
    backward: Callable[[Tensor, bool], None],
    *,
    world: World,
    everyone: World,
    size: PassSize,
) -> Tensor:
    """The losses [Q] of all queries, after running `backward` on their weighted sum, pass by pass.

    Args:
        prompts: prompt matrix that the queries' pseudo tokens index.
        weights: [Q] float64.
        backward: gets the weighted loss of each pass of this rank, and whether it is the last one.
        world: the ranks that share these queries.
        everyone: all ranks that hold the backbone together; they make the same number of passes.
    """
    losses = torch.zeros(len(queries), dtype=torch.float64)
    passes = padded(my_passes(queries, world, size), everyone)
    for number, indices in enumerate(passes, start=1):
        batch = pack([queries[i] for i in indices], size.row_tokens).to(backbone.device)
        logits = backbone(batch, prompts)
        gold = torch.tensor([objects[i] for i in indices], dtype=torch.int64, device=logits.device)
        rows = logits.index_select(0, batch.target_of_query)
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        loss = cross_entropy(rows, gold, reduction="none")
        backward((loss * weights[indices].to(loss)).sum(), number == len(passes))
        losses[indices] = loss.detach().double().cpu()
    return world.sum_(losses, "losses")


class Course:
    """Where one relation is in its training: place in the data, epochs, best score on dev, early stopping."""

    def __init__(self, task: Task, recipe: Recipe, seed: int) -> None:
        self.task, self.recipe, self.seed = task, recipe, seed
        self.skipped = 0  # steps whose gradients overflowed
        self.epoch = 0  # finished epochs
        self.cursor = 0  # facts of the current epoch that were used
        self.step = 0  # finished optimizer steps
        self.epoch_loss = 0.0  # sum over them
        self.best: dict[str, Any] = {"p_at_1": -1.0, "mrr": -1.0, "epoch": 0}
        self.improved_in = 0  # the last epoch with a better P@1
        self.active = recipe.max_epochs > 0

    def next_batch(self) -> list[int]:
        """Indices of the next training facts; the order is a function of (seed, relation, epoch)."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.task.relation, "epoch", self.epoch))
        order = torch.randperm(len(self.task.train), generator=generator)
        batch = order[self.cursor : self.cursor + self.recipe.batch_size].tolist()
        self.cursor += len(batch)
        return batch

    @property
    def learning_rate(self) -> float:
        return self.recipe.rate(len(self.task.train), self.epoch, self.step)

    @property
    def steps(self) -> int:
        return self.recipe.steps(len(self.task.train))

    @property
    def epoch_is_over(self) -> bool:
        return self.cursor >= len(self.task.train) or self.step >= self.steps

    def add_loss(self, losses: Tensor) -> str | None:
        """Take the losses of a batch; returns what is wrong with them, if anything."""
        loss = losses.mean().item()
        self.epoch_loss += loss * len(losses)
        if math.isfinite(loss):
            return None
        return (
            f"the loss of {self.task.relation} is {loss} in step {self.step + 1}; lower the learning rate (it is "
            f"{self.learning_rate:g}), or --dtype float32"
        )

    def end_epoch(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """Take the dev scores of the epoch that is over; returns the line for the log."""
        rate = self.learning_rate
        self.epoch += 1
        better = scores["p_at_1"] > self.best["p_at_1"]
        if better:
            self.improved_in = self.epoch
        # Among equal P@1, which are frequent on few facts, the better ranking is kept; only P@1 counts for patience.
        if (scores["p_at_1"], scores["mrr"]) > (self.best["p_at_1"], self.best["mrr"]):
            better = True
            self.best = {**scores, "epoch": self.epoch}
        line = {
            "relation": self.task.relation,
            "epoch": self.epoch,
            "train_loss": self.epoch_loss / self.cursor,
            "dev_p_at_1": scores["p_at_1"],
            "dev_mrr": scores["mrr"],
            "best": better,
            "learning_rate": rate,
            "skipped_steps": self.skipped,
        }
        self.cursor, self.epoch_loss = 0, 0.0
        stale = self.epoch - self.improved_in
        self.active = self.step < self.steps and stale < self.recipe.patience
        return line


class _Learner(Course):
    """One relation while its prompt is trained: its course, encoder, optimizer, and best prompts so far."""

    def __init__(
        self, task: Task, backbone: Backbone, kind: EncoderKind, recipe: Recipe, seed: int, scale: LossScale
    ) -> None:
        super().__init__(task, recipe, seed)
        self.best["prompts"] = None
        self.loss_scale = scale
        # Single precision whatever the backbone's, except that a double-precision backbone asks for the same.
        dtype = torch.float64 if backbone.model.dtype == torch.float64 else torch.float32
        self.encoder = new_prompt_encoder(
            task.num_pseudo_tokens,
            backbone.hidden_size,
            kind,
            seed=seed,
            relation=task.relation,
            near=backbone.embedding_statistics if recipe.start_near_embeddings else None,
            vectors=task.vectors,
            dtype=dtype,
        ).to(backbone.device)
        self.optimizer = new_optimizer(self.encoder.parameters(), recipe)

    def update(self) -> None:
        """One step of Adam on the gradients that the encoder's parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self, overflow: bool) -> None:
        """Take the step, or skip it if its gradients overflowed."""
        if overflow:
            self.optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
        else:
            self.update()
        self.loss_scale = self.loss_scale.after_step(overflow)
        self.step += 1

    def keep_best(self, prompts: Tensor) -> None:
        """Keep the prompts of the epoch that has just ended, if it was the best so far."""
        if self.best["epoch"] == self.epoch:
            self.best["prompts"] = prompts.detach().cpu().clone()

    def result(self) -> Learned:
        """The best prompts on dev."""
        dev = {name: value for name, value in self.best.items() if name not in ("epoch", "prompts")}
        return Learned(self.best["prompts"], self.epoch, self.best["epoch"], dev)

    _PROGRESS = ("epoch", "cursor", "step", "skipped", "epoch_loss", "best", "improved_in", "active")

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on exactly; without encoder and optimizer once they have done."""
        state = {name: getattr(self, name) for name in self._PROGRESS}
        state["loss_scale"] = dataclasses.asdict(self.loss_scale)
        if self.active:
            state |= {"encoder": self.encoder.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._PROGRESS:
            setattr(self, name, state[name])
        self.loss_scale = LossScale(**state["loss_scale"])
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
    should_save: Callable[[], bool] = lambda: False  # asked on each rank after each step; one True makes all save
    should_stop: Callable[[], bool] = lambda: False  # likewise; all save, and stop
    save: Callable[[], None] = lambda: None


class Interrupted(MegapromptError):
    """Training stopped because it was asked to; the checkpoint has everything up to there."""

    exit_code = 130


class Trainer:
    """Trains the prompts of several relations on one backbone.

    Args:
        size: how much one pass computes; it changes speed and memory, not results.
        seed: everything random follows from it and the relations' names.
        world: all ranks; they make this object and call its methods together.
        groups: into how many groups of ranks the relations are divided.
        loss_scale: with which every relation starts.

    Raises:
        MegapromptError: there is nothing to learn from, or nothing to learn.
        UsageError: the ranks cannot be divided into so many groups.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Sequence[Task],
        recipe: Recipe,
        *,
        encoder: EncoderKind = "lstm",
        seed: int = 0,
        size: PassSize,
        world: World,
        groups: int = 1,
        loss_scale: LossScale = NO_SCALING,
    ) -> None:
        for task in tasks:
            if not len(task.train) or not len(task.dev):
                raise MegapromptError(f"relation {task.relation} needs facts in both train and dev to learn a prompt")
            if not task.num_pseudo_tokens:
                raise MegapromptError(f"relation {task.relation}: its template has no pseudo tokens, nothing to learn")
        if groups > len(tasks):
            raise UsageError(f"--relation-groups {groups}: there are only {len(tasks)} relations; give at most that")
        self.backbone, self.size = backbone, size
        self.everyone, self.replicas = world, world.split(groups)
        self._batch_size = recipe.batch_size
        self._steps = {task.relation: recipe.steps(len(task.train)) for task in tasks}
        group_of = assign(list(self._steps.values()), groups)
        self.learners = [
            _Learner(task, backbone, encoder, recipe, seed, loss_scale)
            for task, group in zip(tasks, group_of, strict=True)
            if group == world.rank // self.replicas.size
        ]
        self.step = 0
        # Known on all ranks, of all relations: after how many steps those that are done have stopped.
        self.stopped_after: dict[str, int] = {} if recipe.max_epochs > 0 else dict.fromkeys(self._steps, 0)
        self._failure: str | None = None

    # ------------------------------------------------------------------------------------------------------- one step

    def _gather(self, picks: Sequence[tuple[_Learner, Examples, Sequence[int]]]) -> tuple[list[Query], list[int]]:
        """Queries and objects of several relations, pseudo tokens renumbered to rows of their joint prompt matrix."""
        queries, objects, offset = [], [], 0
        for learner, examples, indices in picks:
            for i in indices:
                query = examples.queries[i]
                queries.append(query._replace(tokens=tuple(t if t >= 0 else t - offset for t in query.tokens)))
                objects.append(examples.objects[i])
            offset += learner.task.num_pseudo_tokens
        return queries, objects

    def train_step(self) -> list[_Learner]:
        """One optimizer step for every active relation; returns this group's relations whose epoch is over."""
        active = [learner for learner in self.learners if learner.active]
        picks = [(learner, learner.task.train, learner.next_batch()) for learner in active]
        queries, objects = self._gather(picks)
        weights = torch.tensor(
            [learner.loss_scale.scale / len(batch) for learner, _, batch in picks for _ in batch], dtype=torch.float64
        )
        if active:
            outputs = torch.cat([learner.encoder() for learner in active])
            prompts = outputs.detach().requires_grad_()
        else:  # this group has finished, but its part of the backbone is still needed
            prompts = torch.zeros(1, self.backbone.hidden_size, device=self.backbone.device, requires_grad=True)
        losses = backward_passes(
            self.backbone,
            prompts,
            queries,
            objects,
            weights,
            lambda loss, last: loss.backward(),
            world=self.replicas,
            everyone=self.everyone,
            size=self.size,
        )
        self.step += 1
        if not active:
            return []
        gradient = prompts.grad
        assert gradient is not None  # even of a rank without facts: zeros, from its empty passes
        parts = self.replicas.sum_(gradient, "gradients").split([learner.task.num_pseudo_tokens for learner in active])
        overflows = []
        for learner, part in zip(active, parts, strict=True):
            overflows.append(learner.loss_scale != NO_SCALING and not part.isfinite().all())
            part.div_(learner.loss_scale.scale)
            if overflows[-1]:
                part.zero_()
        outputs.backward(gradient)
        start = 0
        for (learner, _, batch), overflow in zip(picks, overflows, strict=True):
            self._failure = learner.add_loss(losses[start : start + len(batch)]) or self._failure
            start += len(batch)
            learner.end_step(overflow)
            if overflow:
                logger.info(
                    "%s: skipped step %d, gradients overflowed; the loss scale is now %g",
                    learner.task.relation,
                    self.step,
                    learner.loss_scale.scale,
                )
        return [learner for learner in active if learner.epoch_is_over]

    @torch.no_grad()
    def _end_epochs(self, learners: Sequence[_Learner], allowed: Tensor) -> list[dict[str, Any]]:
        """Score this group's relations whose epoch is over on dev; returns the log lines of all groups."""
        picks = [(learner, learner.task.dev, range(len(learner.task.dev))) for learner in learners]
        queries, objects = self._gather(picks)
        outputs = [learner.encoder() for learner in learners]
        rank = predict(
            self.backbone,
            queries,
            objects,
            torch.cat(outputs) if outputs else None,
            allowed=allowed,
            world=self.replicas,
            size=self.size,
            everyone=self.everyone,
        ).rank
        parts = rank.split([len(learner.task.dev) for learner in learners])
        lines = []
        for learner, part, prompts in zip(learners, parts, outputs, strict=True):
            line = learner.end_epoch(metrics(part))
            learner.keep_best(prompts)
            lines.append({"time": time.time(), "step": self.step, **line, "stopped": not learner.active})
        everywhere = self.everyone.gather(lines if self.replicas.rank == 0 else [])
        lines = sorted(
            (line for part in everywhere for line in part), key=lambda line: list(self._steps).index(line["relation"])
        )
        self.stopped_after |= {line["relation"]: self.step for line in lines if line["stopped"]}
        return lines

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self, allowed: Tensor, hooks: Hooks) -> dict[str, Learned]:
        """Train until every relation has stopped; returns the best prompts of each on dev, on every rank.

        Args:
            allowed: bool [vocabulary], the tokens that count as answers on dev.

        Raises:
            Interrupted: `hooks.should_stop` said so on some rank.
            MegapromptError: a loss is not a number.
        """
        while len(self.stopped_after) < len(self._steps):
            ended = self.train_step()
            signs = [len(ended), self._failure is not None, hooks.should_stop(), hooks.should_save()]
            some_ended, failed, stopping, saving = self.everyone.max_(
                torch.tensor(signs, dtype=torch.int64), "schedule"
            )
            if failed:
                raise MegapromptError(next(why for why in self.everyone.gather(self._failure) if why))
            for line in self._end_epochs(ended, allowed) if some_ended else ():
                hooks.log(line)
            hooks.progress(*self.facts(), self.step)
            if saving or stopping:
                hooks.save()
            if stopping:
                raise Interrupted(f"interrupted after step {self.step}; continue with --resume")
        own = {learner.task.relation: learner.result() for learner in self.learners}
        found = {name: result for part in self.everyone.gather(own) for name, result in part.items()}
        return {name: found[name] for name in self._steps}

    def facts(self) -> tuple[int, int]:
        """Training facts used so far, and in all if no other relation stops early (last batches counted as full)."""
        ends = [self.stopped_after.get(name, steps) for name, steps in self._steps.items()]
        return sum(min(self.step, end) for end in ends) * self._batch_size, sum(ends) * self._batch_size

    def states(self) -> dict[str, dict[str, Any]]:
        """What each relation of this group needs to go on exactly; empty on all but one replica of the group."""
        if self.replicas.rank != 0:
            return {}
        return {learner.task.relation: learner.state() for learner in self.learners}

    def restore(self, step: int, stopped_after: Mapping[str, int], read: Callable[[str], dict[str, Any]]) -> None:
        """Go on after `step` steps, on any number of ranks and groups; `read` gives the state of one relation."""
        self.step, self.stopped_after = step, dict(stopped_after)
        for learner in self.learners:
            learner.restore(read(learner.task.relation))
