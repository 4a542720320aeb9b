"""What is asked: examples, the instances that a template makes of them, and tasks that hold them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.query import Query, TextEncoder
from megaprompt.prompting.template import FACT, Template, default_template
from megaprompt.tasks.objective import Answers, Objective

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


Way = Literal["learned", "alone"]
"""With learned prompts; or the fields alone, for a model that is trained to understand them so."""


class Example(NamedTuple):
    """One thing to ask, in words."""

    fields: Mapping[str, str]  # the text of each field of a template
    answer: str  # the right one
    gold: int  # the right one: a token of the vocabulary, a class, or the place among the candidates
    candidates: tuple[str, ...] = ()  # answers to choose from; each makes a query of its own
    group: str | None = None  # of examples that are scored together, such as the answers to one question
    given: str | None = None  # an answer that is to be judged
    key: tuple[int, ...] = ()  # its numbers in the data


class Instance(NamedTuple):
    """An example as the backbone reads it: one query, or one or more for each candidate."""

    queries: tuple[Query, ...]
    gold: int
    group: str | None = None
    candidates: tuple[int, ...] = ()  # which candidate each query belongs to; none if each has one query
    given: str | None = None


@dataclass(frozen=True)
class Task:
    """A relation, or another kind of question, with the examples that can be scored on one backbone."""

    name: str
    objective: Objective
    encoder: TextEncoder
    examples: Mapping[Split, Sequence[Example]] = field(repr=False)
    fields: tuple[str, ...] = FACT
    label: str = ""
    type: str = ""
    manual: str | None = None  # the template that came with the data
    learned: str | None = None  # likewise, with pseudo tokens
    others: tuple[str, ...] = ()  # more wordings that came with the data
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> examples of the data that cannot be scored
    usable: Mapping[str, int] = field(default_factory=dict)  # way to answer -> examples of test that can be asked so
    max_tokens: int | None = None  # of a query without demonstrations; longer ones are cut
    end: str = ""  # what closes a text behind the answer
    ways: Mapping[Way, Task] = field(default_factory=dict, repr=False)  # the same examples, asked for in other ways
    patterns: Mapping[str, Task] = field(default_factory=dict, repr=False)  # likewise, by manual prompts to compare

    def way(self, name: Way) -> Task:
        """The task as it is to be asked; where the data know of no other way, this one."""
        return self.ways.get(name, self)

    @property
    def places(self) -> list[str]:
        """The fields in the notation of templates; where queries have a limit, they may be cut."""
        return [f"[{name}{'...' * (self.max_tokens is not None)}]" for name in self.fields]

    def template(self, text: str) -> Template:
        """Read the notation of a template with this task's fields.

        Raises:
            UsageError: it has other places than the task.
        """
        return Template.parse(text, self.fields)

    def must_be_answerable(self, method: str) -> None:
        """See that the question can be answered without training.

        Raises:
            UsageError: it is answered by a head.
        """
        if self.objective.needs_training:
            why = "is answered by a head, which has to be trained; use p-tuning or fine-tuning"
            raise UsageError(f"--methods {method}: {self.name} {why}")

    def must_be_learnable(self, method: str) -> None:
        """See that the training examples can teach the task; all do, unless a kind of task says something else.

        Raises:
            UsageError: they cannot.
        """

    @property
    def manual_template(self) -> Template:
        """The prompt that came with the data.

        Raises:
            MegapromptError: there is none.
        """
        if self.manual is None:
            raise MegapromptError(
                f"relation {self.name} has no manual prompt: add it to relations.jsonl, or use --methods p-tuning"
            )
        return self.template(self.manual)

    def manual_with_pseudo_tokens(self) -> tuple[Template, list[int]]:
        """The same with a pseudo token for each of its tokens, and these tokens."""
        return self.manual_template.with_pseudo_tokens(self.encoder)

    @property
    def wordings(self) -> tuple[str, ...]:
        """All templates that came with the data."""
        return tuple(text for text in (self.manual, *self.others) if text is not None)

    def readable(self, texts: Sequence[str]) -> list[Template]:
        """The templates, each once, that the backbone can read: a causal one reads no field behind [Y]."""
        found = []
        for text in dict.fromkeys(texts):
            try:
                template = self.template(text)
                for example in self.examples["test"][:1]:
                    self.instance(example, template)
            except UsageError:
                continue
            found.append(template)
        return found

    @property
    def bare_template(self) -> Template:
        """The fields alone, for a model that is trained to understand them so."""
        return self.template(" ".join([*self.places, f"[Y]{self.end}"]))

    def default_template(self, causal: bool) -> Template:
        """The paper's template with pseudo tokens, for a kind of model."""
        return self.template(default_template(causal, self.places) + self.end)

    def demonstrations(self, examples: Sequence[Example]) -> str:
        """Examples with their answers in the manual prompt, one a line: text to stand before a question.

        Raises:
            MegapromptError: there is no manual prompt.
        """
        return "".join(f"{self.manual_template.fill(each.fields, each.answer)}\n" for each in examples)

    @property
    def showable(self) -> Sequence[int]:
        """The places in train of examples that can be demonstrations, since their answers are known."""
        return range(len(self.examples["train"]))

    def shown(self, places: Sequence[int]) -> str:
        """The demonstrations that stand in these places of train."""
        return self.demonstrations([self.examples["train"][i] for i in places])

    def most_tokens(self, before: str) -> int | None:
        """Of a query behind some text; None if there is no limit."""
        if self.max_tokens is None:
            return None
        return self.max_tokens + (len(self.encoder.encode(before, True)) if before else 0)

    def instances(self, split: Split, template: Template, before: str = "") -> list[Instance]:
        """The examples of one split, asked with a template behind some text, such as demonstrations.

        Raises:
            UsageError: the template does not suit the backbone, or an example does not fit.
        """
        return [self.instance(example, template, before) for example in self.examples[split]]

    def training_instances(self, template: Template, before: str = "") -> list[Instance]:
        """The examples of train, as they are learned from."""
        return self.instances("train", template, before)

    def submission(self, answers: Answers) -> list[dict[str, Any]] | None:
        """Answers on test as lines of the data's own format for them; None if there is no such format."""
        return None

    def instance(self, example: Example, template: Template, before: str = "") -> Instance:
        """One example, asked with a template behind some text.

        Raises:
            UsageError: as `instances`.
        """
        most = self.most_tokens(before)
        queries = tuple(
            template.render(example.fields, self.encoder, answer=answer, before=before, max_tokens=most)
            for answer in example.candidates or (None,)
        )
        return Instance(queries, example.gold, example.group, given=example.given)
