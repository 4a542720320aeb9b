"""Fine-tuning: the baselines that train the whole language model on one task (the paper's Table 2, FT and MP+FT).

Examples, packing, loss, data order, early stopping and evaluation are those of the prompts; only what is trained
differs. The model goes back to its original weights for every task, so it is loaded anew each time. The best model on
dev counts. Its weights are too many to keep: its answers on test are taken while it is the best.

As with prompts, and unlike in the paper's code, there is no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, answers
from megaprompt.engine.trainer import Trainer
from megaprompt.engine.weights import Weights
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.prompting.recipe import Recipe
from megaprompt.tasks.task import Task


@dataclass(frozen=True)
class FineTuning:
    """Train the model on each task, and score the best model on test.

    Args:
        manual: ask with the manual prompt; else the model gets the fields alone.
    """

    recipe: Recipe
    manual: bool

    @property
    def columns(self) -> tuple[str]:
        return ("manual+fine-tuning" if self.manual else "fine-tuning",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            self._asked(task).must_be_learnable(self.columns[0])
            if self.manual:
                _ = task.manual_template

    def _asked(self, task: Task) -> Task:
        return task if self.manual else task.way("alone")

    def run(self, context: Context) -> None:
        [column] = self.columns

        def score(task: Task, should_stop: ShouldStop) -> dict[str, Scored]:
            task = self._asked(task)
            template = task.manual_template if self.manual else task.bare_template
            train = task.training_instances(template)
            dev, test = task.instances("dev", template), task.instances("test", template)
            data = TrainingSet(task.name, task.objective, 0, train, dev)
            with context.trainable_backbone() as (backbone, deepspeed):
                trainer = Trainer(
                    backbone,
                    [data],
                    self.recipe,
                    seed=context.seed,
                    size=context.size,
                    world=context.world,
                    weights=Weights(backbone, self.recipe, context.world, deepspeed),
                    keep=lambda learner: answers(trainer.at, [Questions(test, task.objective, learner.head)], None)[0],
                )
                with context.train_one(column, task, should_stop, task.objective.items) as hooks:
                    found = trainer.train(hooks)[task.name]
            row = context.row(task, template, found.dev, epochs=found.epochs, diverged=found.diverged)
            return {column: Scored(row, found.kept, task)}

        context.each_task(self.columns, score, own_progress=True)
