"""Loading a backbone: its data type where nobody says, what it takes of the host's memory, and its norms."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from megaprompt.backbone import dtype_of, load_backbone
from megaprompt.backbone.packed import PackedModel
from megaprompt.resources.measured_case import PeakMemory
from tests.conftest import make_model

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)],
    ids=["V100 and T4", "A100", "H100"],
)
def test_bfloat16_only_where_the_gpu_computes_with_it(monkeypatch, generation, expected):
    """Of the GPU there is only what PyTorch asks it for; PyTorch's own rule decides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # emulated
    assert dtype_of(None, GPU) == expected
    assert dtype_of("float16", GPU) == torch.float16
    assert dtype_of("bfloat16", GPU) == torch.bfloat16


def test_float32_on_a_cpu():
    assert dtype_of(None, torch.device("cpu")) == torch.float32


def test_weights_are_read_without_a_copy_on_the_host(tokenizer, tmp_path):
    shape = GPT2Config(n_layer=2, n_head=4, n_embd=1024, vocab_size=len(tokenizer), n_positions=64)
    model = GPT2LMHeadModel(shape)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    del model
    load_backbone(str(tmp_path))  # what loading itself needs once
    start = PeakMemory.now()
    with PeakMemory(None, tmp_path) as memory:
        backbone = load_backbone(str(tmp_path))
    assert sum(parameter.nbytes for parameter in backbone.parameters()) == size > 100e6
    assert memory.peak - start < 0.25 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_one_operation(make_backbone, dtype):
    """They are as exact as transformers' own, or more."""
    own = make_model("llama", 600).to(dtype).model.layers[0].input_layernorm
    with torch.no_grad():
        own.weight.uniform_(0.5, 2)
    backbone = make_backbone("llama", dtype)
    fused = backbone.model.model.layers[0].input_layernorm
    assert type(fused) is torch.nn.RMSNorm
    assert fused.eps == own.variance_epsilon
    fused.load_state_dict(own.state_dict())
    x = torch.randn(4, 50, 32, dtype=dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (32,), own.weight.double(), fused.eps)
    errors = [(norm(x).double() - exact).norm() for norm in (fused, own)]
    assert fused(x).dtype == dtype
    assert errors[0] <= 1.001 * errors[1]


def test_other_norms_are_left_alone(tokenizer):
    """Gemma's multiplies by one more than its weight."""
    config = GemmaConfig(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=16, intermediate_size=32,
        head_dim=8, vocab_size=len(tokenizer),
    )  # fmt: skip
    model = GemmaForCausalLM(config)
    norm = model.model.norm
    norm.variance_epsilon = norm.eps  # as if it were called so
    assert PackedModel(model).model.model.norm is norm
