"""The best of several manual wordings, chosen on dev, and what each of them scores (the paper's Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megaprompt.engine.passes import Questions, answers
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.methods.untrained import Wording, choose
from megaprompt.prompting.template import Template
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
            best = tried[0].wording.template
            questions = [Questions(task.instances("test", each), task.objective) for each in templates]
            test = dict(zip(templates, answers(context.at(task), questions, None), strict=True))
            context.save_prompt("best-manual", task, best, tried[0].dev)
            row = context.row(task, best, tried[0].dev)
            name = next(iter(task.objective.metrics))
            row["tried"] = [
                each.row() | {f"test_{name}": context.measure(task, "test", test[each.wording.template])[name]}
                for each in tried
            ]
            return {"best-manual": Scored(row, test[best])}

        context.each_task(self.columns, score)
