"""How sure SuperGLUE's scores are: 95 % intervals of each metric from the predictions of runs, by bootstrap.

Examples about the same text, such as the answers to the questions on one passage, are drawn together. Every metric is a
function of sums over examples, so a sample is a product of how often each text was drawn and its sums.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megaprompt.errors import MegapromptError
from megaprompt.report.runs import Run

SAMPLES = 1000
Line = Mapping[str, Any]


def metric_samples(runs: Sequence[Run], method: str, task: str, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Each metric [SAMPLES], %, on samples of the test examples, as a mean over runs (of several seeds); none if a run
    wrote no predictions.

    The intervals tell of the choice of examples, not of seeds.

    Raises:
        MegapromptError: a file of predictions is damaged.
    """
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    for run in runs:
        path = run.path / "predictions" / f"{task}.jsonl"
        lines = _lines(path, method)
        if not lines:
            return {}
        try:
            of_run = samples_of(lines, metrics)
        except (KeyError, TypeError, IndexError) as error:
            raise MegapromptError(f"{path}: is damaged ({error!r}); run the task again") from error
        for metric in metrics:
            found[metric].append(of_run[metric])
    return {metric: 100 * np.mean(values, axis=0) for metric, values in found.items()}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def _lines(path: Path, method: str) -> list[Line]:
    if not path.exists():
        return []
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]
        return [line for line in lines if line["method"] == method]
    except (ValueError, KeyError, TypeError) as error:
        raise MegapromptError(f"{path}: is damaged ({error!r}); run the task again") from error


def samples_of(lines: Sequence[Line], metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Each metric [SAMPLES] on samples of predictions, as shares."""
    texts: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        # The asterisks mark a pronoun: WSC asks about several in the same text.
        texts[str(line["input"]).partition(" | ")[0].replace("*", "")].append(line)
    drawn = _drawn(len(texts))
    return {metric: _METRICS[metric](list(texts.values()), drawn) for metric in metrics}


@lru_cache(maxsize=8)
def _drawn(count: int) -> np.ndarray:
    """How often each of so many texts is drawn [SAMPLES, count], with replacement; the same for all methods, so that
    they stand the same test."""
    generator = np.random.default_rng(0)
    return generator.multinomial(count, np.full(count, 1 / count), size=SAMPLES).astype(np.float64)


def _share(of_text: Callable[[list[Line]], tuple[float, float]], texts: list[list[Line]], drawn: np.ndarray) -> Any:
    """The quotient [SAMPLES] of two sums; 0 where the second is 0."""
    sums = drawn @ np.array([of_text(lines) for lines in texts], dtype=np.float64)  # [SAMPLES, 2]
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)


def _accuracy(texts: list[list[Line]], drawn: np.ndarray) -> np.ndarray:
    return np.asarray(_share(lambda lines: (sum(line["right"] for line in lines), len(lines)), texts, drawn))


def _f1(of: str, texts: list[list[Line]], drawn: np.ndarray) -> np.ndarray:
    def of_text(lines: list[Line]) -> tuple[float, float]:
        said, gold = ([line[key] == of for line in lines] for key in ("answer", "gold"))
        return 2 * sum(map(lambda a, b: a and b, said, gold)), sum(said) + sum(gold)

    return np.asarray(_share(of_text, texts, drawn))


def _macro_f1(texts: list[list[Line]], drawn: np.ndarray) -> np.ndarray:
    """The mean over the classes that were said or right in the sample."""
    classes = sorted({line[key] for lines in texts for line in lines for key in ("answer", "gold")})
    there = [
        drawn @ np.array([any(one in (line["answer"], line["gold"]) for line in lines) for lines in texts]) > 0
        for one in classes
    ]
    return np.asarray(np.sum([_f1(one, texts, drawn) for one in classes], axis=0) / np.sum(there, axis=0))


def _exact(texts: list[list[Line]], drawn: np.ndarray) -> np.ndarray:
    """The share of questions all of whose answers are right; `idx` is passage, question, answer."""

    def of_text(lines: list[Line]) -> tuple[float, float]:
        questions: dict[tuple[int, int], bool] = {}
        for line in lines:
            key = (line["idx"][0], line["idx"][1])
            questions[key] = questions.get(key, True) and line["right"]
        return sum(questions.values()), len(questions)

    return np.asarray(_share(of_text, texts, drawn))


_METRICS: dict[str, Callable[[list[list[Line]], np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "em": _exact,
    "f1a": lambda texts, drawn: _f1("1", texts, drawn),
}
