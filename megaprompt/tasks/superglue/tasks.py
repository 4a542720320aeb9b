"""SuperGLUE's tasks on one backbone: examples, patterns and objectives put together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from megaprompt.backbone import Backbone
from megaprompt.errors import UsageError
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.tasks.objective import Answers, Objective
from megaprompt.tasks.superglue.confident import ConfidentFirst
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.objectives import Classifier, Likeliest, OneOfSeveral, Verbalizer
from megaprompt.tasks.superglue.patterns import SEPARATOR, Pattern, Patterns
from megaprompt.tasks.superglue.reading import TaskData
from megaprompt.tasks.superglue.submission import submission
from megaprompt.tasks.superglue.written import Written
from megaprompt.tasks.task import Example, Instance, Task, Way

logger = logging.getLogger(__name__)

_CHOICE = "choice"
"""The field in which a classifier reads a candidate."""


def superglue_tasks(
    data: Mapping[str, TaskData], patterns: Mapping[str, Patterns], backbone: Backbone, compare: bool = False
) -> dict[str, Task]:
    """The tasks as their manual prompts ask them, with ways for learned prompts and for a classifier.

    Args:
        compare: also with each of the patterns to compare that the backbone can read.

    Raises:
        UsageError: a word that stands for a class is not one token.
    """
    return {name: _task(each, patterns[name], backbone, compare) for name, each in data.items()}


def _task(data: TaskData, patterns: Patterns, backbone: Backbone, compare: bool) -> Task:
    kind, causal = KINDS[data.name], backbone.causal
    token = backbone.tokenization.tokenizer.sep_token
    separator = SEPARATOR if causal or token is None else f" {token} "

    def asked_with(pattern: Pattern) -> tuple[Task, str]:
        task = (WrittenTask if data.name == "WSC" else SuperGlueTask)(
            data.name,
            _objective(data, pattern, backbone),
            backbone.text_encoder(),
            data.examples,
            kind.fields,
            label=data.name,
            left_out=data.left_out,
            max_tokens=patterns.max_tokens,
        )
        return task, pattern.template(causal, separator).text

    fields = (*kind.fields, _CHOICE, "span")
    alone = ClassifierTask(
        data.name,
        Classifier(kind, candidates=data.name == "COPA"),
        backbone.text_encoder(),
        data.examples,
        fields,
        manual=Pattern("alone", kind.alone, fields, {}).template(causal, separator).text,
        max_tokens=patterns.max_tokens,
    )
    task, manual = asked_with(patterns.manual)
    as_learned, learned = asked_with(patterns.learned)
    as_learned = dataclasses.replace(as_learned, learned=learned)
    compared: dict[str, Task] = {}
    for pattern in patterns.compared if compare else ():
        try:
            asked, text = asked_with(pattern)
            asked = dataclasses.replace(asked, manual=text)
            asked.instance(asked.examples["test"][0], asked.manual_template)
        except UsageError as error:
            logger.warning("pattern %s is left out: %s", pattern.name, error)
        else:
            compared[pattern.name] = asked
    ways: dict[Way, Task] = {"learned": as_learned, "alone": alone}
    return dataclasses.replace(task, manual=manual, ways=ways, patterns=compared)


def _objective(data: TaskData, pattern: Pattern, backbone: Backbone) -> Objective:
    kind, tokenization = KINDS[data.name], backbone.tokenization
    if pattern.words:
        words = [pattern.words[answer] for answer in kind.answers]
        tokens = tokenization.single_tokens(words)
        for word, token in zip(words, tokens, strict=True):
            if token is None:
                raise UsageError(
                    f"{data.name}, pattern {pattern.name}: {word!r} is not one token of {backbone.name}; give other "
                    f"words in a file for --patterns"
                )
        return Verbalizer(kind, words, [token for token in tokens if token is not None])
    if data.name == "COPA":
        return Likeliest(kind) if backbone.causal else ConfidentFirst(kind)

    def length(text: str) -> int:
        return len(tokenization.encode([f" {text}"], is_start=False)[0])

    longest = max(length(example.given or "") for split in ("dev", "test") for example in data.examples[split])
    return Written(kind, length, lambda tokens: str(tokenization.tokenizer.decode(list(tokens))), longest)


class SuperGlueTask(Task):
    """One whose answers are classes, or one of several candidates."""

    def must_be_learnable(self, method: str) -> None:
        golds = {example.gold for example in self.examples["train"]}
        if len(golds) == 1:
            only = KINDS[self.name].answers[golds.pop()]
            raise UsageError(
                f"--methods {method}: all training examples of {self.name} are {only}, from which no classes are "
                f"learned; add others, or leave {self.name} out with --tasks"
            )

    def submission(self, answers: Answers) -> list[dict[str, object]]:
        assert isinstance(self.objective, OneOfSeveral)
        return submission(self.name, self.examples["test"], self.objective.said(answers).tolist())

    def instance(self, example: Example, template: Template, before: str = "") -> Instance:
        try:
            return self._asked(example, template, before)
        except UsageError as error:
            raise UsageError(f"{self.name}, idx {'/'.join(map(str, example.key))}: {error}") from error

    def _asked(self, example: Example, template: Template, before: str) -> Instance:
        return super().instance(example, template, before)

    def demonstrations(self, examples: Sequence[Example]) -> str:
        assert isinstance(self.objective, OneOfSeveral)
        answers = (self.objective.text_of(example) for example in examples)
        told = [each._replace(answer=text) for each, text in zip(examples, answers, strict=True) if text is not None]
        return super().demonstrations(told)


class WrittenTask(SuperGlueTask):
    """WSC: learned from the answers of true statements; else the model has to write the answer."""

    objective: Written

    def must_be_learnable(self, method: str) -> None:
        if not any(example.gold for example in self.examples["train"]):
            raise UsageError(
                f"--methods {method}: no training example of {self.name} is True, and only these are learned from; "
                f"add some, or leave {self.name} out with --tasks"
            )

    def training_instances(self, template: Template, before: str = "") -> list[Instance]:
        right = (example for example in self.examples["train"] if example.gold)
        given = (example._replace(candidates=(example.given or "",)) for example in right)
        return [self.instance(example, template, before) for example in given]

    def _asked(self, example: Example, template: Template, before: str) -> Instance:
        if example.candidates:
            return super()._asked(example, template, before)
        assert example.given is not None
        tokens = self.objective.tokens_to_write(example.given)
        room = self.most_tokens(before)
        room = None if room is None else room - tokens
        query = template.render(example.fields, self.encoder, before=before, max_tokens=room)
        if query.bidirectional:  # a mask for each token
            [at] = query.targets
            masks = query.tokens[at : at + 1] * tokens
            query = Query(
                (*query.tokens[:at], *masks, *query.tokens[at + 1 :]), tuple(range(at, at + tokens)), bidirectional=True
            )
        return Instance((query,), example.gold, example.group, given=example.given)


class ClassifierTask(SuperGlueTask):
    """The fields alone, read as a whole: at the first token ([CLS]) of a masked model, at the last of a causal one."""

    @property
    def bare_template(self) -> Template:
        return self.manual_template

    def _asked(self, example: Example, template: Template, before: str) -> Instance:
        extra = [{_CHOICE: candidate} for candidate in example.candidates] or [{}]
        queries = (
            template.render(
                {**example.fields, **more}, self.encoder, before=before, max_tokens=self.most_tokens(before)
            )
            for more in extra
        )
        return Instance(tuple(map(_as_a_whole, queries)), example.gold, example.group)


def _as_a_whole(query: Query) -> Query:
    if not query.bidirectional:
        return query
    [mask] = query.targets
    return Query((*query.tokens[:mask], *query.tokens[mask + 1 :]), (0,), bidirectional=True)
