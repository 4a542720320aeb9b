"""Majority: always the most frequent answer of train, which is what a learned prior alone would score."""

from __future__ import annotations

from megaprompt.methods.method import Context


class Majority:
    """The baseline that never looks at the question."""

    columns = ("majority",)

    def check(self, context: Context) -> None:
        """It needs nothing."""

    def run(self, context: Context) -> None:
        rows = {}
        for name, task in context.tasks.items():
            train = task.examples["train"]
            if len({example.gold for example in train}) == 1:  # they were chosen so; dev tells what is frequent
                train = task.examples["dev"] or train
            metrics = {split: task.objective.majority(train, task.examples[split]) for split in ("dev", "test")}
            score = next(iter(task.objective.metrics))
            about = {"type": task.type, "facts": len(task.examples["test"]), "epochs": None}
            rows[name] = about | metrics["test"] | {f"dev_{score}": metrics["dev"][score]}
            if constant := task.objective.constant(task.examples["test"]):
                rows[name]["constant"] = constant
        context.baseline("majority", rows)
