"""Facts whose object is a text of any length: which of the answers of a relation is the object?

The answers are the relation's answer space, if the data has one, else all its objects. The most likely sentence wins,
as in BEAR (arXiv 2404.04113) and its evaluator LM Pub Quiz: each answer is put into the template, and the first letter
of the sentence is made a capital. What stands before the answer is the same in all of them and is not counted, except
by masked models, whose pseudo log-likelihood is that of the whole sentence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaprompt.errors import MegapromptError
from megaprompt.prompting.query import Query, TextEncoder
from megaprompt.prompting.template import ANSWER, Place, Template, pseudo_likelihood
from megaprompt.seeds import seed_of
from megaprompt.tasks.candidates import Candidates, best, ranks
from megaprompt.tasks.lama.facts import Relation
from megaprompt.tasks.lama.one_token import OneToken, ranking_metrics
from megaprompt.tasks.objective import Answers
from megaprompt.tasks.task import SPLITS, Example, Instance, Split, Task

_OTHERS = 15  # candidates beside the right one that a training step compares it with


@dataclass(frozen=True, eq=False)
class WholeAnswers(Candidates):
    """The object is one of the answers.

    Args:
        top: how many of the best answers are told.
    """

    top: int = 10

    metrics = OneToken.metrics
    selects = OneToken.selects
    items = "facts"

    def answer(self, scores: Tensor, gold: Tensor, complete: Tensor | None = None) -> Answers:
        """Of each fact the `rank` of its object among the candidates (1 is best; 0 if it is only known not to be the
        best; the last if its score is no number) and its `log_probability` among them; `top` [facts, k] the best ones,
        best first, and their `top_log_probability` among them. Log-probabilities are not numbers where not all scores
        are known."""
        top, probabilities = best(scores, self.top)
        right = scores.gather(1, gold[:, None])[:, 0]
        no_rank = 0 if self.needs == "best" else scores.shape[1]
        unknown = torch.zeros_like(gold, dtype=torch.bool) if complete is None else ~complete.to(gold.device)
        found = {
            "rank": ranks(scores, gold).masked_fill(right == -torch.inf, no_rank),
            "log_probability": (right - scores.logsumexp(1)).double().masked_fill(unknown, torch.nan),
            "top": top,
            "top_log_probability": probabilities.double().masked_fill(unknown[:, None], torch.nan),
        }
        return {name: value.cpu() for name, value in found.items()}

    def measure(self, answers: Answers, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        """P@1, P@10 and mean reciprocal rank among the candidates."""
        return ranking_metrics(answers["rank"])

    def majority(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float | None]:
        # Candidates of train are others than those of test, so answers are compared by their text.
        texts = {text: i for i, text in enumerate(sorted({e.answer for e in (*train, *examples)}))}
        by_text = [[e._replace(gold=texts[e.answer]) for e in each] for each in (train, examples)]
        return super().majority(*by_text)

    def describe(self, example: Example, answers: Answers, i: int) -> dict[str, Any]:
        """Probabilities are None where not all candidates were scored, and so is a rank that is not known."""
        texts = [example.candidates[place] for place in answers["top"][i].tolist() if place >= 0]
        top = zip(texts, answers["top_log_probability"][i].exp().tolist(), strict=False)
        probability = answers["log_probability"][i].exp().item()
        return {
            "subject": example.fields["X"],
            "object": example.answer,
            "rank": int(answers["rank"][i]) or None,
            "probability": None if math.isnan(probability) else probability,
            "top": [[text, None if math.isnan(p) else round(p, 6)] for text, p in top],
        }


class BestAnswer(WholeAnswers):
    """The same where only the best answer is asked for: ranks are not known."""

    metrics = {"p_at_1": OneToken.metrics["p_at_1"]}  # noqa: RUF012 (constant)
    selects = ("p_at_1",)  # type: ignore[assignment]

    def measure(self, answers: Answers, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        """P@1 among the candidates."""
        return {"p_at_1": super().measure(answers, asked)["p_at_1"]}


@dataclass(frozen=True)
class WholeAnswersTask(Task):
    """A relation whose objects are texts.

    Args:
        beginning: the token that stands before sentences which start with the answer, if the encoder has none.
        seed: of the candidates that the right one is compared with in training.
    """

    beginning: int | None = None
    seed: int = 0

    def instance(self, example: Example, template: Template, before: str = "") -> Instance:
        return self._with(range(len(example.candidates)), example.gold, example, template, before)

    def manual_with_pseudo_tokens(self) -> tuple[Template, list[int]]:
        return self.manual_template.with_pseudo_tokens(self.encoder, given_answer=True)

    def training_instances(self, template: Template, before: str = "") -> list[Instance]:
        """With the right answer alone, where that is learned by; else with some of the others."""
        instances = []
        for i, example in enumerate(self.examples["train"]):
            chosen = [example.gold]
            if self._learns_by_candidates:
                others = [place for place in range(len(example.candidates)) if place != example.gold]
                chance = random.Random(seed_of(self.seed, self.name, "candidates", i))
                chosen += chance.sample(others, min(_OTHERS, len(others)))
            instances.append(self._with(chosen, 0, example, template, before))
        return instances

    @property
    def _learns_by_candidates(self) -> bool:
        assert isinstance(self.objective, Candidates)
        return self.objective.learn_by == "candidates"

    def _with(self, chosen: Sequence[int], gold: int, example: Example, template: Template, before: str) -> Instance:
        """An example with some of its candidates."""
        answer_only = len(chosen) == 1  # what stands around it is no part of the answer
        queries: list[Query] = []
        candidates: list[int] = []
        for place, i in enumerate(chosen):
            found = self._queries(example, template, example.candidates[i], answer_only, before)
            queries += found
            candidates += [place] * len(found)
        if self.encoder.mask is None:
            queries = _from_the_same_token(queries)
        return Instance(tuple(queries), gold, candidates=tuple(candidates))

    def _queries(
        self, example: Example, template: Template, answer: str, answer_only: bool, before: str
    ) -> tuple[Query, ...]:
        fields, encoder, first = dict(example.fields), self.encoder, template.pieces[0]
        if isinstance(first, Place) and first.name == ANSWER:
            answer = _capitalized(answer)
            if not (before or encoder.prefix) and self.beginning is not None:
                encoder = encoder._replace(prefix=(self.beginning,))
        elif isinstance(first, Place):
            fields[first.name] = _capitalized(fields[first.name])
        if encoder.mask is not None:
            return pseudo_likelihood(template, fields, encoder, answer=answer, before=before, answer_only=answer_only)
        return (template.render(fields, encoder, answer=answer, before=before),)


def _from_the_same_token(queries: Sequence[Query]) -> list[Query]:
    """Queries that are all scored from where the first of them is.

    Where a mark touches the answer from before, some answers share a token with it, which others leave to the mark.
    """
    first = min(query.targets[0] for query in queries)
    found = []
    for query in queries:
        more = range(first, query.targets[0])
        labels = (*(query.tokens[target + 1] for target in more), *query.labels)
        found.append(query._replace(targets=(*more, *query.targets), labels=labels) if more else query)
    return found


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------------------------- examples


def examples_of(relation: Relation, encoder: TextEncoder) -> dict[Split, list[Example]]:
    """The facts of a relation by split, each with its candidates.

    An answer space is that of test; in train and dev the candidates are then the objects of the split.

    Raises:
        MegapromptError: the answer space lacks an object, or cannot tell two answers apart.
    """
    everything = [fact.object for split in SPLITS for fact in relation.facts[split]]
    examples: dict[Split, list[Example]] = {}
    for split in SPLITS:
        facts = relation.facts[split]
        if relation.answers and split == "test":
            place_of = _places_in_answer_space(relation, encoder)
        else:
            place_of = _places([fact.object for fact in facts] if relation.answers else everything, encoder)
        text_at: dict[int, str] = {}
        for text, place in place_of.items():
            text_at.setdefault(place, text)
        candidates = tuple(text_at[place] for place in range(len(text_at)))
        examples[split] = [
            Example({"X": fact.subject}, fact.object, place_of[fact.object], candidates) for fact in facts
        ]
    return examples


def _places(texts: Sequence[str], encoder: TextEncoder) -> dict[str, int]:
    """The place of each text among candidates; texts with the same tokens are one candidate."""
    places: dict[tuple[int, ...], int] = {}
    return {text: places.setdefault(_tokens(text, encoder), len(places)) for text in sorted(set(texts))}


def _tokens(answer: str, encoder: TextEncoder) -> tuple[int, ...]:
    return tuple(encoder.encode(f" {answer.strip()}", False))


def _places_in_answer_space(relation: Relation, encoder: TextEncoder) -> dict[str, int]:
    answers = relation.answers
    about = f"relation {relation.id}: its answer space"
    mend = "mend metadata_relations.json, or leave the relation out with --relations"
    if twice := next((text for text in answers if answers.count(text) > 1), None):
        raise MegapromptError(f"{about} has {twice!r} twice; {mend}")
    if missing := next((fact.object for fact in relation.facts["test"] if fact.object not in answers), None):
        raise MegapromptError(f"{about} lacks {missing!r}, the object of a fact; {mend}")
    first_of: dict[tuple[int, ...], str] = {}
    for text in answers:
        same = first_of.setdefault(_tokens(text, encoder), text)
        if same != text:
            raise MegapromptError(f"{about} has {same!r} and {text!r}, which are the same tokens to this model; {mend}")
    return {text: place for place, text in enumerate(answers)}
