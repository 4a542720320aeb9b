"""In-context learning (arXiv 2005.14165): training facts in the manual wording before the question, nothing learned."""

from __future__ import annotations

from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.methods.untrained import Tried, Wording, choose, drawn, readable
from megaprompt.tasks.task import Task

COUNTS = (1, 4, 8, 16, 32)
"""How many demonstrations are tried, beside none."""
DRAWS = 3
"""How many samples of each number."""


def chosen_demonstrations(context: Context, task: Task) -> list[Tried]:
    """Numbers and draws of demonstrations from train, the best on dev first."""
    template, train = task.manual_template, len(task.showable)
    wordings = [Wording(template, (), {"demonstrations": 0, "draw": None})]
    for count in COUNTS:
        for draw in range(DRAWS if count <= train else 0):
            about = {"demonstrations": count, "draw": draw}
            wordings.append(Wording(template, drawn(task, count, draw, context.seed), about))
    return choose(context, task, readable(context, task, wordings))


class InContext:
    """How many demonstrations, and which, is chosen on dev for each task."""

    columns = ("in-context",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("in-context")
            _ = task.manual_template

    def run(self, context: Context) -> None:
        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            best, *others = chosen_demonstrations(context, task)
            before, template = best.wording.before(task), best.wording.template
            context.save_prompt("in-context", task, template, best.dev, before=before)
            row = context.row(task, template, best.dev, **(best.wording.about or {}), shown=list(best.wording.shown))
            row["tried"] = [each.row() for each in (best, *others)]
            return {"in-context": Scored(row, context.answer(task, template, "test", before=before))}

        context.each_task(self.columns, score)
