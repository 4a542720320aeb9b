"""Fine-tuning: the whole language model is trained on one task, alone or together with a prompt.

Examples, packing, loss, data order, early stopping and evaluation are those of frozen models; only what is trained
differs. The model goes back to its original weights for every task, so it is loaded anew each time. The best model on
dev counts, and answers test; it is not written down.

On LAMA (the paper's Table 2, FT and MP+FT) there is no dropout, unlike in the paper's code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaprompt.backbone import Backbone
from megaprompt.engine.best import Prompt
from megaprompt.engine.learner import Learner, TrainingSet
from megaprompt.engine.passes import Questions, answers
from megaprompt.engine.trainer import Trainer
from megaprompt.engine.weights import Weights
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.prompting.recipe import Tuning
from megaprompt.prompting.template import Template
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import Instance, Task

_PROMPTS = {"fine-tuning": "", "manual+fine-tuning": "manual", "p-tuning+fine-tuning": "learned"}
"""The prompt of each column; none if the model gets the fields alone."""


@dataclass(frozen=True)
class FineTuning:
    """Train the model on each task, and score the best model on test.

    Args:
        column: fine-tuning, manual+fine-tuning, or p-tuning+fine-tuning, which trains the prompt encoder as well.
        recipes: of a task, by name: those that are tried, of which the best on dev counts.
    """

    column: str
    recipes: Callable[[str], Mapping[str, Tuning]]
    encoder: EncoderKind = "lstm"

    @property
    def columns(self) -> tuple[str]:
        return (self.column,)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task, template = self._asked(task)
            task.must_be_learnable(self.column)
            for example in task.examples["test"][:1]:  # finds a template that does not suit the backbone
                task.instance(example, template)

    def _asked(self, task: Task) -> tuple[Task, Template]:
        match _PROMPTS[self.column]:
            case "manual":
                return task, task.manual_template
            case "learned":
                task = task.way("learned")
                assert task.learned is not None
                return task, task.template(task.learned)
            case _:
                task = task.way("alone")
                return task, task.bare_template

    def run(self, context: Context) -> None:
        def score(task: Task, should_stop: ShouldStop) -> dict[str, Scored]:
            return {self.column: self.learned(context, *self._asked(task), should_stop)}

        context.each_task(self.columns, score, own_progress=True)

    def learned(
        self, context: Context, task: Task, template: Template, should_stop: ShouldStop, pattern: str = ""
    ) -> Scored:
        """Train on one task, as it is asked, and score; by the best of several recipes.

        Args:
            pattern: the name of the prompt, if it is one of several that are learned with.
        """
        one = _OneTask(context, self, task, template, should_stop)
        recipes = self.recipes(task.name)
        several = len(recipes) > 1

        def learn(recipe: str, tuning: Tuning) -> dict[str, Any]:
            if not (name := ", ".join(filter(None, (pattern, recipe)))):
                return one.learn(tuning)
            return context.kept(f"{self.column}/{task.name}/{name}", lambda: one.learn(tuning, name))

        found = {name: learn(name, tuning) for name, tuning in recipes.items()}
        learned = {name: each for name, each in found.items() if each["answers"] is not None} or found
        evidence = {name: evidence_of(task, each["dev"]) for name, each in learned.items()}
        chosen = max(evidence, key=lambda name: evidence[name])  # the first among equals
        best = found[chosen]
        row = context.row(task, template, best["dev"], epochs=best["epochs"], diverged=best["diverged"])
        if several:
            row |= {"chosen": chosen, "tried": [{"name": name, **each["dev"]} for name, each in learned.items()]}
        return Scored(row, best["answers"], task)


def evidence_of(task: Task, dev: Mapping[str, float]) -> list[float]:
    """By what scores on dev are compared; where there are none, it is the least."""
    return task.objective.evidence(dev, len(task.examples["dev"])) if dev else []


@dataclass(frozen=True)
class _OneTask:
    """What is learned of one task, by one recipe or several."""

    context: Context
    method: FineTuning
    task: Task
    template: Template
    should_stop: ShouldStop

    def learn(self, tuning: Tuning, candidate: str = "") -> dict[str, Any]:
        """Train the model; `dev`, `epochs` and `diverged` as results have them, and `answers` on test, None without."""
        context, task, template = self.context, self.task, self.template
        train, dev, test = task.training_instances(template), *(task.instances(s, template) for s in ("dev", "test"))
        pseudo_tokens, objective = template.num_pseudo_tokens, task.objective
        beside = tuning.prompts if pseudo_tokens else tuning.weights  # a head is a part of the model
        data = TrainingSet(task.name, objective, pseudo_tokens, train, dev, candidate=candidate)
        with context.trainable_backbone() as (backbone, deepspeed):
            weights = Weights(backbone, tuning.weights, context.world, deepspeed)

            said: Answers | None = None  # on test, of the best on dev, where there is no copy of its weights

            def keep(learner: Learner) -> Prompt:
                nonlocal said
                prompt = dataclasses.replace(learner.prompt(), weights=weights.copy())
                said = self._answers(trainer, test, prompt, backbone) if prompt.weights is None else None
                return prompt

            trainer = Trainer(
                backbone,
                [data],
                beside,
                encoder=self.method.encoder,
                seed=context.seed,
                size=context.size,
                world=context.world,
                weights=weights,
                keep=keep,
            )
            with context.train_one(self.method.column, task, self.should_stop, candidate, trainer) as hooks:
                found = trainer.train(hooks)[data.name]
            if found.kept is not None and found.kept.weights is not None:
                weights.put_back(found.kept.weights)
                said = self._answers(trainer, test, found.kept, backbone)
        return {"dev": found.dev, "epochs": found.epochs, "diverged": found.diverged, "answers": said}

    def _answers(self, trainer: Trainer, test: list[Instance], prompt: Prompt, backbone: Backbone) -> Answers:
        vectors = prompt.vectors.to(backbone.device) if self.template.num_pseudo_tokens else None
        head = prompt.head_for(self.task.objective, backbone)
        return answers(trainer.at, [Questions(test, self.task.objective, head)], vectors)[0]
