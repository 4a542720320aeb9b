"""The packaged data: relations of countries, cities, airports, languages and elements, with manual prompts and splits.

The facts are made by `world_facts`. Answers are names that most vocabularies have as one token, as far as the world
allows: there are capitals that are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megaprompt.tasks.lama import world_facts
from megaprompt.tasks.lama.facts import SPLITS, Data, Fact, Relation, Split

NAME = "world"
_MOST: dict[Split, int] = {"train": 300, "dev": 110, "test": 110}


class _Source(NamedTuple):
    label: str
    type: str
    facts: Callable[[], Iterable[Fact]]
    wordings: tuple[str, ...]  # LAMA's own comes first, where LAMA has the relation


_SOURCES = {
    "P36": _Source(
        "capital",
        "1-1",
        world_facts.capitals,
        (
            "The capital of [X] is [Y] .",
            "The capital city of [X] is [Y] .",
            "[X] 's capital is [Y] .",
            "The country of [X] has its capital in [Y] .",
            "The government of [X] sits in its capital , [Y] .",
            "[X] is a country whose capital is called [Y] .",
            "[Y] is the capital of [X] .",
        ),
    ),
    "P30": _Source(
        "continent",
        "N-1",
        world_facts.continents,
        (
            "[X] is located in [Y] .",
            "[X] is located on the continent of [Y] .",
            "[X] is on the continent of [Y] .",
            "The place called [X] is located on the continent of [Y] .",
            "[X] belongs to the continent of [Y] .",
            "The continent of [X] is [Y] .",
            "[X] is a place in [Y] .",
            "Geographically , [X] is part of [Y] .",
        ),
    ),
    "P17": _Source(
        "country",
        "N-1",
        world_facts.countries,
        (
            "[X] is located in [Y] .",
            "[X] is located in the country of [Y] .",
            "[X] is in the country of [Y] .",
            "[X] is a place in the country of [Y] .",
            "The country in which [X] is located is [Y] .",
            "The place called [X] is in the country of [Y] .",
            "If you travel to [X] , you travel to [Y] .",
            "The country of [X] is [Y] .",
        ),
    ),
    "P47": _Source(
        "shares border with",
        "N-M",
        world_facts.borders,
        (
            "[X] shares border with [Y] .",
            "[X] shares a border with [Y] .",
            "The country of [X] shares a border with the country of [Y] .",
            "[X] borders [Y] .",
            "[X] is a neighbour of [Y] .",
            "The border of [X] is also the border of [Y] .",
            "From [X] one can cross the border to [Y] .",
        ),
    ),
    "P37": _Source(
        "official language",
        "N-1",
        world_facts.official_languages,
        (
            "The official language of [X] is [Y] .",
            "The main language of [X] is [Y] .",
            "The main language spoken in the country of [X] is [Y] .",
            "In [X] , most people speak [Y] .",
            "The people of [X] speak [Y] .",
            "Laws in [X] are written in [Y] .",
            "[Y] is the official language of [X] .",
        ),
    ),
    "P38": _Source(
        "currency",
        "N-1",
        world_facts.currencies,
        (
            "The currency of [X] is the [Y] .",
            "The official currency of [X] is the [Y] .",
            "The currency used in [X] is called the [Y] .",
            "In [X] , people pay with the [Y] .",
            "Prices in [X] are given in the local currency , the [Y] .",
            "The money of [X] is the [Y] .",
            "The [Y] is the currency of [X] .",
        ),
    ),
    "P131": _Source(
        "located in the state",
        "N-1",
        world_facts.states,
        (
            "[X] is located in [Y] .",
            "[X] is located in the state of [Y] .",
            "[X] is a city in the state of [Y] .",
            "[X] is a city in the U.S. state of [Y] .",
            "The city of [X] is located in the state of [Y] .",
            "The state in which [X] is located is [Y] .",
            "The mayor of [X] met the governor of [Y] .",
        ),
    ),
    "P421": _Source(
        "located in time zone",
        "N-1",
        world_facts.time_zones,
        (
            "[X] is located in the time zone [Y] .",
            "[X] is located in the [Y] time zone .",
            "[X] is in the [Y] Time Zone .",
            "The city of [X] is in the [Y] Time Zone .",
            "The time zone of [X] is [Y] Time .",
            "Clocks in [X] show [Y] Time .",
            "In [X] , the game starts at 8 p.m. [Y] Time .",
        ),
    ),
    "P1376": _Source(
        "capital of",
        "1-1",
        world_facts.capitals_of,
        (
            "[X] is the capital of [Y] .",
            "[X] is the capital city of [Y] .",
            "[X] is the capital of the country of [Y] .",
            "The city of [X] is the capital of [Y] .",
            "[X] is the seat of the government of [Y] .",
            "[X] is the capital and largest city of [Y] .",
            "The capital of [Y] is [X] .",
        ),
    ),
    "P2341": _Source(
        "indigenous to",
        "N-1",
        world_facts.homes_of_languages,
        (
            "[X] is a language spoken in [Y] .",
            "[X] is spoken in [Y] .",
            "The [X] language is spoken in [Y] .",
            "The [X] language is mainly spoken in the country of [Y] .",
            "[X] is a language of [Y] .",
            "The [X] language is indigenous to [Y] .",
            "Most speakers of [X] live in [Y] .",
        ),
    ),
    "P297": _Source(
        "ISO country code",
        "1-1",
        world_facts.country_codes,
        (
            "The ISO country code of [X] is [Y] .",
            "The country code of [X] is [Y] .",
            "The two-letter country code of [X] is [Y] .",
            "[X] has the ISO 3166-1 alpha-2 code [Y] .",
            "The country [X] is abbreviated as [Y] .",
            "Country : [X] , code : [Y] .",
        ),
    ),
    "P246": _Source(
        "element symbol",
        "1-1",
        world_facts.symbols,
        (
            "The chemical symbol of [X] is [Y] .",
            "The symbol of the element [X] is [Y] .",
            "The symbol for [X] in the periodic table is [Y] .",
            "[X] is a chemical element with the symbol [Y] .",
            "In chemical formulas , [X] is written as [Y] .",
            "Element : [X] , symbol : [Y] .",
        ),
    ),
}


def world() -> Data:
    """The packaged data.

    A subject is in the same split for every relation, by a hash: 40 % are train, 20 % dev, 40 % test, since the world
    has only so many countries. Facts in which one name is part of the other (Mexico City, Mexico) are left out, as in
    LAMA-UHN (Poerner et al., 2020). Of a split of a relation, the first 300 facts in train and 110 in dev and test are
    kept, those whose object is one word before others.
    """
    relations = {}
    for relation, source in _SOURCES.items():
        template, *others = source.wordings
        splits: dict[Split, list[Fact]] = {split: [] for split in SPLITS}
        for fact in _told(source):
            splits[_split_of(fact.subject)].append(fact)
        kept = {
            split: sorted(sorted(facts, key=lambda fact: " " in fact.object)[: _MOST[split]])
            for split, facts in splits.items()
        }
        relations[relation] = Relation(relation, source.label, source.type, template, kept, tuple(others))
    return Data(NAME, relations)


def _told(source: _Source) -> Iterator[Fact]:
    """The facts, each once; of a subject only the first (Kingston in Jamaica), unless it has several objects."""
    seen: set[object] = set()
    for fact in source.facts():
        key = fact if source.type == "N-M" else fact.subject
        subject, object_ = (f" {name} ".casefold() for name in fact)
        if key not in seen and subject not in object_ and object_ not in subject:
            yield fact
        seen.add(key)


def _split_of(subject: str) -> Split:
    bucket = hashlib.sha256(subject.encode()).digest()[0] % 5
    return "train" if bucket > 2 else "dev" if bucket == 2 else "test"
