"""What a backbone's data type is where nobody says."""

from types import SimpleNamespace

import pytest
import torch

from megaprompt.backbone import dtype_of

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
