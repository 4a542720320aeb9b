"""The facts that can be scored on one backbone: those whose object is one token that counts as an answer."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import Tokenization
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.template import Template
from megaprompt.seeds import seed_of
from megaprompt.tasks.lama.facts import SPLITS, Data, Fact, Relation, Split, read_vocabulary
from megaprompt.tasks.task import Examples

logger = logging.getLogger(__name__)

NOT_ONE_TOKEN = "object is not one token"
NOT_IN_VOCABULARY = "object is not in the vocabulary"
OVER_THE_LIMIT = "over the limit"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that count as answers."""

    name: str
    allowed: Tensor  # bool [vocabulary]


@dataclass(frozen=True)
class UsableRelation:
    """A relation with the facts that can be scored on one backbone: the object is one allowed token."""

    relation: Relation
    facts: dict[Split, list[Fact]]
    objects: dict[Split, list[int]]  # token ids, for each fact
    left_out: dict[str, int]  # reason -> facts

    def examples(self, split: Split, template: Template, backbone: Backbone) -> Examples:
        encoder = backbone.text_encoder()
        return Examples([template.render(f.subject, encoder) for f in self.facts[split]], self.objects[split])

    def majority(self) -> int | None:
        """The most frequent object among the training facts; None without training facts."""
        counts = Counter(self.objects["train"])
        return min(counts, key=lambda token: (-counts[token], token)) if counts else None


def load_vocabulary(option: str, data: Data, backbone: Tokenization) -> Vocabulary:
    """The allowed tokens that the option --vocab names: a file, `none`, or `auto`.

    Raises:
        UsageError: the file cannot be read, or none of its words is one token.
    """
    path = data.vocabulary if option == "auto" else None if option == "none" else Path(option)
    if path is None:
        allowed = torch.ones(backbone.vocabulary_size, dtype=torch.bool)
        allowed[[i for i in backbone.tokenizer.all_special_ids if i < len(allowed)]] = False  # no answers, in any model
        return Vocabulary("all tokens", allowed)
    ids = [token for token in backbone.single_tokens(read_vocabulary(path)) if token is not None]
    if not ids:
        raise UsageError(f"--vocab {path}: none of its words is one token of {backbone.name}; give another file")
    allowed = torch.zeros(backbone.vocabulary_size, dtype=torch.bool)
    allowed[ids] = True
    return Vocabulary(path.name, allowed)


def usable_relation(
    relation: Relation, backbone: Tokenization, vocabulary: Vocabulary, limit: int | None, seed: int
) -> UsableRelation:
    """Leave out, and count, the facts that cannot be scored or are over the limit."""
    facts: dict[Split, list[Fact]] = {}
    objects: dict[Split, list[int]] = {}
    left_out = dict.fromkeys((NOT_ONE_TOKEN, NOT_IN_VOCABULARY, OVER_THE_LIMIT), 0)
    for split in SPLITS:
        tokens = backbone.single_tokens([fact.object for fact in relation.facts[split]])
        kept = []
        for fact, token in zip(relation.facts[split], tokens, strict=True):
            if token is None:
                left_out[NOT_ONE_TOKEN] += 1
            elif not vocabulary.allowed[token]:
                left_out[NOT_IN_VOCABULARY] += 1
            else:
                kept.append((fact, token))
        if limit is not None and len(kept) > limit:
            random.Random(seed_of(seed, relation.id, split, "limit")).shuffle(kept)
            left_out[OVER_THE_LIMIT] += len(kept) - limit
            kept = kept[:limit]
        facts[split] = [fact for fact, _ in kept]
        objects[split] = [token for _, token in kept]
    return UsableRelation(relation, facts, objects, left_out)


def usable_relations(
    data: Data,
    backbone: Backbone,
    vocabulary: Vocabulary,
    *,
    names: Sequence[str],
    splits: Sequence[Split],
    limit: int | None,
    seed: int,
) -> dict[str, UsableRelation]:
    """The relations that are asked for (all if no names), with usable facts in all of `splits`.

    Raises:
        UsageError: a relation is unknown.
        MegapromptError: a relation that was asked for has no facts in the data or none that is usable, or none has.
    """
    usable: dict[str, UsableRelation] = {}
    for relation in data.select(names):
        name = relation.id
        found = usable_relation(relation, backbone, vocabulary, limit, seed)
        missing = [split for split in splits if not found.facts[split]]
        if not missing:
            usable[name] = found
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
    if not usable:
        raise MegapromptError(
            f"no relation of {data.name} has an object in the vocabulary {vocabulary.name} as one token of "
            f"{backbone.name}; choose another --vocab or --backbone"
        )
    return usable
