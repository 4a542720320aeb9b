"""Discrete prompts from files: mined or paraphrased by others (LPAQA), found by search (AutoPrompt), or hand-written.

A file has a line of JSON for each prompt, with `relation`, `template` ([X] and [Y]) and perhaps `weight`; a directory
has such a file for each relation, P36.jsonl, which need not repeat its name. Scored are, as in LPAQA (arXiv 1911.12543,
section 4): the prompt that is best on the training facts, and, of several, all together, by the weighted mean of their
log-probabilities (equal weights if none are given).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaprompt.errors import UsageError
from megaprompt.files import read_jsonl
from megaprompt.prompting.template import Template


@dataclass(frozen=True)
class DiscretePrompt:
    """One wording of a relation."""

    template: Template
    weight: float = 1.0


def read_discrete_prompts(path: Path) -> dict[str, list[DiscretePrompt]]:
    """The prompts of each relation.

    Raises:
        UsageError: there are none, or one has no place for subject or object.
        MegapromptError: a file cannot be read.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[str, list[DiscretePrompt]] = {}
    for file in paths:
        for number, row in read_jsonl(file, required=("template",)):
            try:
                prompt = DiscretePrompt(Template.parse(row["template"]), float(row.get("weight", 1.0)))
            except (ValueError, TypeError, UsageError) as error:
                raise UsageError(f"--discrete {file}:{number}: {error}") from error
            if prompt.template.num_pseudo_tokens:
                raise UsageError(f"--discrete {file}:{number}: has pseudo tokens, which no file can hold")
            found.setdefault(row.get("relation") or file.stem, []).append(prompt)
    if not found:
        raise UsageError(f"--discrete {path}: holds no prompts; give a .jsonl file, or a directory of such files")
    return found


def usable_prompts(prompts: Sequence[DiscretePrompt], fits: Callable[[Template], bool]) -> list[DiscretePrompt]:
    """The prompts that a backbone can read, each wording once, with weights that add up to 1."""
    distinct = list({prompt.template.text: prompt for prompt in prompts if fits(prompt.template)}.values())
    total = sum(prompt.weight for prompt in distinct)
    if total <= 0:
        return [DiscretePrompt(prompt.template, 1 / len(distinct)) for prompt in distinct]
    return [DiscretePrompt(prompt.template, prompt.weight / total) for prompt in distinct]
