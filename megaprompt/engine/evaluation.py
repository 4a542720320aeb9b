"""Evaluation: the rank of each gold object among the allowed tokens, and the scores made of ranks.

P@1 is the share of facts whose object is ranked first; the paper's number is its mean over relations (macro). No sort
is needed: the rank of the gold object is one more than the number of allowed tokens with a larger logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.distributed.launch import World
from megaprompt.engine.schedule import my_passes, padded
from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.prompting.template import Query

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


class _Answers:
    """Predictions for Q queries while they are found, part by part."""

    def __init__(self, queries: int, gold: Sequence[int], allowed: Tensor, top: int, device: torch.device) -> None:
        self.gold, self.allowed = gold, allowed.to(device)
        self.top = min(top, int(allowed.sum()))
        self.rank = torch.zeros(queries, dtype=torch.int64)
        self.log_probability = torch.zeros(queries, dtype=torch.float64)
        self.top_tokens = torch.zeros(queries, self.top, dtype=torch.int64)
        self.top_log_probability = torch.zeros(queries, self.top, dtype=torch.float64)

    def add(self, indices: Sequence[int], logits: Tensor) -> None:
        """Take the logits [n, V] of some queries."""
        ids = torch.tensor([self.gold[i] for i in indices], dtype=torch.int64, device=logits.device)
        normalizer = logits.logsumexp(1, keepdim=True)
        self.rank[indices] = rank_of_gold(logits, ids, self.allowed).cpu()
        self.log_probability[indices] = (logits.gather(1, ids[:, None]) - normalizer)[:, 0].double().cpu()
        if self.top:
            best = logits.masked_fill(~self.allowed, -torch.inf).topk(self.top, dim=1)
            self.top_tokens[indices] = best.indices.cpu()
            self.top_log_probability[indices] = (best.values - normalizer).double().cpu()

    def of_all_ranks(self, world: World) -> Predictions:
        """What all ranks have found together."""
        for tensor in (self.rank, self.log_probability, self.top_tokens, self.top_log_probability):
            world.sum_(tensor, "predictions")
        return Predictions(self.rank, self.log_probability, self.top_tokens, self.top_log_probability)


def _computed(
    backbone: Backbone, queries: Sequence[Query], passes: Iterable[list[int]], prompts: Tensor | None, size: PassSize
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices of queries, some at a time, with their logits [n, vocabulary] in at least float32, pass by pass."""
    for indices in passes:
        batch = pack([queries[i] for i in indices], size.row_tokens).to(backbone.device)
        logits = backbone(batch, prompts)[:, : backbone.vocabulary_size]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        for part in _chunks(len(indices), logits.shape[1]):
            yield indices[part], logits.index_select(0, batch.target_of_query[part])


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
    answers = _Answers(len(queries), gold, allowed, top, backbone.device)
    passes = padded(my_passes(queries, world, size), everyone or world)
    for indices, logits in _computed(backbone, queries, passes, prompts, size):
        answers.add(indices, logits)
    return answers.of_all_ranks(world)


@torch.no_grad()
def predict_together(
    backbone: Backbone,
    wordings: Sequence[Sequence[Query]],
    weights: Sequence[float],
    gold: Sequence[int],
    *,
    allowed: Tensor,
    world: World,
    size: PassSize,
    top: int = 0,
) -> Predictions:
    """Rank the gold object of every fact by several wordings together: the weighted mean of their log-probabilities.

    Args:
        wordings: for each wording, the queries of all facts.
        weights: of the wordings. (LPAQA, arXiv 1911.12543, equation 4.)
    """
    answers = _Answers(len(gold), gold, allowed, top, backbone.device)
    # The scores of all facts of a part are in memory, 64 MB. Each rank has all wordings of its facts, which are packed
    # together: where they begin alike, mostly with the subject, that is computed once.
    part = max(1, (1 << 24) // backbone.vocabulary_size)
    share = range(world.rank, len(gold), world.size)
    for start in range(0, len(range(0, len(gold), world.size)), part):  # as often on all ranks
        facts = share[start : start + part]
        queries = [wording[i] for wording in wordings for i in facts]
        scores = torch.zeros(len(facts), backbone.vocabulary_size, device=backbone.device)
        passes = padded(split_into_passes(queries, size), world)
        for indices, logits in _computed(backbone, queries, passes, None, size):
            weight = torch.tensor([weights[i // len(facts)] for i in indices]).to(logits)
            fact = torch.tensor([i % len(facts) for i in indices], dtype=torch.int64, device=logits.device)
            scores.index_add_(0, fact, (logits.log_softmax(1) * weight[:, None]).to(scores.dtype))
        answers.add(list(facts), scores)
    return answers.of_all_ranks(world)


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
