"""Backbones that are partitioned over the ranks from the start: no rank ever holds the whole model."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from megaprompt.backbone.packed import language_model
from megaprompt.distributed.deepspeed_config import PRECISION_SECTIONS
from megaprompt.distributed.operators import build_operators, prefer_cpu_without_gpu
from megaprompt.distributed.world import ranks_on_this_machine
from megaprompt.errors import MegapromptError, UsageError


def new_sharded(model_config: PreTrainedConfig, dtype: torch.dtype, config: dict[str, Any]) -> PreTrainedModel:
    """A transformers language model that is partitioned over the ranks, with initial weights.

    Raises:
        UsageError: DeepSpeed has no such type.
    """
    prefer_cpu_without_gpu()
    import deepspeed
    from accelerate import init_empty_weights
    from deepspeed.accelerator import get_accelerator

    if dtype not in PRECISION_SECTIONS:
        raise UsageError(f"--dtype {dtype}: a sharded backbone is float32, bfloat16 or float16; leave --deepspeed out")
    build_operators(config)
    _return_freed_memory()
    kind = language_model(model_config)
    with init_empty_weights(include_buffers=False):
        empty = kind.from_config(model_config, dtype=dtype)
    _check_swap_space(empty, config)
    with deepspeed.zero.Init(config_dict_or_path=config | PRECISION_SECTIONS[dtype]):
        model = kind.from_config(model_config, dtype=dtype)
    model.tie_weights()
    # Within zero.Init buffers (rotary frequencies) come out in the parameters' precision, which is not what they need.
    # DeepSpeed moves no buffers of a module that was made so.
    for (_, buffer), (_, exact) in zip(model.named_buffers(), empty.named_buffers(), strict=True):
        buffer.data = exact.to(get_accelerator().current_device_name())
    return model


def load_sharded(directory: Path, dtype: torch.dtype, config: dict[str, Any]) -> PreTrainedModel:
    """Load a transformers language model, partitioned over the ranks from the start: no rank ever holds it whole.

    Each parameter exists whole on a rank only while it is made; its values are read from safetensors by rank 0, one
    tensor at a time, and scattered.

    Raises:
        MegapromptError: the directory has no safetensors that fit the model.
    """
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = new_sharded(AutoConfig.from_pretrained(directory), dtype, config)
    import deepspeed

    files = _tensor_files(directory)
    main = torch.distributed.get_rank() == 0
    for name, parameter in model.named_parameters():
        stored = next((n for n in _stored_names(name, model.base_model_prefix) if n in files), None)
        if stored is None:
            raise MegapromptError(
                f"{directory}: no tensor {name} in its safetensors; load it once with transformers and write it with "
                f"save_pretrained, then give that directory"
            )
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if main:
                with safe_open(files[stored], framework="pt") as file:  # opened anew, so that its pages are let go
                    parameter.data.copy_(file.get_tensor(stored))
    return model


def _return_freed_memory() -> None:
    """Have glibc give back the memory of every freed tensor.

    By default it keeps freed blocks of up to 32 MB for later, between partitions that stay: with every parameter being
    gathered and freed, ranks were seen to grow to twice the whole backbone instead of their part of it.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: from 1 MB on, and no longer adapted


def _check_swap_space(model: nn.Module, config: dict[str, Any]) -> None:
    """See that NVMe offload can work before it starts.

    Raises:
        MegapromptError: the disk has too little room, or cannot be written.
        UsageError: the swap buffers are too small for the largest parameter.
    """
    offload = config["zero_optimization"].get("offload_param", {})
    if offload.get("device") != "nvme":
        return
    ranks = torch.distributed.get_world_size()
    largest = max(-(-p.numel() // ranks) for p in model.parameters())
    if offload.get("buffer_size", 100_000_000) < largest:
        raise UsageError(f"--deepspeed: set offload_param.buffer_size to at least {largest}, the largest partition")
    path = Path(offload["nvme_path"])
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) // ranks
    needed *= ranks_on_this_machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / f".megaprompt-{os.getpid()}").write_bytes(b"x")
        (path / f".megaprompt-{os.getpid()}").unlink()
    except OSError as error:
        raise MegapromptError(f"NVMe offload cannot write {path} ({error.strerror}); change nvme_path") from error
    free = shutil.disk_usage(path).free
    if free < needed:
        raise MegapromptError(
            f"NVMe offload needs {needed / 1e9:.1f} GB on {path}, {free / 1e9:.1f} GB are free; change nvme_path"
        )


def _stored_names(name: str, prefix: str) -> tuple[str, ...]:
    """What a parameter may be called in a checkpoint: that of the bare model has no prefix, and BERT's norms had
    TensorFlow's names."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return name, name.removeprefix(f"{prefix}."), old


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found
