"""SuperGLUE's tasks on one backbone: examples, patterns and objectives put together."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence

from megaprompt.backbone import Backbone
from megaprompt.errors import UsageError
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.seeds import seed_of
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

_SPARE = 3  # masks, at most, with which a masked model learns that they stay empty
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

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenization.tokenizer.decode(list(tokens), skip_special_tokens=True))

    longest = max(length(example.given or "") for split in ("dev", "test") for example in data.examples[split])
    return Written(kind, length, decode, longest, tokenization.tokenizer.pad_token_id)


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
        return super().demonstrations([each._replace(answer=self.objective.text_of(each) or "") for each in examples])

    @property
    def showable(self) -> Sequence[int]:
        assert isinstance(self.objective, OneOfSeveral)
        return [i for i, each in enumerate(self.examples["train"]) if self.objective.text_of(each) is not None]


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
        right = [example for example in self.examples["train"] if example.gold]
        given = (example._replace(candidates=(example.given or "",)) for example in right)
        found = (self.instance(example, template, before) for example in given)
        return [self._with_spare_masks(one, example) for one, example in zip(found, right, strict=True)]

    def _with_spare_masks(self, instance: Instance, example: Example) -> Instance:
        """A masked model also learns to leave masks empty, of which it has more than it needs when it is asked: up to
        three, as in the original code, which draws their number anew in every epoch."""
        [query] = instance.queries
        spare = random.Random(seed_of("spare masks", *example.key)).randrange(_SPARE + 1)
        if not query.bidirectional or self.objective.pad is None or not spare:
            return instance
        query = _with_more_masks(query, spare)._replace(labels=(*query.labels, *[self.objective.pad] * spare))
        return instance._replace(queries=(query,))

    def _asked(self, example: Example, template: Template, before: str) -> Instance:
        assert example.given is not None
        right = example.candidates[0] if example.candidates else None  # which is given in training
        spare = _SPARE if self.encoder.mask is not None else 0
        tokens = spare if right is not None else self.objective.tokens_to_write(example.given)
        room = self.most_tokens(before)
        room = None if room is None else room - tokens
        query = template.render(example.fields, self.encoder, answer=right, before=before, max_tokens=room)
        if right is not None:
            return Instance((query,), example.gold, example.group, given=example.given)
        if query.bidirectional:  # a mask for each token
            query = _with_more_masks(query, tokens - 1)
        return Instance((query,), example.gold, example.group, given=example.given)


def _with_more_masks(query: Query, count: int) -> Query:
    """A query of a masked model with so many more masks behind its last one, which are targets, too."""
    behind = query.targets[-1] + 1
    masks = query.tokens[behind - 1 : behind] * count
    tokens = (*query.tokens[:behind], *masks, *query.tokens[behind:])
    return query._replace(tokens=tokens, targets=(*query.targets, *range(behind, behind + count)))


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
