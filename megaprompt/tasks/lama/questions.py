"""The facts that can be asked of one backbone: those whose object is one token that counts as an answer, or, where
whole answers are ranked, all of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import Tokenization
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.seeds import seed_of
from megaprompt.tasks.candidates import LearnBy
from megaprompt.tasks.lama.facts import Data, Relation, read_vocabulary
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.lama.whole_answers import BestAnswer, WholeAnswers, WholeAnswersTask, examples_of
from megaprompt.tasks.search import Needs
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
        examples[split] = _limited(kept, limit, seed, relation.id, split)
        left_out[OVER_THE_LIMIT] += len(kept) - len(examples[split])
    return examples, left_out


def _limited(examples: list[Example], limit: int | None, seed: int, *names: str) -> list[Example]:
    """At most so many of some examples, after a shuffle that depends on the seed and on their names."""
    if limit is None or len(examples) <= limit:
        return examples
    shuffled = list(examples)
    random.Random(seed_of(seed, *names, "limit")).shuffle(shuffled)
    return shuffled[:limit]


@dataclass(frozen=True)
class AskFor:
    """How facts are answered.

    Args:
        vocabulary: the tokens that count as answers; None if whole answers are ranked.
        among_allowed: see `OneToken`.
        learn_by: what training on whole answers makes small (`tasks.candidates`).
        begin: put the model's beginning-of-text token before every whole answer's sentence, even if its tokenizer
            does not.
        needs: what must be known of whole answers (`tasks.search`).
    """

    vocabulary: Vocabulary | None = None
    among_allowed: bool = False
    learn_by: LearnBy = "candidates"
    begin: bool = False
    needs: Needs = "rank"

    @property
    def answers(self) -> str:
        return "candidates" if self.vocabulary is None else "token"


def lama_tasks(
    data: Data,
    backbone: Backbone,
    ask_for: AskFor,
    *,
    names: Sequence[str],
    splits: Sequence[Split],
    limit: int | None,
    seed: int,
) -> dict[str, Task]:
    """The relations that are asked for (all if no names), with usable facts in all of `splits`.

    Args:
        limit: keep at most so many facts in each split, after a shuffle that depends on the seed.

    Raises:
        UsageError: a relation is unknown.
        MegapromptError: a relation that was asked for has no facts in the data or none that is usable, none has, or the
            answers or wordings of one make no sense.
    """
    tasks: dict[str, Task] = {}
    new_task = _task_maker(backbone, ask_for, limit, seed)
    for relation in data.select(names):
        task = new_task(relation)
        missing = [split for split in splits if not task.examples[split]]
        if not missing:
            tasks[relation.id] = task
            continue
        count = sum(len(relation.facts[split]) for split in missing)
        why = f"it has no facts in {'/'.join(missing)}"
        if count and ask_for.vocabulary is not None:
            why = (
                f"none of its {count} facts in {'/'.join(missing)} has an object that is one allowed token of "
                f"{backbone.name} ({ask_for.vocabulary.name})"
            )
        if not any(each.facts[split] for each in data.relations.values() for split in missing):
            raise MegapromptError(
                f"{data.name} has no facts in {'/'.join(missing)}; give --methods manual, or add facts"
            )
        if names or not count:
            raise MegapromptError(
                f"relation {relation.id} of {data.name}: {why}; add facts or leave it out with --relations"
            )
        logger.warning("relation %s is left out: %s", relation.id, why)
    if not tasks:
        assert ask_for.vocabulary is not None  # otherwise facts are never left out
        raise MegapromptError(
            f"no relation of {data.name} has an object in the vocabulary {ask_for.vocabulary.name} as one token of "
            f"{backbone.name}; choose another --vocab or --backbone, or --answers candidates"
        )
    return tasks


def _task_maker(backbone: Backbone, ask_for: AskFor, limit: int | None, seed: int) -> Callable[[Relation], Task]:
    """What makes tasks of relations; they have one objective together."""
    tokenization, vocabulary = backbone.tokenization, ask_for.vocabulary
    encoder = backbone.text_encoder()
    if vocabulary is not None:
        objective = OneToken(vocabulary.allowed, tokenization.text_of, among_allowed=ask_for.among_allowed)

        def by_token(relation: Relation) -> Task:
            examples, left_out = usable_facts(relation, tokenization, vocabulary, limit, seed)
            usable, _ = usable_facts(relation, tokenization, vocabulary)
            about = _about(relation, len(usable["test"]))
            return Task(relation.id, objective, encoder, examples, left_out=left_out, **about)

        return by_token
    begin = tokenization.beginning
    if ask_for.begin and backbone.causal and not encoder.prefix:
        if begin is None:
            raise UsageError(f"--bos always: the tokenizer of {backbone.name} has no beginning-of-text token")
        encoder = encoder._replace(prefix=(begin,))
    candidates = (BestAnswer if ask_for.needs == "best" else WholeAnswers)(ask_for.learn_by, ask_for.needs)

    def by_candidates(relation: Relation) -> Task:
        found = examples_of(relation, encoder)
        examples = {split: _limited(found[split], limit, seed, relation.id, split) for split in SPLITS}
        left_out = {OVER_THE_LIMIT: sum(len(found[split]) - len(examples[split]) for split in SPLITS)}
        one_token = tokenization.single_tokens([fact.object for fact in relation.facts["test"]])
        about = _about(relation, sum(token is not None for token in one_token))
        end = "." if backbone.causal else ""  # else "New York" would be more likely than "New York City" by itself
        task = WholeAnswersTask(
            relation.id, candidates, encoder, examples, left_out=left_out, end=end, beginning=begin, seed=seed, **about
        )
        _check_wordings(task)
        return task

    return by_candidates


def _about(relation: Relation, one_token: int) -> dict[str, Any]:
    return {
        "label": relation.label,
        "type": relation.type,
        "manual": relation.template,
        "others": relation.wordings,
        "usable": {"token": one_token, "candidates": len(relation.facts["test"])},
    }


def _check_wordings(task: Task) -> None:
    for text in task.wordings:
        try:
            for example in task.examples["test"][:1]:
                task.instance(example, task.template(text))
        except UsageError as error:
            raise MegapromptError(
                f"relation {task.name}: {error}; mend the wording in the data, or leave it out with --relations"
            ) from error
