"""Reads SuperGLUE's files, and FewGLUE's, which have the same format: a line of JSON for each example.

BoolQ/train.jsonl  BoolQ/dev32.jsonl  BoolQ/val.jsonl  CB/train.jsonl  ...
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import read_jsonl
from megaprompt.seeds import seed_of
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.task import SPLITS, Example, Split

Setting = Literal["few-shot", "full"]
SelectOn = Literal["dev", "validation"]
OVER_THE_LIMIT = "over the limit"
_DEV_SHARE = 10  # of full training data, one in so many rows is kept to choose on


@dataclass(frozen=True)
class TaskData:
    """The examples of one task."""

    name: str
    examples: Mapping[Split, list[Example]] = field(repr=False)
    left_out: Mapping[str, int]
    files: tuple[Path, ...] = ()


def read_superglue(
    root: Path,
    setting: Setting,
    names: Sequence[str] = (),
    *,
    select_on: SelectOn = "dev",
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, TaskData]:
    """The tasks that are asked for (all if no names). Test is the validation set.

    Args:
        setting: few-shot reads dev32.jsonl; full keeps a tenth of the rows of train.jsonl to choose on.
        select_on: validation: dev is test, and full training data are all trained on.
        limit: keep at most so many examples in each split, or one group that is larger.

    Raises:
        UsageError: there is no such directory.
        MegapromptError: a file is missing or malformed; the message names file, line and field.
    """
    if not root.is_dir():
        raise UsageError(f"--data {root}: there is no such directory; give one with BoolQ/train.jsonl and others")
    return {name: _read_task(root, name, setting, select_on, limit, seed) for name in names or KINDS}


def _read_task(root: Path, name: str, setting: Setting, select_on: SelectOn, limit: int | None, seed: int) -> TaskData:
    files = [root / name / f"{file}.jsonl" for file in ("train", "val")]
    train, test = (_read_rows(file, name) for file in files)
    if select_on == "validation":
        dev = test
    elif setting == "few-shot":
        files.append(root / name / "dev32.jsonl")
        dev = _read_rows(files[-1], name)
    else:
        random.Random(seed_of(seed, name, "dev")).shuffle(train)
        count = max(1, len(train) // _DEV_SHARE)
        dev, train = train[:count], train[count:]
    left_out, examples = 0, {}
    for split, rows in zip(SPLITS, (train, dev, test), strict=True):
        every = [example for row in rows for example in row]
        if not every:
            raise MegapromptError(f"{root / name}: no examples are left for {split}; add rows, or leave {name} out")
        examples[split] = every if limit is None else _limited(every, limit, seed_of(seed, name, split, "limit"))
        left_out += len(every) - len(examples[split])
    if select_on == "validation":
        examples["dev"] = list(examples["test"])
    if name == "COPA":
        examples["train"] = [each for example in examples["train"] for each in (example, _mirrored(example))]
    return TaskData(name, examples, {OVER_THE_LIMIT: left_out} if limit is not None else {}, tuple(files))


def _read_rows(path: Path, name: str) -> list[list[Example]]:
    """The examples of each line: one, but for MultiRC."""
    if not path.is_file():
        remedy = f"leave {name} out with --tasks"
        if path.stem == "dev32":
            remedy = f"take FewGLUE with dev32.jsonl, or --setting full, or {remedy}"
        raise MegapromptError(f"{path}: there is no such file; {remedy}")
    read = _READERS.get(name, _plain)
    rows = [list(read(_Row(path, line, name, row))) for line, row in read_jsonl(path)]
    if not rows:
        raise MegapromptError(f"{path}: has no examples; leave {name} out with --tasks")
    return rows


def _limited(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most so many examples, in their order; a random choice of whole groups."""
    groups: dict[Any, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(i if example.group is None else example.group, []).append(i)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    kept = shuffled[0][:]
    for group in shuffled[1:]:
        if len(kept) + len(group) > limit:
            break
        kept += group
    return [examples[i] for i in sorted(kept)]


def _mirrored(example: Example) -> Example:
    """COPA's with its choices swapped, from which it is learned as well."""
    fields = {**example.fields, "choice1": example.fields["choice2"], "choice2": example.fields["choice1"]}
    gold = 1 - example.gold
    answer = KINDS["COPA"].answers[gold]
    return example._replace(fields=fields, answer=answer, gold=gold, candidates=example.candidates[::-1])


# ------------------------------------------------------------------------------------------------------------ one line


@dataclass(frozen=True)
class _Row:
    """A line of a file, or an object in it; mistakes are told with file, line and field."""

    path: Path
    line: int
    task: str
    values: Mapping[str, Any]
    within: str = ""  # where in the line

    def wrong(self, name: str, what: str) -> MegapromptError:
        return MegapromptError(f'{self.path}:{self.line}: "{self.within}{name}" {what}')

    def text(self, name: str, may_be_empty: bool = False) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not (value.strip() or may_be_empty):
            raise self.wrong(name, "is missing or not text; mend the line")
        return value.strip()

    def number(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int or value < 0:
            raise self.wrong(name, "is missing or no number from 0; mend the line")
        return value

    def object(self, name: str) -> _Row:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "is missing or no JSON object; mend the line")
        return _Row(self.path, self.line, self.task, value, f"{self.within}{name}.")

    def objects(self, name: str) -> list[_Row]:
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self.wrong(name, "is missing or no list of JSON objects; mend the line")
        within = (f"{self.within}{name}[{i}]." for i in range(len(value)))
        return [_Row(self.path, self.line, self.task, each, place) for each, place in zip(value, within, strict=True)]

    def label(self) -> int:
        """The place of the label among those of the task; True is not 1."""
        labels, value = KINDS[self.task].labels, self.values.get("label")
        for place, label in enumerate(labels):
            if type(value) is type(label) and value == label:
                return place
        known = ", ".join(str(label).lower() if isinstance(label, bool) else str(label) for label in labels)
        said = "is missing" if value is None else f"is {value!r}"
        raise self.wrong("label", f"{said}; the labels of {self.task} are {known}")


def _example(row: _Row, fields: Mapping[str, str], *key: int, **more: Any) -> Example:
    gold = row.label()
    return Example(fields, KINDS[row.task].answers[gold], gold, key=key, **more)


def _plain(row: _Row) -> Iterator[Example]:
    """BoolQ, CB, RTE and WiC."""
    yield _example(row, {name: row.text(name) for name in KINDS[row.task].fields}, row.number("idx"))


def _copa(row: _Row) -> Iterator[Example]:
    asked = row.text("question")
    if asked not in ("cause", "effect"):
        raise row.wrong("question", f"is {asked!r}, neither cause nor effect; mend the line")
    choices = [text[:1].lower() + text[1:] for text in (row.text("choice1"), row.text("choice2"))]
    fields = {"premise": row.text("premise"), "choice1": choices[0], "choice2": choices[1]}
    fields |= {"because/so": "because", "because/, so": "because"}
    if asked == "effect":
        fields |= {"because/so": "so", "because/, so": ", so"}
    candidates = tuple(choice.rstrip(string.punctuation) for choice in choices)
    for name, candidate in zip(("choice1", "choice2"), candidates, strict=True):
        if not candidate.strip():
            raise row.wrong(name, "has no words; mend the line")
    yield _example(row, fields, row.number("idx"), candidates=candidates)


def _multirc(row: _Row) -> Iterator[Example]:
    passage, text = row.number("idx"), row.object("passage").text("text")
    for question in row.object("passage").objects("questions"):
        asked, number = question.text("question"), question.number("idx")
        for answer in question.objects("answers"):
            fields = {"passage": text, "question": asked, "answer": answer.text("text", may_be_empty=True)}  # one is
            key = (passage, number, answer.number("idx"))
            yield _example(answer, fields, *key, group=f"{passage}/{number}")


def _wsc(row: _Row) -> Iterator[Example]:
    target, words = row.object("target"), row.text("text").split()
    span, pronoun = target.text("span1_text"), target.text("span2_text")
    start = target.number("span1_index")
    spans = (" ".join(words[i : i + len(span.split())]) for i in (start, start + 1, start - 1) if i >= 0)
    if not any(_letters(each).startswith(_letters(span)) for each in spans):  # Emma's
        raise target.wrong("span1_text", f"{span!r} does not stand at word {start} of the text; mend the line")
    at = target.number("span2_index")
    places = [place for place in (at, at + 1, at - 1) if 0 <= place < len(words)]
    place = next((i for i in places if words[i] == pronoun), None)
    if place is None:  # a comma may stand at it
        place = next((i for i in places if words[i].startswith(pronoun)), None)
        if place is None:
            raise target.wrong("span2_text", f"{pronoun!r} does not stand at word {at} of the text; mend the line")
        words[place : place + 1] = [pronoun, words[place].removeprefix(pronoun)]
    words[place] = f"*{words[place]}*"
    fields = {"text": " ".join(words), "pronoun": pronoun, "span": span}
    yield _example(row, fields, row.number("idx"), given=span)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


_READERS: Mapping[str, Callable[[_Row], Iterator[Example]]] = {"COPA": _copa, "MultiRC": _multirc, "WSC": _wsc}
