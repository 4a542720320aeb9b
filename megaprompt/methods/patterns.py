"""Manual patterns of a task, each with words of its own: their mean and spread, and the one that is best on dev.

What a pattern is worth on a handful of examples differs so much that a single one says little (the paper's Table 5).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megaprompt.errors import UsageError
from megaprompt.methods.fine_tuning import FineTuning, evidence_of
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.tasks.task import Task

MEAN = "mean of patterns"


class BestPattern:
    """All patterns of each task, with nothing trained."""

    columns = ("best-manual", MEAN)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("best-manual")
            must_have_patterns(task, "best-manual")

    def run(self, context: Context) -> None:
        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            found = {}
            for name, asked in task.patterns.items():
                template = asked.manual_template
                dev = context.measure(asked, "dev", context.answer(asked, template, "dev"))
                found[name] = Scored(context.row(asked, template, dev), context.answer(asked, template, "test"), asked)
            best = chosen(context, task, found)
            context.save_prompt("best-manual", task, task.patterns[best.row["chosen"]].manual_template, best.row["dev"])
            return {"best-manual": best}

        rows = context.each_task(["best-manual"], score)["best-manual"]
        context.baseline(MEAN, mean_of_patterns(context, rows))


class Pet:
    """All patterns of each task, with the model tuned on each of them by itself.

    As PET (arXiv 2009.07118) without unlabelled texts, ensemble and distillation: the baseline of the paper's Table 5.
    """

    columns = ("pet-best", "pet")

    def __init__(self, tuning: FineTuning) -> None:
        self.tuning = tuning

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            must_have_patterns(task, "pet")
            for asked in task.patterns.values():
                asked.must_be_learnable("pet")

    def run(self, context: Context) -> None:
        def score(task: Task, should_stop: ShouldStop) -> dict[str, Scored]:
            found = {
                name: self.tuning.learned(context, asked, asked.manual_template, should_stop, name)
                for name, asked in task.patterns.items()
            }
            return {"pet-best": chosen(context, task, found)}

        rows = context.each_task(["pet-best"], score, title="pet", own_progress=True)["pet-best"]
        context.baseline("pet", mean_of_patterns(context, rows))


def must_have_patterns(task: Task, method: str) -> None:
    """See that there is something to compare.

    Raises:
        UsageError: the backbone can read no pattern.
    """
    if not task.patterns:
        raise UsageError(
            f"--methods {method}: this backbone can read no pattern of {task.name}; add one without fields behind [Y] "
            f"in a file for --patterns"
        )


def chosen(context: Context, task: Task, found: Mapping[str, Scored]) -> Scored:
    """The pattern that is best on dev, the first among equals, with what the others scored.

    Args:
        found: what each pattern scored; those without answers are not chosen.
    """
    examples = len(task.examples["dev"])
    usable = {name: one for name, one in found.items() if one.answers is not None and one.row["dev"]} or dict(found)
    evidence = {name: evidence_of(task, one.row["dev"] or {}) for name, one in usable.items()}
    best = max(evidence, key=lambda name: evidence[name])
    tried = []
    for name, one in found.items():
        test = {} if one.answers is None else context.measure(one.way or task, "test", one.answers)
        about = {"name": name, "template": one.row["template"], "dev_examples": examples, **(one.row["dev"] or {})}
        tried.append(about | {f"test_{metric}": value for metric, value in test.items()})
    return found[best]._replace(row=found[best].row | {"chosen": best, "tried": tried})


def mean_of_patterns(context: Context, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The means over patterns of each task, with their standard deviations (of a sample) as `..._deviation`.

    Args:
        rows: of the best patterns, which tell what was tried.
    """
    means = {}
    for name, row in rows.items():
        mean: dict[str, Any] = {"type": row["type"], "facts": row["facts"], "epochs": None}
        mean["template"] = f"{len(row['tried'])} patterns"
        metrics = context.tasks[name].objective.metrics
        for metric in metrics:
            values = _known(row["tried"], f"test_{metric}")
            mean[metric] = statistics.fmean(values) if values else None
            mean[f"{metric}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        score = next(iter(metrics))
        dev = _known(row["tried"], score)
        mean[f"dev_{score}"] = statistics.fmean(dev) if dev else None
        means[name] = mean
    return means


def _known(tried: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [each[name] for each in tried if each.get(name) is not None]
