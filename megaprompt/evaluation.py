"""Evaluation: the rank of each gold object among the allowed tokens, and the scores made of ranks.

P@1 is the share of facts whose object is ranked first; the paper's number is its mean over relations (macro). No sort
is needed: the rank of the gold object is one more than the number of allowed tokens with a larger logit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.distributed.launch import World
from megaprompt.distributed.schedule import my_passes, padded
from megaprompt.packing import PassSize, pack
from megaprompt.template import Query

METRICS = ("p_at_1", "p_at_10", "mrr")


@dataclass(frozen=True)
class Predictions:
    """What the backbone answers to Q queries, on the CPU, in the order of the queries."""

    rank: Tensor  # [Q] int64, of the gold object among the allowed tokens; 1 is best
    log_probability: Tensor  # [Q] float64, of the gold object among all tokens
    top_tokens: Tensor  # [Q, k] int64, the best allowed tokens, best first
    top_log_probability: Tensor  # [Q, k] float64, of them among all tokens


def rank_of_gold(logits: Tensor, gold: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Ranks [Q] int64 of `gold` [Q] in `logits` [Q, V], among the `allowed` [V] tokens (bool; None: all).

    Of equal logits, which half precision often gives, the lower token id ranks first: ties never flatter a score.
    """
    value = logits.gather(1, gold[:, None])
    token = torch.arange(logits.shape[1], device=logits.device)
    better = (logits > value) | ((logits == value) & (token < gold[:, None]))
    if allowed is not None:
        better &= allowed
    return better.sum(1) + 1


@torch.no_grad()
def predict(
    backbone: Backbone,
    queries: Sequence[Query],
    gold: Sequence[int],
    prompts: Tensor | None,
    *,
    allowed: Tensor,
    world: World,
    size: PassSize,
    top: int = 0,
    everyone: World | None = None,
) -> Predictions:
    """Rank the gold object of every query; the ranks of `world` share the queries and all get all answers.

    Args:
        gold: token id of each query's object.
        prompts: prompt matrix that the queries' pseudo tokens index.
        allowed: bool [V], the tokens that count as answers.
        top: how many best tokens to report for each query.
        everyone: all ranks that hold the backbone together, if `world` is a part of them; all of them must call this,
            and may have other queries, or none.
    """
    device = backbone.device
    top = min(top, int(allowed.sum()))
    allowed = allowed.to(device)
    rank = torch.zeros(len(queries), dtype=torch.int64)
    top_tokens = torch.zeros(len(queries), top, dtype=torch.int64)
    log_probability = torch.zeros(len(queries), dtype=torch.float64)
    top_log_probability = torch.zeros(len(queries), top, dtype=torch.float64)
    for indices in padded(my_passes(queries, world, size), everyone or world):
        batch = pack([queries[i] for i in indices], size.row_tokens).to(device)
        logits = backbone(batch, prompts)[:, : len(allowed)]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        where = batch.target_of_query
        ids = torch.tensor([gold[i] for i in indices], dtype=torch.int64, device=device)
        for part in _chunks(len(indices), logits.shape[1]):
            rows = logits.index_select(0, where[part])
            normalizer = rows.logsumexp(1, keepdim=True)
            here = indices[part]
            rank[here] = rank_of_gold(rows, ids[part], allowed).cpu()
            log_probability[here] = (rows.gather(1, ids[part, None]) - normalizer)[:, 0].double().cpu()
            if top:
                best = rows.masked_fill(~allowed, -torch.inf).topk(top, dim=1)
                top_tokens[here] = best.indices.cpu()
                top_log_probability[here] = (best.values - normalizer).double().cpu()
    for tensor in (rank, log_probability, top_tokens, top_log_probability):
        world.sum_(tensor, "predictions")
    return Predictions(rank, log_probability, top_tokens, top_log_probability)


def _chunks(count: int, width: int, elements: int = 1 << 25) -> list[slice]:
    """Slices of at most `elements / width` rows, so that temporary copies of the logits stay small."""
    step = max(1, elements // max(1, width))
    return [slice(start, start + step) for start in range(0, count, step)]


def metrics(rank: Tensor) -> dict[str, float]:
    """P@1, P@10 and mean reciprocal rank of ranks [Q]."""
    if not len(rank):
        return dict.fromkeys(METRICS, float("nan"))
    return {
        "p_at_1": (rank == 1).double().mean().item(),
        "p_at_10": (rank <= 10).double().mean().item(),
        "mrr": (1 / rank.double()).mean().item(),
    }


def average(scores: Sequence[Mapping[str, float | None]], weights: Sequence[float]) -> dict[str, float | None]:
    """The weighted mean of each metric; None where a score lacks it."""
    result: dict[str, float | None] = {}
    for name in (*METRICS, "dev_p_at_1"):
        values = [score.get(name) for score in scores]
        known = [value for value in values if value is not None]
        complete = len(known) == len(values) and sum(weights) > 0
        result[name] = sum(v * w for v, w in zip(known, weights, strict=True)) / sum(weights) if complete else None
    return result


def summarize(relations: Mapping[str, Mapping]) -> dict[str, dict]:
    """Averages over relations: `macro` (each relation counts the same), `micro` (each fact), and `by_type`."""
    rows = list(relations.values())
    by_type = {}
    for type_ in sorted({row["type"] for row in rows}):
        same = [row for row in rows if row["type"] == type_]
        by_type[type_] = {"relations": len(same), **average(same, [1.0] * len(same))}
    return {
        "macro": average(rows, [1.0] * len(rows)),
        "micro": average(rows, [float(row["facts"]) for row in rows]),
        "by_type": by_type,
    }
