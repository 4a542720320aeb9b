"""Discrete prompts from files: mined or paraphrased by others (LPAQA), found by search (AutoPrompt), or hand-written.

A file has a line of JSON for each prompt, with `relation`, `template` and perhaps `weight`; a directory
has such a file for each relation, P36.jsonl, which need not repeat its name. Scored are, as in LPAQA (arXiv 1911.12543,
section 4): the prompt that is best on the training facts, and, of several, all together, by the weighted mean of their
log-probabilities (equal weights if none are given).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaprompt.engine.passes import Questions, answers, joint_answers
from megaprompt.errors import UsageError
from megaprompt.files import read_jsonl
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.prompting.template import FACT, Template
from megaprompt.tasks.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiscretePrompt:
    """One wording of a task, in the notation of templates."""

    text: str
    weight: float = 1.0


def read_discrete_prompts(
    path: Path, option: str = "discrete", fields: Sequence[str] = FACT
) -> dict[str, list[DiscretePrompt]]:
    """The prompts of each task, whose templates have these fields.

    Args:
        option: what the user knows it by.

    Raises:
        UsageError: there are none, or one is no template, or has pseudo tokens.
        MegapromptError: a file cannot be read.
    """
    found: dict[str, list[DiscretePrompt]] = {}
    for file in prompt_files(path):
        for number, row in read_jsonl(file, required=("template",)):
            try:
                template = Template.parse(row["template"], fields)
                prompt = DiscretePrompt(template.text, float(row.get("weight", 1.0)))
            except (ValueError, TypeError, UsageError) as error:
                raise UsageError(f"--{option} {file}:{number}: {error}") from error
            if template.num_pseudo_tokens:
                raise UsageError(f"--{option} {file}:{number}: has pseudo tokens, which no file can hold")
            found.setdefault(row.get("relation") or file.stem, []).append(prompt)
    if not found:
        raise UsageError(f"--{option} {path}: holds no prompts; give a .jsonl file, or a directory of such files")
    return found


def prompt_files(path: Path) -> list[Path]:
    """The files of a directory of prompts, or the one that is given."""
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def usable_prompts(prompts: Sequence[DiscretePrompt], fits: Callable[[str], bool]) -> list[DiscretePrompt]:
    """The prompts that a backbone can read, each wording once, with weights that add up to 1."""
    distinct = list({prompt.text: prompt for prompt in prompts if fits(prompt.text)}.values())
    total = sum(prompt.weight for prompt in distinct)
    if total <= 0:
        return [DiscretePrompt(prompt.text, 1 / len(distinct)) for prompt in distinct]
    return [DiscretePrompt(prompt.text, prompt.weight / total) for prompt in distinct]


@dataclass(frozen=True)
class Discrete:
    """Score the prompt that is best on train and, if a task has several, all together.

    A task without any prompt that the backbone can read (causal ones cannot if a field is behind [Y]) gets its manual
    one.

    Args:
        name: what the prompts are called.
        prompts: by task.
    """

    name: str
    prompts: Mapping[str, Sequence[DiscretePrompt]] = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        several = any(len(prompts) > 1 for prompts in self.prompts.values())
        return (f"{self.name} best", f"{self.name} ensemble") if several else (self.name,)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable(self.name)
            if not self._usable(task):
                _ = task.manual_template
                if self.prompts.get(task.name):
                    model = context.backbone.name
                    logger.warning(
                        "%s: %s can read none of %s; its manual prompt stands in", self.name, model, task.name
                    )

    def _usable(self, task: Task) -> list[DiscretePrompt]:
        def fits(text: str) -> bool:
            try:
                return bool(task.instance(task.examples["test"][0], task.template(text)).queries[0].tokens)
            except UsageError:
                return False

        return usable_prompts(self.prompts.get(task.name, ()), fits)

    def run(self, context: Context) -> None:
        best_column, *joint_column = self.columns

        def score(task: Task, _: ShouldStop) -> dict[str, Scored]:
            found = self._usable(task)
            wordings = found or [DiscretePrompt(task.manual_template.text)]
            templates = [task.template(prompt.text) for prompt in wordings]
            best = templates[_best_on_train(context, task, templates)]
            row = context.row(task, best, prompts=len(found))
            scored = {best_column: Scored(row, context.answer(task, best, "test"))}
            for column in joint_column:
                scored[column] = scored[best_column]
                if len(wordings) > 1:
                    test = [task.instances("test", template) for template in templates]
                    weights = [prompt.weight for prompt in wordings]
                    together = joint_answers(context.at(task), test, weights, task.objective)
                    scored[column] = Scored(row | {"template": f"{len(wordings)} prompts"}, together)
            return scored

        context.each_task(self.columns, score, title=self.name)


def _best_on_train(context: Context, task: Task, templates: Sequence[Template]) -> int:
    """Which of the prompts is best on the training examples of a task, by the metrics that choose."""
    if len(templates) == 1:
        return 0
    wordings = [Questions(task.instances("train", template), task.objective) for template in templates]
    found = answers(context.at(task), wordings, None)  # all at once, since they share beginnings
    scores = [context.measure(task, "train", each) for each in found]
    return max(range(len(scores)), key=lambda i: [scores[i][name] for name in task.objective.selects])
