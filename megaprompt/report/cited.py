"""What the P-tuning paper says: the figures of its Table 2, its own and those that it takes from others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

SOURCE = "Liu et al., GPT Understands, Too, arXiv:2103.10385, version 1, Table 2"


@dataclass(frozen=True)
class Cited:
    """The paper's P@1, %, of one model (macro over relations)."""

    model: str  # the last part of its transformers name
    hidden_size: int  # tells it from another model in a directory of the same name
    scores: dict[str, float | str]  # by method


def _lama_29k(model: str, hidden_size: int, *scores: float | str, **others: float) -> Cited:
    methods = ("manual", "fine-tuning", "manual+fine-tuning", "p-tuning")
    return Cited(model, hidden_size, {**dict(zip(methods, scores, strict=True)), **others})


CITED = {
    "LAMA-34k": [
        Cited(
            "bert-base-cased",
            768,
            {"manual": 31.1, "lpaqa": 34.1, "e-bert": 36.2, "autoprompt": 43.3, "p-tuning": 48.3},
        ),
        Cited("bert-large-cased", 1024, {"manual": 32.3, "lpaqa": 39.4, "p-tuning": 50.6}),
    ],
    "LAMA-29k": [
        _lama_29k("bert-base-cased", 768, 31.7, 51.6, 52.1, 52.3, autoprompt=45.2),
        _lama_29k("bert-large-cased", 1024, 33.5, 54.0, 55.0, 54.6),
        _lama_29k("roberta-base", 768, 18.4, 49.2, 50.0, 49.3, autoprompt=40.0),
        _lama_29k("roberta-large", 1024, 22.1, 52.3, 52.4, 53.5),
        _lama_29k("gpt2-medium", 1024, 20.3, 41.9, 38.2, 46.5),
        _lama_29k("gpt2-xl", 1600, 22.8, 44.9, 46.5, 54.4),
        _lama_29k("megatron-11b", 3072, 23.1, "OOM", "OOM", 64.2),
    ],
}
RELATIONS = frozenset(
    f"P{number}"
    for number in (
        17, 19, 20, 27, 30, 31, 36, 37, 39, 47, 101, 103, 106, 108, 127, 131, 136, 138, 140, 159, 176, 178, 190, 264,
        276, 279, 361, 364, 407, 413, 449, 463, 495, 527, 530, 740, 937, 1001, 1303, 1376, 1412,
    )
)  # fmt: skip
"""LAMA's 41 of T-REx."""
FACTS_OF_THE_PAPER = {"LAMA-34k": "34,039", "LAMA-29k": "about 29,000"}
"""Test facts, over 41 relations."""


def paper_vocabulary(name: str) -> str | None:
    """LAMA-34k or LAMA-29k, if a vocabulary is called that: `29k-vocab.json` of the paper's code, `lama-34k.txt`."""
    found = re.search(r"(?<![0-9])(29|34)k(?![a-z0-9])", name, re.IGNORECASE)
    return f"LAMA-{found[1]}k" if found else None


def cited_scores(
    backbone: Mapping[str, Any], vocabulary: str | None, relations: Iterable[str]
) -> dict[str, float | str]:
    """The paper's figures, if it has any for this model with this vocabulary, and all relations are LAMA's."""
    if not set(relations) <= RELATIONS:
        return {}
    name = PurePath(backbone["name"]).name.lower().replace("_", "-")
    for cited in CITED.get(paper_vocabulary(vocabulary or "") or "", ()):
        if cited.model == name and cited.hidden_size == backbone["hidden_size"]:
            return cited.scores
    return {}
