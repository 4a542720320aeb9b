import math

import pytest
import torch

from megaprompt.distributed.launch import World
from megaprompt.engine.evaluation import metrics, predict, rank_of_gold, summarize
from megaprompt.prompting.packing import PassSize
from tests.prompting.test_packing import plain_logits, random_queries


def test_rank_equals_the_place_in_a_stable_sort():
    torch.manual_seed(0)
    logits = torch.randint(0, 9, (50, 30)).double()  # many ties
    gold = torch.randint(0, 30, (50,))
    order = logits.argsort(dim=1, descending=True, stable=True)
    expected = (order == gold[:, None]).nonzero()[:, 1] + 1
    assert torch.equal(rank_of_gold(logits, gold), expected)
    allowed = torch.rand(30) < 0.5
    kept = [[t for t in row.tolist() if allowed[t] or t == g] for row, g in zip(order, gold.tolist(), strict=True)]
    expected = torch.tensor([row.index(g) + 1 for row, g in zip(kept, gold.tolist(), strict=True)])
    assert torch.equal(rank_of_gold(logits, gold, allowed), expected)


def test_metrics():
    expected = {"p_at_1": 0.25, "p_at_10": 0.75, "mrr": (1 + 0.5 + 0.1 + 0.05) / 4}
    assert metrics(torch.tensor([1, 2, 10, 20])) == pytest.approx(expected)
    assert math.isnan(metrics(torch.tensor([], dtype=torch.int64))["p_at_1"])


def test_averages():
    rows = {
        "P1": {"type": "1-1", "facts": 1, "p_at_1": 1.0, "p_at_10": 1.0, "mrr": 1.0, "dev_p_at_1": None},
        "P2": {"type": "N-1", "facts": 3, "p_at_1": 0.0, "p_at_10": 1.0, "mrr": 0.5, "dev_p_at_1": 0.5},
    }
    summary = summarize(rows)
    assert summary["macro"]["p_at_1"] == 0.5
    assert summary["micro"]["p_at_1"] == 0.25
    assert summary["macro"]["dev_p_at_1"] is None
    assert summary["by_type"]["N-1"] == {"relations": 1, "p_at_1": 0.0, "p_at_10": 1.0, "mrr": 0.5, "dev_p_at_1": 0.5}


@pytest.mark.parametrize("size", [PassSize(16, 32), PassSize(256, 1024)])
def test_predictions_equal_the_plain_forward(make_backbone, size):
    backbone = make_backbone("gpt2")
    prompts = torch.randn(12, backbone.hidden_size, dtype=torch.float64)
    queries = random_queries(1, 30)
    gold = torch.randint(0, backbone.vocabulary_size, (len(queries),)).tolist()
    allowed = torch.zeros(backbone.vocabulary_size, dtype=torch.bool)
    allowed[gold] = True
    found = predict(backbone, queries, gold, prompts, allowed=allowed, world=World(), size=size, top=3)
    with torch.no_grad():
        logits = plain_logits(backbone, queries, prompts)
    assert torch.equal(found.rank, rank_of_gold(logits, torch.tensor(gold), allowed))
    expected = logits.log_softmax(1).gather(1, torch.tensor(gold)[:, None])[:, 0]
    torch.testing.assert_close(found.log_probability, expected)
    assert torch.equal(found.top_tokens, logits.masked_fill(~allowed, -torch.inf).topk(3).indices)
