"""P-tuning (arXiv 2103.10385): prompts of all tasks learned together, with the backbone frozen.

`p-tuning` is the paper's method: its template, and its encoder from a random start. `best` also learns other candidates
in the same passes, and takes for each task what is best on dev among them and the prompts that need no training.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaprompt.engine.halving import pooled
from megaprompt.engine.learner import Learned, TrainingSet
from megaprompt.engine.schedule import assign, groups_for, waves_for
from megaprompt.engine.trainer import Trainer
from megaprompt.errors import MegapromptError
from megaprompt.methods.candidates import (
    MOST,
    PAPER,
    Candidate,
    candidates,
    folds_of,
    has_folds,
    rungs_of,
    without,
)
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.methods.untrained import drawn
from megaprompt.prompting.prompt_encoder import EncoderKind, number_of_parameters
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template
from megaprompt.tasks.task import Task

logger = logging.getLogger(__name__)

UNTRAINED = ("manual", "best-manual", "in-context")
"""The methods that `best` also chooses from."""
_MOST_SHOWN = 8  # demonstrations before a learned prompt; they are computed in every step


@dataclass(frozen=True)
class PTuning:
    """Learn prompts, and score the best of each task on test.

    Args:
        template: with pseudo tokens; if None, what came with the data, or else the paper's for the kind of backbone.
        from_manual: start with the manual prompt instead, each of its tokens a pseudo token.
        groups: into how many groups of ranks the tasks are divided; see `schedule.groups_for` if None.
        best: whether to choose among several candidates, too.
        most: how many of them are learned for each task; all of which the encoders fit into memory if None.
    """

    recipe: Recipe
    encoder: EncoderKind = "lstm"
    template: str | None = None
    from_manual: bool = False
    groups: int | None = None
    best: bool = False
    most: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("p-tuning", "best") if self.best else ("p-tuning",)

    def check(self, context: Context) -> None:
        for task in _as_learned(context).values():
            task.must_be_learnable("p-tuning")
            if self.best:
                task.must_be_answerable("best")
            template = task.manual_template if self.from_manual else self._template(task, context)
            for example in task.examples["test"][:1]:  # finds a template that does not suit the backbone
                task.instance(example, template)

    def _template(self, task: Task, context: Context) -> Template:
        if text := self.template or task.learned:
            return task.template(text)
        return task.default_template(context.backbone.causal)

    def _paper(self, task: Task, context: Context) -> Candidate:
        if not self.from_manual:
            return Candidate(PAPER, self._template(task, context))
        template, tokens = task.manual_with_pseudo_tokens()
        return Candidate(PAPER, template, (), context.backbone.embeddings(tokens))

    def _candidates(self, context: Context) -> dict[str, list[Candidate]]:
        """What is learned, by task; the paper's first."""
        paper = {name: self._paper(task, context) for name, task in _as_learned(context).items()}
        if not self.best:
            return {name: [one] for name, one in paper.items()}

        def fitting() -> int:
            sets = max(1 + len(folds_of(task, ())) for task in _as_learned(context).values())
            return max(1, min(MOST, self._at_once(context, paper.values()) // sets))

        most = context.once("candidates", lambda: self.most or fitting())
        tried = context.rows("in-context")
        return {
            name: candidates(task, paper[name], _shown(context, task, tried[name]), most)
            for name, task in _as_learned(context).items()
        }

    def _at_once(self, context: Context, those: Iterable[Candidate]) -> int:
        """How many encoders, at least one on each rank, fit with gradients and Adam into half of the free memory. (16
        bytes for each parameter: at 11B, an LSTM encoder takes 2.1 GB.)"""
        pseudo_tokens = max(one.template.num_pseudo_tokens for one in those)
        parameters = number_of_parameters(pseudo_tokens, context.backbone.embedding_size, self.encoder)
        fitting = context.world.free_memory() // 2 // (16 * max(1, parameters))
        return (self.groups or context.world.size) * max(1, fitting)

    def run(self, context: Context) -> None:
        of_task = self._candidates(context)
        tasks = _as_learned(context)
        sets = {
            name: [one.training_sets(tasks[name], self.recipe, with_folds=self.best) for one in those]
            for name, those in of_task.items()
        }
        sizes = [sum(map(len, those)) for those in sets.values()]
        at_once = self._at_once(context, (one for those in of_task.values() for one in those))
        waves = context.once("waves", lambda: min(len(sizes), waves_for(sum(sizes), at_once)))
        if waves > 1:
            logger.info("the encoders of %d relations do not fit into memory together: %d waves", len(sizes), waves)
        wave_of = dict(zip(of_task, assign(sizes, waves), strict=True))
        for wave in range(waves):
            names = [name for name in of_task if wave_of[name] == wave]
            if not all(context.is_scored(self.columns, name) for name in names):
                self._wave(
                    context, wave, waves, {name: list(zip(of_task[name], sets[name], strict=True)) for name in names}
                )

    def _wave(
        self, context: Context, wave: int, waves: int, what: Mapping[str, list[tuple[Candidate, list[TrainingSet]]]]
    ) -> None:
        """Learn and score some of the tasks."""
        data = [each for those in what.values() for _, sets in those for each in sets]
        groups = self.groups if self.groups and (self.groups <= len(data) or waves == 1) else None
        trainer = Trainer(
            context.backbone,
            data,
            self.recipe,
            encoder=self.encoder,
            seed=context.seed,
            size=context.size,
            world=context.world,
            groups=groups or groups_for(len(data), context.world.size),
            loss_scale=context.loss_scale,
            rungs=rungs_of(self.recipe, max(map(len, what.values()))),
        )
        title = "p-tuning" if waves == 1 else f"p-tuning, wave {wave + 1} of {waves}"
        found = context.train(title, trainer, wave + 1)
        learned = {name: [_Tried.of(one, sets, found) for one, sets in those] for name, those in what.items()}
        if all(each.what.kept is None for those in learned.values() for each in those):
            name, [first, *_] = next(iter(learned.items()))
            reason = (first.what.diverged or {}).get("reason", "there were no epochs")
            raise MegapromptError(f"nothing was learned of any relation; {name}: {reason}")
        tasks = _as_learned(context)

        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            task = tasks[task.name]
            scored = {"p-tuning": _score(context, "p-tuning", task, learned[task.name][0])}
            if self.best:
                scored["best"] = _best(context, task, learned[task.name], scored["p-tuning"])
            return scored

        context.each_task(self.columns, score, names=list(what), title="test")


def _as_learned(context: Context) -> dict[str, Task]:
    return {name: task.way("learned") for name, task in context.tasks.items()}


def _shown(context: Context, task: Task, row: Mapping[str, Any]) -> tuple[int, ...]:
    """The demonstrations that were best before a question, of numbers that a learned prompt can stand behind."""
    for tried in row["tried"]:
        if 0 < tried["demonstrations"] <= _MOST_SHOWN:
            return drawn(task, tried["demonstrations"], tried["draw"], context.seed)
    return ()


@dataclass(frozen=True)
class _Tried:
    """A candidate that was learned, and the scores by which it is compared with others: on dev, and on all folds."""

    candidate: Candidate
    what: Learned
    scores: Mapping[str, float]
    examples: int

    @classmethod
    def of(cls, candidate: Candidate, sets: Sequence[TrainingSet], found: Mapping[str, Learned]) -> _Tried:
        known = [(one.dev, len(each.dev)) for each in sets if (one := found[each.name]).kept is not None]
        return cls(candidate, found[sets[0].name], *(pooled(known) if known else ({}, 0)))


def _score(context: Context, method: str, task: Task, tried: _Tried) -> Scored:
    """Save and score what was learned."""
    candidate, learned = tried.candidate, tried.what
    row = context.row(task, candidate.template, learned.dev, epochs=learned.epochs, diverged=learned.diverged)
    if learned.kept is None:
        return Scored(row, None)
    before = candidate.before(task)
    context.save_prompt(method, task, candidate.template, learned.dev, before=before, kept=learned.kept)
    return Scored(row, context.answer(task, candidate.template, "test", learned.kept, before))


def _best(context: Context, task: Task, learned: Sequence[_Tried], paper: Scored) -> Scored:
    """The best on dev of everything that was tried.

    Among those with the same score, what needs no training: learned prompts were chosen on dev once before, at the step
    where they were best there, and tend to be worse on test.
    """
    untrained = {name: rows[task.name] for name in UNTRAINED if (rows := context.rows(name))}
    tried = {name: _on_folds(context, task, row) for name, row in untrained.items()}
    tried |= {each.candidate.name: (dict(each.scores), each.examples) for each in learned if each.what.kept is not None}

    def worth(name: str) -> list[float]:
        score, *others = task.objective.evidence(*tried[name])
        return [score, name in untrained, *others]

    chosen = max(tried, key=worth)
    if chosen in untrained:
        row = untrained[chosen]
        template = task.template(row["template"])
        before = task.shown(row.get("shown", ()))
        context.save_prompt("best", task, template, row["dev"], before=before)
        scored = Scored(context.row(task, template, row["dev"]), context.answer(task, template, "test", before=before))
    elif chosen == PAPER:
        candidate, what = learned[0].candidate, learned[0].what
        context.save_prompt("best", task, candidate.template, what.dev, kept=what.kept)
        scored = Scored(dict(paper.row), paper.answers)
    else:
        scored = _score(context, "best", task, next(each for each in learned if each.candidate.name == chosen))
    dropped = {each.candidate.name: each.what.dropped for each in learned}
    lines = [
        {"name": name, "dev_examples": examples, **scores, "dropped_after": dropped.get(name)}
        for name, (scores, examples) in tried.items()
    ]
    scored.row.update(chosen=chosen, tried=lines)
    return scored


def _on_folds(context: Context, task: Task, row: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """What a prompt without training scored on dev; also on train, which taught it nothing, where learned ones are
    compared on folds of that."""
    shown, scores = row.get("shown", ()), [(row["dev"], len(task.examples["dev"]))]
    if has_folds(task) and (train := without(task, shown)):
        held_out = dataclasses.replace(task, examples={**task.examples, "train": train})
        answers = context.answer(held_out, task.template(row["template"]), "train", before=task.shown(shown))
        scores.append((task.objective.measure(answers, train), len(train)))
    return pooled(scores)
