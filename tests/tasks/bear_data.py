"""Made-up facts in BEAR's layout."""

from __future__ import annotations

import json
from pathlib import Path

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "South Korea": "Seoul city",
    "South Sudan": "Juba", "North Macedonia": "Skopje", "the Vatican": "the Vatican itself",
}  # fmt: skip
MORE_CAPITALS = {
    "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana", "Austria": "Vienna", "Greece": "Athens",
    "Iceland": "Reykjavik", "Fiji": "Suva", "Kenya": "Nairobi", "Malta": "Valletta", "Chad": "N'Djamena",
    "Laos": "Vientiane",
}  # fmt: skip
CONTINENTS = {
    "France": "Europe", "Italy": "Europe", "Japan": "Asia", "South Korea": "Asia", "Peru": "South America",
    "Chad": "Africa", "Egypt": "Africa", "Brazil": "South America",
}  # fmt: skip
MORE_CONTINENTS = {
    "Spain": "Europe", "Norway": "Europe", "Greece": "Europe", "Laos": "Asia", "Kenya": "Africa", "Cuba": "America",
    "Fiji": "Oceania", "Malta": "Europe", "South Sudan": "Africa", "Austria": "Europe",
}  # fmt: skip
WORDINGS = {
    "P36": ["The capital of [X] is [Y].", "[Y] is the capital of [X].", "[X]'s capital is [Y], as is known."],
    "P30": ["[X] is in [Y].", "[X] is a part of [Y].", "The continent of [X]: [Y]."],
}


def write_bear(path: Path) -> Path:
    """A directory with BEAR and BEAR-big, which has BEAR's facts as well."""
    write_relations(path / "BEAR", {"P36": CAPITALS, "P30": CONTINENTS}, with_answers=True)
    big = {"P36": CAPITALS | MORE_CAPITALS, "P30": CONTINENTS | MORE_CONTINENTS}
    write_relations(path / "BEAR-big", big, with_answers=False)
    return path


def write_relations(path: Path, relations: dict[str, dict[str, str]], with_answers: bool) -> None:
    path.mkdir(parents=True)
    metadata = {}
    for name, pairs in relations.items():
        answers = list(dict.fromkeys(pairs.values()))
        metadata[name] = {"templates": WORDINGS[name]} | ({"answer_space_labels": answers} if with_answers else {})
        rows = [
            {"sub_id": f"Q-{subject}", "sub_label": subject, "sub_aliases": [], "obj_id": f"Q-{answer}"}
            | {"obj_label": answer}
            | ({"answer_idx": answers.index(answer)} if with_answers else {})
            for subject, answer in pairs.items()
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "metadata_relations.json").write_text(json.dumps(metadata), encoding="utf-8")
