"""Answers in the format in which SuperGLUE's site takes them: a file for each task, a line for each example.

{"idx": 3, "label": "entailment"}
{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, ...]}, ...]}}     (MultiRC)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.task import Example


def submission(task: str, examples: Sequence[Example], said: Sequence[int]) -> list[dict[str, Any]]:
    """The lines of one task's file.

    Args:
        said: the answer to each example, as a place among the answers of the task.
    """
    labels = [KINDS[task].submitted[answer] for answer in said]
    if task != "MultiRC":
        return [{"idx": example.key[0], "label": label} for example, label in zip(examples, labels, strict=True)]
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for example, label in zip(examples, labels, strict=True):
        passage, question, answer = example.key
        passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": label})
    return [
        {"idx": passage, "passage": {"questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]}}
        for passage, questions in passages.items()
    ]
