"""The facts that can be asked of one backbone: those whose object is one token that counts as an answer."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import Tokenization
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.seeds import seed_of
from megaprompt.tasks.lama.facts import Data, Relation, read_vocabulary
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.task import SPLITS, Example, Split, Task

logger = logging.getLogger(__name__)

NOT_ONE_TOKEN = "object is not one token"
NOT_IN_VOCABULARY = "object is not in the vocabulary"
OVER_THE_LIMIT = "over the limit"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that count as answers."""

    name: str
    allowed: Tensor  # bool [vocabulary]


def load_vocabulary(option: str, data: Data, tokenization: Tokenization) -> Vocabulary:
    """The allowed tokens that the option --vocab names: a file, `none`, or `auto`.

    Among all tokens a prompt without training loses to "the", so by default only words that are objects somewhere in
    the data compete, unless the data has a vocabulary of its own.

    Raises:
        UsageError: the file cannot be read, or none of its words is one token.
    """
    if option == "none":
        allowed = torch.ones(tokenization.vocabulary_size, dtype=torch.bool)
        allowed[[i for i in tokenization.tokenizer.all_special_ids if i < len(allowed)]] = (
            False  # no answers, in any model
        )
        return Vocabulary("all tokens", allowed)
    path = data.vocabulary if option == "auto" else Path(option)
    name = "objects of the data" if path is None else path.name
    words = data.objects if path is None else read_vocabulary(path)
    ids = [token for token in tokenization.single_tokens(words) if token is not None]
    if not ids:
        what = f"--data {data.name}: none of its objects" if path is None else f"--vocab {path}: none of its words"
        raise UsageError(f"{what} is one token of {tokenization.name}; give --vocab another file")
    allowed = torch.zeros(tokenization.vocabulary_size, dtype=torch.bool)
    allowed[ids] = True
    return Vocabulary(name, allowed)


def usable_facts(
    relation: Relation, tokenization: Tokenization, vocabulary: Vocabulary, limit: int | None = None, seed: int = 0
) -> tuple[dict[Split, list[Example]], dict[str, int]]:
    """The facts of a relation that can be asked, by split, and how many cannot, by the reason.

    Args:
        limit: keep at most so many in each split, after a shuffle that depends on the seed of the data.
    """
    left_out = dict.fromkeys((NOT_ONE_TOKEN, NOT_IN_VOCABULARY, OVER_THE_LIMIT), 0)
    examples: dict[Split, list[Example]] = {}
    for split in SPLITS:
        facts = relation.facts[split]
        kept = []
        for fact, token in zip(facts, tokenization.single_tokens([fact.object for fact in facts]), strict=True):
            if token is None:
                left_out[NOT_ONE_TOKEN] += 1
            elif not vocabulary.allowed[token]:
                left_out[NOT_IN_VOCABULARY] += 1
            else:
                kept.append(Example({"X": fact.subject}, fact.object, token))
        if limit is not None and len(kept) > limit:
            random.Random(seed_of(seed, relation.id, split, "limit")).shuffle(kept)
            left_out[OVER_THE_LIMIT] += len(kept) - limit
            kept = kept[:limit]
        examples[split] = kept
    return examples, left_out


def lama_tasks(
    data: Data,
    backbone: Backbone,
    vocabulary: Vocabulary,
    *,
    names: Sequence[str],
    splits: Sequence[Split],
    limit: int | None,
    seed: int,
    among_allowed: bool = False,
) -> dict[str, Task]:
    """The relations that are asked for (all if no names), with usable facts in all of `splits`.

    Args:
        among_allowed: see `OneToken`.

    Raises:
        UsageError: a relation is unknown.
        MegapromptError: a relation that was asked for has no facts in the data or none that is usable, or none has.
    """
    tasks: dict[str, Task] = {}
    objective, encoder = (
        OneToken(vocabulary.allowed, backbone.tokenization.text_of, among_allowed=among_allowed),
        backbone.text_encoder(),
    )
    for relation in data.select(names):
        name = relation.id
        examples, left_out = usable_facts(relation, backbone.tokenization, vocabulary, limit, seed)
        missing = [split for split in splits if not examples[split]]
        if not missing:
            about: dict[str, Any] = {"label": relation.label, "type": relation.type, "left_out": left_out}
            about |= {"manual": relation.template, "others": relation.wordings}
            tasks[name] = Task(name, objective, encoder, examples, **about)
            continue
        count = sum(len(relation.facts[split]) for split in missing)
        why = (
            f"none of its {count} facts in {'/'.join(missing)} has an object that is one allowed token of "
            f"{backbone.name} ({vocabulary.name})"
            if count
            else f"it has no facts in {'/'.join(missing)}"
        )
        if names or not count:
            raise MegapromptError(f"relation {name} of {data.name}: {why}; add facts or leave it out with --relations")
        logger.warning("relation %s is left out: %s", name, why)
    if not tasks:
        raise MegapromptError(
            f"no relation of {data.name} has an object in the vocabulary {vocabulary.name} as one token of "
            f"{backbone.name}; choose another --vocab or --backbone"
        )
    return tasks
