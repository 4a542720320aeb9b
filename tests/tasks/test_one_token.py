"""One token of the vocabulary: ranks and the metrics made of them."""

import math

import pytest
import torch

from megaprompt.tasks.lama.one_token import rank_of_gold, ranking_metrics


def test_rank_is_the_last_place_among_equals_of_a_sort():
    torch.manual_seed(0)
    logits = torch.randint(0, 9, (50, 30)).double()  # many ties
    gold = torch.randint(0, 30, (50,))
    behind_equals = logits.scatter_add(1, gold[:, None], torch.full((50, 1), -0.5, dtype=torch.float64))
    order = behind_equals.argsort(dim=1, descending=True)
    expected = (order == gold[:, None]).nonzero()[:, 1] + 1
    assert torch.equal(rank_of_gold(logits, gold), expected)
    allowed = torch.rand(30) < 0.5
    kept = [[t for t in row.tolist() if allowed[t] or t == g] for row, g in zip(order, gold.tolist(), strict=True)]
    expected = torch.tensor([row.index(g) + 1 for row, g in zip(kept, gold.tolist(), strict=True)])
    assert torch.equal(rank_of_gold(logits, gold, allowed), expected)


def test_metrics():
    expected = {"p_at_1": 0.25, "p_at_10": 0.75, "mrr": (1 + 0.5 + 0.1 + 0.05) / 4}
    assert ranking_metrics(torch.tensor([1, 2, 10, 20])) == pytest.approx(expected)
    assert math.isnan(ranking_metrics(torch.tensor([], dtype=torch.int64))["p_at_1"])
