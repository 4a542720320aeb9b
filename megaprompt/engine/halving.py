"""Several candidates of one task: the weaker ones on dev are dropped on the way (successive halving, arXiv 1502.07943).

A candidate that is learned several times, on folds of the data, is compared by its scores on all of them. All ranks
know the scores of all candidates and decide alike, so candidates of a task may be in different groups.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaprompt.engine.learner import TrainingSet, name_of


@dataclass
class Halving:
    """Which candidates go on.

    Args:
        data: all candidates of all tasks, by name.
        rungs: after so many steps, at which dev is scored, at most so many candidates of a task go on.
    """

    data: Mapping[str, TrainingSet]
    rungs: Mapping[int, int]
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # scores on dev, by name

    def see(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of the log."""
        for line in lines:
            if line.get("best"):
                data = self.data[name_of(line)]
                self.best[data.name] = {each: line[f"dev_{each}"] for each in data.objective.selects}

    def line(self, name: str, step: int) -> dict[str, Any]:
        """What the log says of a candidate that is dropped."""
        return {"time": time.time(), "step": step, **self.data[name].about, "dropped": True, "stopped": True}

    def weak(self, step: int, stopped: Collection[str]) -> list[str]:
        """The candidates that stop after this step, of those that have not yet. Those that stay are competitors too;
        among equals the first ones in `data` go on."""
        if step not in self.rungs:
            return []
        tasks = dict.fromkeys(each.task for each in self.data.values())
        return [name for task in tasks for name in self._weaker(task, self.rungs[step]) if name not in stopped]

    def _weaker(self, task: str, most: int) -> list[str]:
        contenders: dict[str, list[TrainingSet]] = {}
        for each in self.data.values():
            if each.task == task:
                contenders.setdefault(each.contender or each.candidate, []).append(each)
        evidence = {}
        for contender, sets in contenders.items():
            if known := [(self.best[each.name], len(each.dev)) for each in sets if each.name in self.best]:
                evidence[contender] = sets[0].objective.evidence(*pooled(known))
        strong = sorted(evidence, key=lambda contender: evidence[contender], reverse=True)[:most]  # stable
        out = [each for contender, sets in contenders.items() if contender not in strong for each in sets]
        return [each.name for each in out if not each.stays]


def pooled(scores: Sequence[tuple[Mapping[str, float], int]]) -> tuple[dict[str, float], int]:
    """Scores on parts of some size as scores on all of them together, and the size of all."""
    size = sum(part for _, part in scores)
    return {name: sum(each[name] * part for each, part in scores) / size for name in scores[0][0]}, size
