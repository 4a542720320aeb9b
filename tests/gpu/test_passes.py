"""Packed passes on a GPU equal the plain forward, in every precision, and answers those of the CPU."""

import pytest
import torch

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.one_token import rank_of_gold
from tests.backbone.test_masked import KINDS, small_model, word_tokenizer
from tests.conftest import PAIRS, TEMPLATES, instances_of, make_model, objective_of, plain_logits

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.fixture(params=["gpt2", "llama", *KINDS])
def backbone_of(request, gpu, tokenizer):
    """A small backbone on the GPU, causal or masked, in some precision."""

    def make(dtype: torch.dtype) -> Backbone:
        if request.param in KINDS:
            words = word_tokenizer(
                [*(f"{s} {o}" for pairs in PAIRS.values() for s, o in pairs), TEMPLATES["P36"], "capital"]
            )
            model = small_model(request.param, len(words))
            return Backbone(model.to(dtype), words, request.param).to(gpu)
        model = make_model(request.param, len(tokenizer))
        return Backbone(model.to(dtype), tokenizer, request.param).to(gpu)

    return make


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_logits_and_gradients_equal_the_plain_forward(backbone_of, dtype):
    """Of rows of many queries, of odd widths, and of one query each."""
    backbone = backbone_of(dtype)
    template = Template.parse("<3> [X] capital <2>[Y]" + ("" if backbone.causal else "<1> ."))
    encoder = backbone.text_encoder()
    queries = [template.render({"X": subject}, encoder) for subject, _ in PAIRS["P36"]]
    torch.manual_seed(0)
    prompts = torch.randn(6, backbone.embedding_size).to(backbone.device, dtype).requires_grad_()
    plain = plain_logits(backbone, queries, prompts)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad((plain * weights).sum(), prompts)
    for row_tokens in (61, 200, None):
        batch = pack(queries, row_tokens).to(backbone.device)
        packed = backbone(batch, prompts)[batch.target_of_query]
        (gradient,) = torch.autograd.grad((packed * weights).sum(), prompts)
        assert error(packed, plain) < TOLERANCE[dtype]
        assert error(gradient, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_found_exact(backbone_of, dtype):
    assert backbone_of(dtype).exact_size(PassSize(64, 256)) == PassSize(64, 256)


def test_answers_are_those_of_the_cpu(backbone_of, gpu):
    on_gpu = backbone_of(torch.float64)
    instances = instances_of(on_gpu, Template.parse(TEMPLATES["P36"]), PAIRS["P36"][:10])
    objective = objective_of(on_gpu)
    found = [
        answers(Workplace.shared(on_gpu.to(device), PassSize(32, 64), World(device=device), objective), [
            Questions(instances, objective)], None)[0]
        for device in (gpu, torch.device("cpu"))
    ]  # fmt: skip
    tolerance = 1e-6 if on_gpu.name == "llama" else 1e-9  # rotary embeddings are in float32 in every precision
    for name, values in found[0].items():
        assert values.device.type == "cpu"
        torch.testing.assert_close(values, found[1][name], rtol=tolerance, atol=tolerance)


def test_half_precision_does_not_round_the_answers(gpu, make_backbone):
    backbone = make_backbone("gpt2", torch.bfloat16).to(gpu)
    instances = instances_of(backbone, Template.parse(TEMPLATES["P36"]), PAIRS["P36"])
    batch = pack([instance.queries[0] for instance in instances], 64).to(gpu)
    head, states = backbone.model.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        logits = backbone(batch)
    handle.remove()
    exact = states[0].double() @ head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    gold = torch.tensor([instance.gold for instance in instances], device=gpu)
    objective = objective_of(backbone)
    at = Workplace.shared(backbone, PassSize(64, 256), World(device=gpu), objective)
    [found] = answers(at, [Questions(instances, objective)], None)
    assert torch.equal(found["rank"], rank_of_gold(exact[batch.target_of_query], gold).cpu())
