"""The loop: prompts, heads or weights of one or many tasks, learned together through one backbone.

A *step* (see `step`) gives every task that is still active one optimizer step on its own batch; it takes one or more
*passes* of the backbone (see `passes`), each over instances of many tasks. With relation groups (see `schedule`) a rank
has only the encoders of its own group's tasks, and shares gradients with the replicas of its group only.

Differences from the paper's code, on purpose: the backbone stays in evaluation mode (no dropout), so runs repeat and
packing is exact, unless its weights are trained by a recipe with dropout, which depends on the size of passes; the loss
is taken at the output just before the answer, for training and ranking alike; the test split is read with what was best
on dev, only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaprompt.backbone import Backbone
from megaprompt.distributed.loss_scale import NO_SCALING, LossScale
from megaprompt.distributed.world import World
from megaprompt.engine.halving import Halving
from megaprompt.engine.learner import Learned, Learner, Prompt, TrainingSet, name_of
from megaprompt.engine.passes import Workplace, with_trunks
from megaprompt.engine.schedule import assign
from megaprompt.engine.step import score_dev, train_step
from megaprompt.engine.weights import Weights
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.prompting.recipe import Recipe

logger = logging.getLogger(__name__)

_WEIGHTS = "weights"  # beside the names of tasks


@dataclass
class Hooks:
    """What a caller may want to do while training goes on. All run on every rank, at the same steps."""

    log: Callable[[dict[str, Any]], None] = lambda line: None  # one line per task and epoch
    progress: Callable[[int, int, int], None] = lambda done, total, step: None  # instances done, at most, steps
    should_save: Callable[[], bool] = lambda: False  # asked on each rank after each step; one True makes all save
    should_stop: Callable[[], bool] = lambda: False  # likewise; all save, and stop
    save: Callable[[bool], None] = lambda stopping: None  # may go on writing, unless it stops
    is_writing: Callable[[], bool] = lambda: False  # asked after each step, too
    written: Callable[[], None] = lambda: None  # after a step at which no rank is writing


class Interrupted(MegapromptError):
    """Training stopped because it was asked to; the checkpoint has everything up to there."""

    exit_code = 130


class Trainer:
    """Trains several tasks on one backbone.

    Args:
        size: how much one pass computes; it changes speed and memory, not results.
        seed: everything random follows from it and the tasks' names.
        world: all ranks; they make this object and call its methods together.
        groups: into how many groups of ranks the tasks are divided.
        loss_scale: with which every task starts.
        rungs: after which steps how many candidates of a task go on (see `halving`).
        weights: the backbone's weights, if they are trained too, for one task alone.
        keep: what is wanted of a learner that is the best so far on dev; its prompt, if not given.
        trunk_bytes: memory of each rank for keys and values of constant text (see `trunks`); a sixteenth of what the
            rank has, if not given. It changes speed, not results.

    Raises:
        MegapromptError: there is nothing to learn.
        UsageError: the ranks cannot be divided into so many groups.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Sequence[TrainingSet],
        recipe: Recipe,
        *,
        encoder: EncoderKind = "lstm",
        seed: int = 0,
        size: PassSize,
        world: World,
        groups: int = 1,
        loss_scale: LossScale = NO_SCALING,
        rungs: Mapping[int, int] | None = None,
        weights: Weights | None = None,
        keep: Callable[[Learner], Prompt] = Learner.prompt,
        trunk_bytes: int | None = None,
    ) -> None:
        if groups > len(data):
            raise UsageError(f"--relation-groups {groups}: there are only {len(data)} relations; give at most that")
        assert weights is None or len(data) == 1
        self.backbone, self.weights, self._keep, self._batch_size = backbone, weights, keep, recipe.batch_size
        self.at = Workplace(backbone, size, world.split(groups), world, data[0].objective.reads)
        self._halving = Halving({each.name: each for each in data}, rungs or {})
        self._steps = {each.name: (each.recipe or recipe).steps(len(each.train)) for each in data}
        mine = assign(list(self._steps.values()), groups)
        own = [each for each, group in zip(data, mine, strict=True) if group == world.rank // self.at.world.size]
        own = with_trunks(self.at, own, trunk_bytes)
        self.learners = [
            Learner(each, recipe, seed, backbone=backbone, encoder=encoder, loss_scale=loss_scale) for each in own
        ]
        self._saved: dict[str, Learner | Weights] = {each.data.name: each for each in self.learners}
        if weights is not None:
            self._saved[_WEIGHTS] = weights
        if weights is None and (idle := [each.data.task for each in self.learners if not each.parameters]):
            raise MegapromptError(f"relation {idle[0]}: its template has no pseudo tokens, nothing to learn")
        self.step = 0
        # Known on all ranks, of all tasks and candidates: after how many steps those that are done have stopped.
        self.stopped_after: dict[str, int] = {} if recipe.max_epochs > 0 else dict.fromkeys(self._steps, 0)

    def train_step(self) -> list[dict[str, Any]]:
        """One optimizer step for every active task; returns log lines of this group's tasks that had to be retired."""
        self.step += 1
        return train_step(self.at, [each for each in self.learners if each.active], self.weights, self.step)

    def _share(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Log lines of all groups, in the order of the tasks."""
        everywhere = self.at.everyone.gather(lines if self.at.world.rank == 0 else [])
        order = list(self._steps)
        shared = sorted((line for part in everywhere for line in part), key=lambda line: order.index(name_of(line)))
        self._halving.see(shared)
        self.stopped_after |= {name_of(line): self.step for line in shared if line["stopped"]}
        return shared

    def _drop(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Stop candidates; returns the log lines, on all ranks."""
        self.stopped_after |= dict.fromkeys(names, self.step)
        for learner in self.learners:
            if learner.data.name in names:
                learner.drop()
        return [self._halving.line(name, self.step) for name in names]

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self, hooks: Hooks) -> dict[str, Learned]:
        """Train until every task has stopped; returns what was best of each on dev, on every rank.

        Raises:
            Interrupted: `hooks.should_stop` said so on some rank.
        """
        while len(self.stopped_after) < len(self._steps):
            retired = self.train_step()
            ended = any(learner.dev_is_due for learner in self.learners)
            signs = [ended, bool(retired), hooks.should_stop(), hooks.should_save(), hooks.is_writing()]
            some_ended, some_retired, stopping, saving, writing = self.at.everyone.max_(
                torch.tensor(signs, dtype=torch.int64), "schedule"
            )
            if some_retired:
                for line in self._share(retired):
                    logger.warning("%s is retired: %s", line["relation"], line["diverged"])
                    hooks.log(line)
            if some_ended:
                due = [learner for learner in self.learners if learner.dev_is_due]
                for line in self._share(score_dev(self.at, due, self._keep, self.step)):
                    hooks.log(line)
            for line in self._drop(self._halving.weak(self.step, self.stopped_after)):
                hooks.log(line)
            hooks.progress(*self.progress(), self.step)
            if not writing:
                hooks.written()
            if saving or stopping:
                hooks.save(bool(stopping))
            if stopping:
                raise Interrupted(f"interrupted after step {self.step}; continue with --resume")
        self.at.trunks.known.clear()
        own = {each.data.name: each.result() for each in self.learners if self.at.world.rank == 0}
        found = {name: result for part in self.at.everyone.gather(own) for name, result in part.items()}
        return {name: found[name] for name in self._steps}

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks."""
        return list(dict.fromkeys(each.task for each in self._halving.data.values()))

    def progress(self) -> tuple[int, int]:
        """Training instances used so far, and in all if no other task stops early (last batches counted as full)."""
        ends = [self.stopped_after.get(name, steps) for name, steps in self._steps.items()]
        return sum(min(self.step, end) for end in ends) * self._batch_size, sum(ends) * self._batch_size

    @property
    def can_be_saved(self) -> bool:
        """Whether `states` has everything: weights that are trained are whole, and so is the copy of the best."""
        if self.weights is None:
            return True
        best = self.learners[0].best.kept
        return not self.weights.sharded and (best is None or best.weights is not None)

    def states(self) -> dict[str, dict[str, Any]]:
        """What each task of this group, and weights, need to go on exactly; of one replica of the group only."""
        return {name: each.state() for name, each in self._saved.items()} if self.at.world.rank == 0 else {}

    def shared_state(self) -> dict[str, Any]:
        """What else `restore` needs, the same on all ranks; ready for JSON."""
        return {"step": self.step, "stopped_after": self.stopped_after, "best": self._halving.best}

    def restore(self, shared: Mapping[str, Any], read: Callable[[str], dict[str, Any]]) -> None:
        """Go on from a `shared_state`, on any number of ranks and groups; `read` gives one of the `states`."""
        self.step, self.stopped_after = shared["step"], dict(shared["stopped_after"])
        self._halving.best = dict(shared["best"])
        for name, each in self._saved.items():
            each.restore(read(name))
