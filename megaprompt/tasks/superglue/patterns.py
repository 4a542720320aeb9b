"""Patterns and verbalizers are data: `patterns.toml` has those of the papers, and a file of the user's adds others.

[RTE]
manual = "mine"                    # which pattern is the manual prompt; `learned` likewise for learned prompts
compared = ["mine", "pet-4"]       # which patterns best-manual chooses from; those of PET if it does not say

[RTE.patterns]
mine = "[premise...] So [hypothesis] [Y]"
other = { template = "[premise...] <2> [hypothesis] <2> [Y]", words = { entailment = "so", not_entailment = "but" } }
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprompt.errors import UsageError
from megaprompt.prompting.template import Template
from megaprompt.tasks.superglue.kinds import KINDS

PACKAGED = Path(__file__).with_name("patterns.toml")
SEPARATOR = "\n"
"""What parts two texts for a model that has no separator of its own."""
_SETTINGS = ("manual", "learned", "compared", "max_tokens", "words", "patterns")
_NO_WORDS = ("COPA", "WSC")
"""Whose answers are texts."""


@dataclass(frozen=True)
class Pattern:
    """One wording of a task.

    Args:
        fields: of the task.
        words: by answer; none where answers are texts.
    """

    name: str
    text: str
    fields: tuple[str, ...]
    words: Mapping[str, str]

    def template(self, causal: bool, separator: str = SEPARATOR) -> Template:
        """As a kind of model reads it.

        A causal model stops at the answer, unless fields or learned tokens stand behind it: words there tell nothing
        of the answer.
        """
        template = Template.parse(re.sub(r"\s*\[SEP\]\s*", lambda _: separator, self.text), self.fields)
        before, _, behind = template.text.partition("[Y]")
        if causal and behind in template.pieces:  # nothing but words
            return Template.parse(f"{before}[Y]", self.fields)
        return template


@dataclass(frozen=True)
class Patterns:
    """The patterns of one task, and which of them are used.

    Args:
        compared: manual prompts of which the mean and the best are reported.
    """

    patterns: Mapping[str, Pattern]
    manual: Pattern
    learned: Pattern
    compared: tuple[Pattern, ...]
    max_tokens: int


def read_patterns(path: Path | None) -> dict[str, Patterns]:
    """The patterns of all tasks.

    Args:
        path: the user's file, if any.

    Raises:
        UsageError: it cannot be read, or something in it makes no sense.
    """
    given = _tables(PACKAGED)
    for task, table in (_tables(path) if path is not None else {}).items():
        patterns = given[task]["patterns"] | table.pop("patterns", {})
        given[task] |= {**table, "patterns": patterns}
    return {task: _patterns(task, table, path or PACKAGED) for task, table in given.items()}


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--patterns {path}: cannot be read as TOML ({' '.join(str(error).split())})") from error
    for task, table in tables.items():
        if task not in KINDS or not isinstance(table, dict):
            raise UsageError(f"--patterns {path}: {task} is no task; give tables [{'], ['.join(KINDS)}]")
        if unknown := table.keys() - set(_SETTINGS):
            raise UsageError(f"--patterns {path}: [{task}] has {min(unknown)}; it may have {', '.join(_SETTINGS)}")
        if not isinstance(table.get("patterns", {}), dict):
            raise UsageError(f"--patterns {path}: [{task}] patterns has to be a table of names and patterns")
    return tables


def _patterns(task: str, table: Mapping[str, Any], path: Path) -> Patterns:
    patterns = {
        name: _pattern(task, name, given, table.get("words", {}), path) for name, given in table["patterns"].items()
    }
    chosen = {}
    for use in ("manual", "learned"):
        if not isinstance(table[use], str) or table[use] not in patterns:
            raise UsageError(
                f"--patterns {path}: [{task}] {use} = {table[use]!r} is no pattern; choose from {', '.join(patterns)}"
            )
        chosen[use] = patterns[table[use]]
    compared = _compared(task, table.get("compared"), patterns, path)
    if chosen["manual"].template(False).num_pseudo_tokens:
        raise UsageError(f"--patterns {path}: [{task}] manual = {table['manual']!r} has learned tokens; choose another")
    if type(table["max_tokens"]) is not int or table["max_tokens"] < 1:
        raise UsageError(f"--patterns {path}: [{task}] max_tokens has to be a number above 0")
    return Patterns(patterns, **chosen, compared=compared, max_tokens=table["max_tokens"])


def _compared(task: str, names: Any, patterns: Mapping[str, Pattern], path: Path) -> tuple[Pattern, ...]:
    where = f"--patterns {path}: [{task}] compared"
    if names is None:
        names = [name for name in patterns if name.startswith("pet-")]
    if not isinstance(names, list) or not names:
        raise UsageError(f"{where}: give a list of patterns, some of {', '.join(patterns)}")
    for name in names:
        if not isinstance(name, str) or name not in patterns:
            raise UsageError(f"{where}: {name!r} is no pattern; choose from {', '.join(patterns)}")
        if patterns[name].template(False).num_pseudo_tokens:
            raise UsageError(f"{where}: {name!r} has learned tokens; take another")
    return tuple(patterns[name] for name in dict.fromkeys(names))


_FIELD = re.compile(r"\[(\w[^\[\]]*?)~?(?:\.\.\.)?\]")


def _pattern(task: str, name: str, given: Any, words: Any, path: Path) -> Pattern:
    where = f"--patterns {path}: [{task}] {name}"
    if isinstance(given, dict) and given.keys() <= {"template", "words"}:
        words = given.get("words", words)
        given = given.get("template")
    if not isinstance(given, str):
        raise UsageError(f"{where}: give a pattern, or {{ template = ..., words = ... }}")
    kind = KINDS[task]
    wanted = () if task in _NO_WORDS else kind.answers
    if not isinstance(words, dict) or {*words} != {*wanted} or not all(isinstance(w, str) for w in words.values()):
        raise UsageError(f"{where}: words has to have one for each of {', '.join(wanted) or 'none'}")
    if len({*words.values()}) < len(words):
        raise UsageError(f"{where}: two answers have the same word; give each its own")
    for field in _FIELD.findall(given):
        if field not in (*kind.fields, "Y", "SEP"):
            raise UsageError(f"{where}: [{field}] is no field of {task}; it has {', '.join(kind.fields)}")
    pattern = Pattern(name, given, kind.fields, words)
    try:
        pattern.template(causal=False)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return pattern
