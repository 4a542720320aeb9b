"""Manual prompts: the wording that came with the data, and nothing learned (MP in the paper's Table 2)."""

from __future__ import annotations

from megaprompt.errors import UsageError
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.tasks.task import Task


class Manual:
    """The prompts that people wrote."""

    columns = ("manual",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("manual")
            for example in task.examples["test"][:1]:  # finds a template that does not suit the backbone
                try:
                    task.instance(example, task.manual_template)
                except UsageError as error:
                    raise UsageError(
                        f"manual prompt of {task.name}: {error}; mend it, or leave {task.name} out"
                    ) from error

    def run(self, context: Context) -> None:
        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            template, dev = task.manual_template, None
            if task.examples["dev"]:
                dev = context.measure(task, "dev", context.answer(task, template, "dev"))
            context.save_prompt("manual", task, template, dev or {})
            return {"manual": Scored(context.row(task, template, dev), context.answer(task, template, "test"))}

        context.each_task(self.columns, score)
