"""Prompts that need no training, wordings with or without demonstrations, and the choice among them on dev."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaprompt.engine.passes import Questions, answers
from megaprompt.errors import MegapromptError
from megaprompt.methods.method import Context
from megaprompt.prompting.template import Template
from megaprompt.seeds import seed_of
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import SPLITS, Instance, Split, Task

_FIRST = 32  # dev examples on which all are tried


@dataclass(frozen=True)
class Wording:
    """One way to ask a task.

    Args:
        shown: which training examples stand before the question as demonstrations, by their places in train.
        about: what tells it from others, for results.
    """

    template: Template
    shown: tuple[int, ...] = ()
    about: Mapping[str, Any] | None = None

    def before(self, task: Task) -> str:
        """The text of the demonstrations."""
        return task.shown(self.shown)


@dataclass(frozen=True)
class Tried:
    """What a wording scored on dev."""

    wording: Wording
    dev: Mapping[str, float]
    examples: int  # of dev, on which it was tried

    def row(self) -> dict[str, Any]:
        """For results.json."""
        return {**(self.wording.about or {}), "dev_examples": self.examples, **self.dev}


def drawn(task: Task, count: int, draw: int, seed: int) -> tuple[int, ...]:
    """So many training examples by chance; a larger number of the same draw has the smaller one at its end.

    The last demonstrations, next to the question, are those that all numbers have in common.
    """
    order = list(task.showable)
    random.Random(seed_of(seed, task.name, "demonstrations", draw)).shuffle(order)
    return tuple(reversed(order[:count]))


def choose(context: Context, task: Task, wordings: Sequence[Wording]) -> list[Tried]:
    """Try all on a few dev examples, the better half on twice as many, and so on; the best first.

    Each is asked at most once about each example, and all that are left share passes. Those that drop out come behind,
    with the scores that they had. (Successive halving, arXiv 1502.07943.)
    """
    objective, examples = task.objective, list(task.examples["dev"])
    random.Random(seed_of(context.seed, task.name, "dev")).shuffle(examples)
    left, total = list(wordings), len(examples)
    found: dict[int, Answers] = {}  # by id of the wording
    dropped: list[Tried] = []
    done, until = 0, min(total, _FIRST) if len(wordings) > 1 else total
    while True:
        part = [
            Questions([task.instance(one, each.template, before) for one in examples[done:until]], objective)
            for each in left
            for before in [each.before(task)]
        ]
        for each, new in zip(left, answers(context.at(task), part, None), strict=True):
            old = found.get(id(each))
            found[id(each)] = new if old is None else {name: torch.cat([old[name], new[name]]) for name in new}
        done = until
        tried = [Tried(each, objective.measure(found[id(each)], examples[:done]), done) for each in left]
        tried.sort(key=lambda each: objective.evidence(each.dev, each.examples), reverse=True)  # stable
        if done == total:
            return tried + dropped
        keep = max(1, len(left) // 2)
        dropped = tried[keep:] + dropped
        left = [each.wording for each in tried[:keep]]
        until = total if keep == 1 else min(total, 2 * done)


def check_lengths(context: Context, splits: Sequence[Split]) -> None:
    """See that the backbone can read every example, before any time is spent on others.

    Args:
        splits: that are asked.

    Raises:
        MegapromptError: names the first that is too long.
    """
    most = context.backbone.max_positions
    if most is None:
        return
    for task in context.tasks.values():
        causal = context.backbone.causal
        template = task.template(task.learned) if task.learned else task.default_template(causal)
        others = len(template.text.encode()) + 32
        for split in splits:
            for example in task.examples[split]:
                # Every token is a byte at least, so that most examples need no closer look.
                if others + sum(len(text.encode()) for text in (*example.fields.values(), example.answer)) <= most:
                    continue
                longest = max(len(query.tokens) for query in task.instance(example, template).queries)
                if longest > most:
                    what = " ".join(" ".join(example.fields.values()).split())[:60]
                    raise MegapromptError(
                        f"{task.name}, {split}: {what}... is {longest} tokens long, and {context.backbone.name} reads "
                        f"{most}; shorten it, leave it out, or give another --backbone"
                    )


def readable(context: Context, task: Task, wordings: Sequence[Wording]) -> list[Wording]:
    """Those whose demonstrations leave enough of the positions that the backbone has for every question."""
    most = context.backbone.max_positions
    if most is None:
        return list(wordings)

    def longest(instances: Sequence[Instance]) -> int:
        return max((len(query.tokens) for each in instances for query in each.queries), default=0)

    lengths = {
        template: longest([one for split in SPLITS for one in task.instances(split, template)])
        for template in {wording.template for wording in wordings}
    }
    one = task.examples["test"][0]

    def added(wording: Wording) -> int:
        behind, alone = (task.instance(one, wording.template, before) for before in (wording.before(task), ""))
        return longest([behind]) - longest([alone])

    return [wording for wording in wordings if lengths[wording.template] + added(wording) <= most]
