"""Averages over tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def average(rows: Sequence[Mapping[str, Any]], weights: Sequence[float], names: Iterable[str]) -> dict[str, Any]:
    """The weighted mean of each metric over the rows that have a score, and how many these are, as `relations`; None
    where a metric is known of none."""
    names = list(names)
    result: dict[str, Any] = {"relations": sum(row.get(names[0]) is not None for row in rows)}
    for name in names:
        known = [(row[name], weight) for row, weight in zip(rows, weights, strict=True) if row.get(name) is not None]
        total = sum(weight for _, weight in known)
        result[name] = sum(value * weight for value, weight in known) / total if total > 0 else None
    return result


def summarize(relations: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Averages over tasks: `macro` (each task counts the same), `micro` (each instance), and `by_type`.

    Args:
        relations: rows of results.json.
        metrics: their names, the score first.
    """
    names = [*metrics, f"dev_{metrics[0]}"]
    rows = list(relations.values())
    by_type = {}
    for kind in sorted({row["type"] for row in rows}):
        same = [row for row in rows if row["type"] == kind]
        by_type[kind] = average(same, [1.0] * len(same), names)
    return {
        "macro": average(rows, [1.0] * len(rows), names),
        "micro": average(rows, [float(row["facts"]) for row in rows], names),
        "by_type": by_type,
    }
