"""How answers to SuperGLUE's questions are scored: a class by a word or by a head, the likelier of two texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaprompt.tasks.objective import Answers, Objective, Outputs
from megaprompt.tasks.superglue.kinds import Kind

if TYPE_CHECKING:
    from megaprompt.tasks.task import Example, Instance

_LETTERS = 300  # of each field that predictions repeat


class OneOfSeveral(Objective):
    """One of the answers that a task has; `scores` are [I, answers]."""

    selects = ("score",)

    def __init__(self, kind: Kind) -> None:
        self.kind, self.metrics = kind, kind.metrics.names

    @property
    def together(self) -> tuple[str, ...]:
        return self.kind.metrics.stops_on or tuple(self.kind.metrics.headings)

    def said(self, answers: Answers) -> Tensor:
        """The answers [I]."""
        return answers["log_probability"].argmax(1)

    def text_of(self, example: Example) -> str | None:
        """The right answer as it stands in a demonstration; None if it is not known."""
        return (example.candidates or self.kind.answers)[example.gold]

    def blank(self, instances: int) -> Answers:
        """Of each instance the `log_probability` of each answer, among the answers."""
        return {"log_probability": torch.zeros(instances, len(self.kind.labels), dtype=torch.float64)}

    def answer(self, scores: Tensor, gold: Tensor) -> Answers:
        return {"log_probability": scores.double().log_softmax(1).cpu()}

    def measure(self, answers: Answers, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        return self._measured(self.said(answers), asked)

    def _measured(self, said: Tensor, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        gold = torch.tensor([one.gold for one in asked], dtype=torch.int64)
        return self.kind.metrics(said, gold, [one.group for one in asked])

    def majority(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float | None]:
        counts = Counter(example.gold for example in train)
        if not counts:
            return dict.fromkeys(self.metrics)
        best = min(counts, key=lambda gold: (-counts[gold], gold))
        return dict(self._measured(torch.full((len(examples),), best), examples))

    def constant(self, examples: Sequence[Example]) -> dict[str, float]:
        always = [
            self._measured(torch.full((len(examples),), answer), examples) for answer in range(len(self.kind.labels))
        ]
        return {metric: max(scores[metric] for scores in always) for metric in self.metrics}

    def describe(self, example: Example, answers: Answers, i: int) -> dict[str, Any]:
        said = int(self.said(answers)[i])
        texts = example.candidates or self.kind.answers
        fields = (text for name, text in example.fields.items() if name != "because/, so")  # COPA has it twice
        return {
            "idx": list(example.key),
            "input": " | ".join(shorten(text, _LETTERS, placeholder=" …") for text in fields),
            "gold": texts[example.gold],
            "answer": texts[said],
            "right": said == example.gold,
            **self._more(answers, i),
        }

    def _more(self, answers: Answers, i: int) -> dict[str, Any]:
        """What else is told of an answer."""
        return {"probability": answers["log_probability"][i].exp().max().item()}


class Verbalizer(OneOfSeveral):
    """Classes that are a word each: its logit is the score.

    Args:
        words: one for each class.
        tokens: the same as the model has them.
    """

    def __init__(self, kind: Kind, words: Sequence[str], tokens: Sequence[int]) -> None:
        super().__init__(kind)
        self.words, self.tokens = words, torch.tensor(tokens)

    def text_of(self, example: Example) -> str:
        return self.words[example.gold]

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        return outputs.at_targets()[:, self.tokens.to(outputs.values.device)]


class Likeliest(OneOfSeveral):
    """Candidates of several tokens: the likelier one is the answer, however long it is.

    It is learned with a margin: the right one has to be e times as likely as any other. The original code takes the
    hinge once for a whole batch, of means over all its tokens; this is the hinge of each example, as in PET.
    """

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        return outputs.by_instance(outputs.log_probabilities())

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        scores = self.scores(outputs, head)
        right = scores.gather(1, gold[:, None])[:, 0]
        others = scores.scatter(1, gold[:, None], -torch.inf).max(1).values
        return (1 - right + others).clamp(min=0)


class Classifier(OneOfSeveral):
    """A linear layer on the hidden state, which is trained with the model (fine-tuning without a prompt).

    Args:
        candidates: whether each answer is a query of its own; then the layer gives each a score.
    """

    reads = "hidden"

    def __init__(self, kind: Kind, candidates: bool = False) -> None:
        super().__init__(kind)
        self.candidates = candidates

    def new_head(self, hidden_size: int) -> nn.Module:
        return nn.Linear(hidden_size, 1 if self.candidates else len(self.kind.labels))

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        assert isinstance(head, nn.Linear)
        found = head(outputs.at_targets().to(head.weight.dtype))
        return outputs.by_instance(found[:, 0]) if self.candidates else found
