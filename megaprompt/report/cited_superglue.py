"""What the P-tuning paper says of SuperGLUE: the figures of its Tables 3 to 6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

PAPER = "Liu et al., GPT Understands, Too, arXiv:2103.10385, version 1"
COLUMNS = (
    ("BoolQ", "accuracy"), ("CB", "accuracy"), ("CB", "macro_f1"), ("WiC", "accuracy"), ("RTE", "accuracy"),
    ("MultiRC", "em"), ("MultiRC", "f1a"), ("WSC", "accuracy"), ("COPA", "accuracy"),
)  # fmt: skip
"""Task and metric of the paper's columns, in its order."""


@dataclass(frozen=True)
class CitedLine:
    """A line of a table, %.

    Args:
        what: how the paper calls the method, and what one has to know of it.
        values: in the order of COLUMNS; as text where the paper has a deviation or nothing.
        average: None where the paper has none.
    """

    what: str
    values: tuple[float | str, ...]
    average: float | None = None


@dataclass(frozen=True)
class CitedTable:
    """The lines of one model."""

    table: int
    setting: Literal["few-shot", "full"]
    model: str  # the last part of its transformers name
    hidden_size: int  # tells it from another model in a directory of the same name
    lines: tuple[CitedLine, ...]


def _full(table: int, model: str, hidden_size: int, **lines: tuple[float, ...]) -> CitedTable:
    """Of Tables 3 and 4, whose last column is the average."""
    names = {"ft": "fine-tuning", "mp": "MP zero-shot", "mp_ft": "MP fine-tuning", "p": "P-tuning, model tuned"}
    found = tuple(CitedLine(names[key], values[:-1], values[-1]) for key, values in lines.items())
    return CitedTable(table, "full", model, hidden_size, found)


CITED = (
    _full(
        3, "bert-base-cased", 768,
        ft=(72.9, 85.1, 73.9, 71.1, 68.4, 16.2, 66.3, 63.5, 67.0, 66.2),
        mp=(59.1, 41.1, 19.4, 49.8, 54.5, 0.4, 0.9, 62.5, 65.0, 46.0),
        mp_ft=(73.7, 87.5, 90.8, 67.9, 70.4, 13.7, 62.5, 60.6, 70.0, 67.1),
        p=(73.9, 89.2, 92.1, 68.8, 71.1, 14.8, 63.3, 63.5, 72.0, 68.4),
    ),
    _full(
        3, "gpt2", 768,
        ft=(71.2, 78.6, 55.8, 65.5, 67.8, 17.4, 65.8, 63.0, 64.4, 63.0),
        mp=(61.3, 44.6, 33.3, 54.1, 49.5, 2.2, 23.8, 62.5, 58.0, 48.2),
        mp_ft=(74.8, 87.5, 88.1, 68.0, 70.0, 23.5, 69.7, 66.3, 78.0, 70.2),
        p=(75.0, 91.1, 93.2, 68.3, 70.8, 23.5, 69.8, 63.5, 76.0, 70.4),
    ),
    _full(
        4, "bert-large-cased", 1024,
        ft=(77.7, 94.6, 93.7, 74.9, 75.8, 24.7, 70.5, 68.3, 69.0, 72.5),
        mp=(49.7, 50.0, 34.2, 50.0, 49.9, 0.6, 6.5, 61.5, 58.0, 45.0),
        mp_ft=(77.2, 91.1, 93.5, 70.5, 73.6, 17.7, 67.0, 80.8, 75.0, 73.1),
        p=(77.8, 96.4, 97.4, 72.7, 75.5, 17.1, 65.6, 81.7, 76.0, 74.6),
    ),
    _full(
        4, "gpt2-medium", 1024,
        ft=(71.0, 73.2, 51.2, 65.2, 72.2, 19.2, 65.8, 62.5, 66.0, 63.1),
        mp=(56.3, 44.6, 26.6, 54.1, 51.3, 2.2, 32.5, 63.5, 53.0, 47.3),
        mp_ft=(78.3, 96.4, 97.4, 70.4, 72.6, 32.1, 74.4, 73.0, 80.0, 74.9),
        p=(78.9, 98.2, 98.7, 69.4, 75.5, 29.3, 74.2, 74.0, 81.0, 75.6),
    ),
    CitedTable(
        5, "few-shot", "albert-xxlarge-v2", 4096,
        (
            CitedLine(
                "PET, mean of patterns",
                ("73.2 ± 3.1", "82.9 ± 4.3", "74.8 ± 9.2", "51.8 ± 2.7", "62.1 ± 5.3", "33.6 ± 3.2", "74.5 ± 1.2",
                 "79.8 ± 3.5", "85.3 ± 5.1"),
            ),
            CitedLine(
                "PET, best pattern, chosen on what is reported", (75.1, 86.9, 83.5, 52.6, 65.7, 35.2, 75.0, 80.4, 83.3)
            ),
            CitedLine("P-tuning, model tuned", (77.8, 92.9, 92.3, 56.3, 76.5, 36.1, 75.0, 84.6, 87.0)),
            CitedLine("GPT-3, chosen on the full dev set", (77.5, 82.1, 57.2, 55.3, 72.9, 32.5, 74.8, 75.0, 92.0)),
            CitedLine(
                "PET, ensemble and distillation, full dev set", (79.4, 85.1, 59.4, 52.4, 69.8, 37.9, 77.3, 80.1, 95.0)
            ),
            CitedLine("iPET, full dev set", (80.6, 92.9, 92.4, 52.2, 74.0, 33.0, 74.0, "–", "–")),
        ),
    ),
)  # fmt: skip

TABLE_6 = {
    "table6-0": (57.16, 53.12),
    "table6-1": (51.38, 50.00),
    "table6-2": (68.59, 55.20),
    "table6-3": (70.15, 53.12),
    "P-tuning, model tuned": (76.45, 56.25),
}
"""RTE with albert-xxlarge-v2, few-shot: accuracy on the validation set and on dev32, %, by pattern."""


def cited_table(backbone: Mapping[str, Any], setting: str) -> CitedTable | None:
    """The paper's figures, if it has any for this model in this setting; `backbone` of results.json."""
    name = PurePath(backbone["name"]).name.lower().replace("_", "-")
    for cited in CITED:
        if (cited.model, cited.setting, cited.hidden_size) == (name, setting, backbone["hidden_size"]):
            return cited
    return None
