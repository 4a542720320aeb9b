"""Manual prompts in several wordings, as BEAR has them: each of them, and their mean.

What a model seems to know depends on how it is asked. BEAR's leaderboard therefore has the mean over three wordings and
its standard error (arXiv 2404.04113, section 4).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaprompt.engine.passes import Questions, answers
from megaprompt.methods.best_manual import best_of
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.methods.untrained import Tried, Wording
from megaprompt.prompting.template import Template
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import Split, Task

MEAN = "mean of wordings"


@dataclass(frozen=True)
class Wordings:
    """Score all wordings of each task.

    Args:
        most: how many a task has at most.
        best: also find the one that is best on dev, as `best-manual` does, without asking twice.
    """

    most: int
    best: bool = False

    @property
    def _each(self) -> list[str]:
        return ["manual", *(f"wording {number}" for number in range(2, self.most + 1))]

    @property
    def columns(self) -> list[str]:
        return [*self._each, MEAN, *self._best]

    @property
    def _best(self) -> list[str]:
        return ["best-manual"] if self.best else []

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("manual")
            _ = task.manual_template

    def run(self, context: Context) -> None:
        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            return self._scored(context, task)

        rows = context.each_task([*self._each, *self._best], score, title="manual prompts")
        metrics = next(iter(context.tasks.values())).objective.metrics
        means = {name: _mean([rows[column][name] for column in self._each], metrics) for name in context.tasks}
        context.baseline(MEAN, means)

    def _scored(self, context: Context, task: Task) -> dict[str, Scored]:
        wordings = zip(self._each, task.wordings, strict=False)
        readable = {column: template for column, text in wordings for template in task.readable([text])}

        def ask(split: Split) -> list[Answers]:  # all at once, since they share beginnings
            questions = [Questions(task.instances(split, each), task.objective) for each in readable.values()]
            return answers(context.at(task), questions, None)

        has_dev = bool(task.examples["dev"])
        dev = [context.measure(task, "dev", found) for found in ask("dev")] if has_dev else [None] * len(readable)
        test = ask("test")
        if "manual" in readable:
            context.save_prompt("manual", task, readable["manual"], dev[list(readable).index("manual")] or {})
        missing = Scored(context.row(task, task.manual_template) | {"template": None}, None)
        scored = dict.fromkeys(self._each, missing)
        for (column, template), dev_scores, found in zip(readable.items(), dev, test, strict=True):
            scored[column] = Scored(context.row(task, template, dev_scores), found)
        if self.best:
            scored["best-manual"] = self._chosen(context, task, list(readable.values()), dev, test)
        return scored

    def _chosen(
        self,
        context: Context,
        task: Task,
        templates: Sequence[Template],
        dev: Sequence[Mapping[str, float] | None],
        test: Sequence[Answers],
    ) -> Scored:
        """The best wording on dev; the first one of equals."""
        count = len(task.examples["dev"])
        tried = [
            (Tried(Wording(template, (), {"template": template.text}), scores, count), found)
            for template, scores, found in zip(templates, dev, test, strict=True)
            if scores is not None
        ]
        tried.sort(key=lambda each: task.objective.evidence(each[0].dev, count), reverse=True)  # stable
        return best_of(context, task, [one for one, _ in tried], [found for _, found in tried])


def _mean(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> dict[str, Any]:
    """The mean of the scores of several wordings, with their standard errors as `..._sem`."""
    asked = [row for row in rows if row[next(iter(metrics))] is not None]
    mean = {"type": rows[0]["type"], "facts": rows[0]["facts"], "epochs": None, "template": f"{len(asked)} wordings"}
    for name in (*metrics, f"dev_{next(iter(metrics))}"):
        values = [row[name] for row in asked if row.get(name) is not None]
        mean[name] = statistics.fmean(values) if values else None
        if name in metrics:
            mean[f"{name}_sem"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean
