"""LAMA's question: which token of the vocabulary is the object? (arXiv 1909.01066)

P@1 is the share of facts whose object is ranked first; the paper's number is its mean over relations (macro). No sort
is needed: the rank of the gold object is one more than the number of allowed tokens with a larger logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megaprompt.tasks.objective import Answers, Objective, Outputs

if TYPE_CHECKING:
    from megaprompt.tasks.task import Example, Instance

_ELEMENTS = 1 << 25  # of temporary copies of logits


@dataclass(frozen=True, eq=False)
class OneToken(Objective):
    """The object is one of the allowed tokens.

    Args:
        allowed: bool [vocabulary], on the CPU.
        text_of: what a token stands for.
        top: how many of the best answers are told.
        among_allowed: whether learning, too, looks at the allowed tokens only. They are all that answers are ranked
            among; the paper's loss also pushes down all others.
    """

    allowed: Tensor
    text_of: Callable[[int], str]
    top: int = 10
    among_allowed: bool = False

    metrics = {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR"}  # noqa: RUF012 (constant)
    # Among equal P@1, which are frequent on few facts, the better ranking is kept.
    selects = ("p_at_1", "mrr")
    items = "facts"

    def scores(self, outputs: Outputs, head: nn.Module | None) -> Tensor:
        """Logits [facts, vocabulary]."""
        return outputs.at_targets()[:, : len(self.allowed)]

    def loss(self, outputs: Outputs, gold: Tensor, head: nn.Module | None) -> Tensor:
        scores = self.scores(outputs, head)
        if self.among_allowed:
            scores = scores.masked_fill(~self.allowed.to(scores.device), -torch.inf)
        return cross_entropy(scores, gold, reduction="none")

    def blank(self, instances: int) -> Answers:
        """Of each fact, among the allowed tokens, the `rank` of its object (1 is best) and its `log_probability`, the
        best `top_tokens` [facts, k], and their `top_log_probability`."""
        top = min(self.top, int(self.allowed.sum()))
        return {
            "rank": torch.zeros(instances, dtype=torch.int64),
            "log_probability": torch.zeros(instances, dtype=torch.float64),
            "top_tokens": torch.zeros(instances, top, dtype=torch.int64),
            "top_log_probability": torch.zeros(instances, top, dtype=torch.float64),
        }

    def answer(self, scores: Tensor, gold: Tensor) -> Answers:
        allowed, answers = self.allowed.to(scores.device), self.blank(len(scores))
        step = max(1, _ELEMENTS // max(1, scores.shape[1]))
        for part in (slice(start, start + step) for start in range(0, len(scores), step)):
            rows, ids = scores[part], gold[part]
            among = rows.masked_fill(~allowed, -torch.inf)
            normalizer = among.logsumexp(1, keepdim=True)
            answers["rank"][part] = rank_of_gold(rows, ids, allowed).cpu()
            answers["log_probability"][part] = (rows.gather(1, ids[:, None]) - normalizer)[:, 0].double().cpu()
            best = among.topk(answers["top_tokens"].shape[1], dim=1)
            answers["top_tokens"][part] = best.indices.cpu()
            answers["top_log_probability"][part] = (best.values - normalizer).double().cpu()
        return answers

    def measure(self, answers: Answers, asked: Sequence[Example] | Sequence[Instance]) -> dict[str, float]:
        """P@1, P@10 and mean reciprocal rank."""
        return ranking_metrics(answers["rank"])

    def describe(self, example: Example, answers: Answers, i: int) -> dict[str, Any]:
        best = zip(answers["top_tokens"][i].tolist(), answers["top_log_probability"][i].exp().tolist(), strict=True)
        return {
            "subject": example.fields["X"],
            "object": example.answer,
            "rank": int(answers["rank"][i]),
            "probability": answers["log_probability"][i].exp().item(),
            "top": [[self.text_of(token), round(p, 6)] for token, p in best],
        }


def rank_of_gold(logits: Tensor, gold: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Ranks [Q] int64 of `gold` [Q] in `logits` [Q, V], among the `allowed` [V] tokens (bool; None: all).

    Of equal logits all others rank first: ties never flatter a score.
    """
    better = logits >= logits.gather(1, gold[:, None])
    better.scatter_(1, gold[:, None], False)
    if allowed is not None:
        better &= allowed
    return better.sum(1) + 1


def ranking_metrics(rank: Tensor) -> dict[str, float]:
    """P@1, P@10 and mean reciprocal rank of ranks [Q]; not a number if there are none."""
    if not len(rank):
        return dict.fromkeys(OneToken.metrics, float("nan"))
    return {
        "p_at_1": (rank == 1).double().mean().item(),
        "p_at_10": (rank <= 10).double().mean().item(),
        "mrr": (1 / rank.double()).mean().item(),
    }
