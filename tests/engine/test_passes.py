"""Answers and losses of packed passes, against the plain forward."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers, joint_answers
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.one_token import rank_of_gold
from megaprompt.tasks.task import Instance
from tests.conftest import PAIRS, instances_of, objective_of, plain_logits
from tests.prompting.test_packing import random_queries


@pytest.mark.parametrize("size", [PassSize(16, 32), PassSize(256, 1024)])
def test_answers_equal_the_plain_forward(make_backbone, size):
    backbone = make_backbone("gpt2")
    prompts = torch.randn(12, backbone.hidden_size, dtype=torch.float64)
    queries = random_queries(1, 30)
    gold = torch.randint(0, backbone.vocabulary_size, (len(queries),)).tolist()
    allowed = torch.zeros(backbone.vocabulary_size, dtype=torch.bool)
    allowed[gold] = True
    objective = objective_of(backbone, allowed, top=3)
    instances = [Instance((query,), token) for query, token in zip(queries, gold, strict=True)]
    at = Workplace.shared(backbone, size, World(), objective)
    parts = [Questions(instances[:11], objective), Questions(instances[11:], objective)]  # of two tasks
    first, second = answers(at, parts, prompts)
    found = {name: torch.cat([first[name], second[name]]) for name in first}
    with torch.no_grad():
        logits = plain_logits(backbone, queries, prompts)
    assert torch.equal(found["rank"], rank_of_gold(logits, torch.tensor(gold), allowed))
    among = logits.masked_fill(~allowed, -torch.inf)
    expected = among.log_softmax(1).gather(1, torch.tensor(gold)[:, None])[:, 0]
    torch.testing.assert_close(found["log_probability"], expected)
    assert torch.equal(found["top_tokens"], logits.masked_fill(~allowed, -torch.inf).topk(3).indices)


def test_an_ensemble_is_the_weighted_mean_of_log_probabilities(make_backbone):
    backbone = make_backbone("llama")
    wordings = ("The capital of [X] is [Y] .", "[X] , capital [Y]", "[X] is in [Y] .")
    asked = [instances_of(backbone, Template.parse(text), PAIRS["P36"]) for text in wordings]
    gold = [instance.gold for instance in asked[0]]
    weights = [0.5, 0.3, 0.2]
    allowed = torch.ones(backbone.vocabulary_size, dtype=torch.bool)
    allowed[::7] = False
    allowed[gold] = True
    objective = objective_of(backbone, allowed, top=3)
    at = Workplace.shared(backbone, PassSize(16, 32), World(), objective)
    found = joint_answers(at, asked, weights, objective)
    scores = torch.zeros(len(gold), backbone.vocabulary_size, dtype=torch.float64)
    for instances, weight in zip(asked, weights, strict=True):
        for i, instance in enumerate(instances):
            logits = backbone.model(torch.tensor([instance.queries[0].tokens])).logits[0, -1, : len(allowed)]
            scores[i] += weight * logits.detach().log_softmax(0)
    assert torch.equal(found["rank"], rank_of_gold(scores, torch.tensor(gold), allowed))
    expected = scores.masked_fill(~allowed, -torch.inf).log_softmax(1).gather(1, torch.tensor(gold)[:, None])[:, 0]
    torch.testing.assert_close(found["log_probability"], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found["top_tokens"][:, 0], scores.masked_fill(~allowed, -torch.inf).argmax(1))


def test_half_precision_does_not_round_the_answers(make_backbone):
    """The head computes in single precision: logits are those of its rounded weights, not rounded ones themselves."""
    backbone = make_backbone("gpt2", torch.bfloat16)
    instances = instances_of(backbone, Template.parse("The capital of [X] is [Y] ."), PAIRS["P36"])
    objective = objective_of(backbone)
    at = Workplace.shared(backbone, PassSize(64, 128), World(), objective)
    [found] = answers(at, [Questions(instances, objective)], None)
    head, states = backbone.model.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    batch = pack([instance.queries[0] for instance in instances], 64)
    with torch.no_grad():
        logits = backbone(batch)
    handle.remove()
    exact = states[0].double() @ head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(logits[0].unique()) > len(logits[0].bfloat16().unique())  # where ties would have been
    ranks = rank_of_gold(exact[batch.target_of_query], torch.tensor([instance.gold for instance in instances]))
    assert torch.equal(found["rank"], ranks)
    with torch.enable_grad():  # in training as it was, where a copy of the head would be kept for the backward pass
        assert backbone(batch).dtype == torch.bfloat16


def test_texts_longer_than_a_sliding_window_are_refused(tokenizer):
    """Packed rows have one mask for all layers, which is right for texts that the window shows whole."""
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=len(tokenizer), sliding_window=12, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM._from_config(config, attn_implementation="sdpa").double()
    backbone = Backbone(model, tokenizer, "mistral")
    at = Workplace.shared(backbone, PassSize(), World(), objective_of(backbone))

    def asked(tokens: int) -> list[Instance]:
        return [Instance((Query(tuple(range(9, 9 + tokens)), (tokens - 1,)),), 5) for _ in range(2)]

    found = answers(at, [Questions(asked(12), objective_of(backbone))], None)[0]
    expected = plain_logits(backbone, asked(12)[0].queries, torch.zeros(1, 32)).log_softmax(-1)[0, 5]
    torch.testing.assert_close(found["log_probability"][0], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="a text of 13 tokens is longer than the 12 that it can be given"):
        answers(at, [Questions(asked(13), objective_of(backbone))], None)
