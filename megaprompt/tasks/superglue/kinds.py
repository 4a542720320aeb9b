"""What SuperGLUE's tasks are: their fields, their answers, and how these are scored (arXiv 1905.00537)."""

from __future__ import annotations

from dataclasses import dataclass

from megaprompt.tasks.superglue.metrics import ACCURACY, ACCURACY_AND_F1, EM_AND_F1A, Metrics


@dataclass(frozen=True)
class Kind:
    """One of the tasks.

    Args:
        fields: that patterns may have.
        alone: what a classifier reads: the fields without any words of ours.
        labels: values of `label` in the data, one for each answer; an answer is the place of its label.
        submitted: the same as the benchmark's site wants them.
    """

    fields: tuple[str, ...]
    alone: str
    labels: tuple[str | int | bool, ...]
    submitted: tuple[str | int, ...]
    metrics: Metrics = ACCURACY

    @property
    def answers(self) -> tuple[str, ...]:
        """What patterns and results call the answers."""
        return tuple(map(str, self.labels))


_ENTAILMENT = ("premise", "hypothesis"), "[premise...] [SEP] [hypothesis] [Y]"
_TRUE = ("false", "true")

KINDS = {
    "BoolQ": Kind(("passage", "question"), "[passage...] [SEP] [question] [Y]", (False, True), _TRUE),
    "CB": Kind(
        *_ENTAILMENT,
        ("entailment", "contradiction", "neutral"),
        ("entailment", "contradiction", "neutral"),
        ACCURACY_AND_F1,
    ),
    "COPA": Kind(
        ("premise", "choice1", "choice2", "because/so", "because/, so"),
        "[premise...] [because/so] [choice] [Y]",
        (0, 1),
        (0, 1),
    ),
    "MultiRC": Kind(
        ("passage", "question", "answer"), "[passage...] [SEP] [question] [answer] [Y]", (0, 1), (0, 1), EM_AND_F1A
    ),
    "RTE": Kind(*_ENTAILMENT, ("entailment", "not_entailment"), ("entailment", "not_entailment")),
    "WiC": Kind(
        ("word", "sentence1", "sentence2"), "[word] [SEP] [sentence1...] [SEP] [sentence2...] [Y]", (False, True), _TRUE
    ),
    "WSC": Kind(("text", "pronoun"), "[text...] [SEP] [pronoun] [SEP] [span] [Y]", (False, True), ("False", "True")),
}
