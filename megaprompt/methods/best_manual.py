"""The best of several manual wordings, chosen on dev, and what each of them scores (the paper's Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megaprompt.engine.passes import Questions, answers
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.methods.untrained import Tried, Wording, choose
from megaprompt.prompting.template import Template
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import Task


@dataclass(frozen=True)
class BestManual:
    """Of the wordings that came with the data, and others that were given, the one that is best on dev.

    Args:
        given: more wordings by task.
    """

    given: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

    columns = ("best-manual",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("best-manual")
            _ = task.manual_template

    def wordings(self, task: Task) -> list[Template]:
        """Those that the backbone can read, each once; the manual prompt first."""
        return task.readable([*task.wordings, *self.given.get(task.name, ())])

    def run(self, context: Context) -> None:
        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            templates = self.wordings(task)
            tried = choose(context, task, [Wording(each, (), {"template": each.text}) for each in templates])
            questions = [Questions(task.instances("test", each.wording.template), task.objective) for each in tried]
            return {"best-manual": best_of(context, task, tried, answers(context.at(task), questions, None))}

        context.each_task(self.columns, score)


def best_of(context: Context, task: Task, tried: Sequence[Tried], test: Sequence[Answers]) -> Scored:
    """Save the first of the wordings that were tried, the best one; its row tells what all of them score.

    Args:
        test: the answers of each on test.
    """
    best = tried[0]
    context.save_prompt("best-manual", task, best.wording.template, best.dev)
    row, name = context.row(task, best.wording.template, best.dev), next(iter(task.objective.metrics))
    row["tried"] = [
        each.row() | {f"test_{name}": context.measure(task, "test", found)[name]}
        for each, found in zip(tried, test, strict=True)
    ]
    return Scored(row, test[0])
