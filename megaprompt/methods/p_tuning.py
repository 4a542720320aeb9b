"""P-tuning (arXiv 2103.10385): prompts of all tasks learned together, with the backbone frozen."""

from __future__ import annotations

from dataclasses import dataclass

from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Trainer
from megaprompt.errors import MegapromptError
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template, default_template
from megaprompt.tasks.task import Task


@dataclass(frozen=True)
class PTuning:
    """Learn prompts, and score the best of each task on test.

    Args:
        template: with pseudo tokens; the paper's for the kind of backbone if None.
        from_manual: start with the manual prompt instead, each of its tokens a pseudo token.
        groups: into how many groups of ranks the tasks are divided.
    """

    recipe: Recipe
    encoder: EncoderKind = "lstm"
    template: str | None = None
    from_manual: bool = False
    groups: int = 1

    columns = ("p-tuning",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            template = task.manual_template if self.from_manual else self._template(task, context)
            for example in task.examples["test"][:1]:  # finds a template that does not suit the backbone
                template.render(example.fields, task.encoder, max_tokens=task.max_tokens)

    def _template(self, task: Task, context: Context) -> Template:
        return task.template(self.template or default_template(context.backbone.causal, task.places))

    def run(self, context: Context) -> None:
        data, templates = [], {}
        for name, task in context.tasks.items():
            vectors = None
            if self.from_manual:
                templates[name], tokens = task.manual_template.with_pseudo_tokens(task.encoder)
                vectors = context.backbone.embeddings(tokens)
            else:
                templates[name] = self._template(task, context)
            count = templates[name].num_pseudo_tokens
            train, dev = (task.instances(split, templates[name]) for split in ("train", "dev"))
            data.append(TrainingSet(name, task.objective, count, train, dev, vectors))
        trainer = Trainer(
            context.backbone,
            data,
            self.recipe,
            encoder=self.encoder,
            seed=context.seed,
            size=context.size,
            world=context.world,
            groups=self.groups,
            loss_scale=context.loss_scale,
        )
        learned = context.train("p-tuning", trainer)
        if all(found.kept is None for found in learned.values()):
            name, first = next(iter(learned.items()))
            reason = (first.diverged or {}).get("reason", "there were no epochs")
            raise MegapromptError(f"nothing was learned of any relation; {name}: {reason}")
        for name, found in learned.items():
            if found.kept is not None:
                context.save_prompt(context.tasks[name], templates[name], found)

        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            template, found = templates[task.name], learned[task.name]
            row = context.row(task, template, found.dev, epochs=found.epochs, diverged=found.diverged)
            kept = found.kept
            return {"p-tuning": Scored(row, None if kept is None else context.answer(task, template, "test", kept))}

        context.each_task(self.columns, score, title="test")
