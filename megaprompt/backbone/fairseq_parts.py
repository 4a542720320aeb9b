"""Reading fairseq's model-parallel checkpoints: their parts, the tensors in them, and the shape of the model.

Nothing in a checkpoint is executed: it is read with PyTorch's `weights_only` loader, and classes that old checkpoints
refer to are replaced by empty ones.

Where fairseq's releases differ or could not be looked at: tensors may be float16 or float32; `args` (2020) or `cfg`
(later) describes the model; the final norm exists if the tensor does, which must agree with `version` and the options,
because fairseq itself drops the norm silently when `version` is missing or below 3.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone.megatron import FairseqMegatronConfig
from megaprompt.errors import MegapromptError, UsageError, first_line


class _Anything:
    """Stands for a class that a checkpoint refers to but that has nothing to do with its weights."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


_ALLOWED: list[Any] = [
    argparse.Namespace,
    *(
        (type(name.rpartition(".")[2], (_Anything,), {}), name)
        for name in (
            "fairseq.meters.AverageMeter",
            "fairseq.meters.StopwatchMeter",
            "fairseq.meters.TimeMeter",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "omegaconf.nodes.AnyNode",
            "typing.Any",
        )
    ),
]


def load_part(path: Path) -> dict[str, Any]:
    """A part's checkpoint. Zip containers are mapped into memory, older ones read.

    Raises:
        MegapromptError: it is damaged, or holds anything but tensors and options.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        for mapped in (True, False):
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                break
            except Exception as error:
                if mapped and "mmap" in str(error):  # not a zip container
                    continue
                reason = next(
                    (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), ""
                )
                if reason or "WeightsUnpickler" in str(error):
                    raise MegapromptError(
                        f"{path}: refused, it holds more than tensors and options, maybe code ({reason.strip()})"
                    ) from error
                raise MegapromptError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise MegapromptError(f"{path}: is no fairseq checkpoint (no `model` in it)")
    return found


def _plain(value: Any) -> Any:
    """Options as plain Python, whatever containers (Namespace, omegaconf) they came in."""
    if isinstance(value, _Anything):
        return _plain(value.__dict__.get("_content", value.__dict__.get("_val")))
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def model_options(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    options = _plain(checkpoint.get("args")) or (_plain(checkpoint.get("cfg")) or {}).get("model")
    if not isinstance(options, dict):
        raise MegapromptError(f"{path}: neither `args` nor `cfg` describes the model; it cannot be converted")
    return options


def configuration(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: int, path: Path
) -> FairseqMegatronConfig:
    """The model's shape: from the tensors, where they tell it, and checked against the options."""

    def refuse(why: str) -> MegapromptError:
        return MegapromptError(f"{path}: {why}; only models like transformer_lm_megatron_11b can be converted")

    if not options.get("decoder_normalize_before", True) or options.get("decoder_learned_pos"):
        raise refuse("it is no pre-norm transformer with sinusoidal positions")
    if options.get("activation_fn", "gelu") != "gelu":
        raise refuse(f"its activation is {options['activation_fn']}")
    if not options.get("share_decoder_input_output_embed", True) or "embed_out" in tensors:
        raise refuse("its output layer is not its embedding")
    if any(re.search(r"layer_norms\.\d|in_proj_weight|encoder_attn", name) for name in tensors):
        raise refuse("its tensors have names of fairseq before November 2019")
    rows, width = tensors["embed_tokens.weight"].shape
    layers = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))), default=-1)
    if options.get("decoder_layers", layers) != layers or not layers:
        raise refuse(f"it says {options.get('decoder_layers')} layers and has {layers}")
    if options.get("decoder_embed_dim", width) != width:
        raise refuse(f"it says a width of {options['decoder_embed_dim']} and has {width}")
    final_norm = "layer_norm.weight" in tensors
    version = float(tensors["version"].reshape(-1)[0]) if "version" in tensors else 0.0
    wants_norm = not (options.get("no_decoder_final_norm") or options.get("decoder_final_norm") is False)
    if final_norm != (version >= 3 and wants_norm):
        raise MegapromptError(
            f"{path}: `decoder.layer_norm` is {'there' if final_norm else 'missing'}, but version {version:g} and the "
            f"options say otherwise; fairseq would change the model silently, so repair the checkpoint first"
        )
    return FairseqMegatronConfig(
        vocab_size=rows * parts,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=int(options["decoder_attention_heads"]),
        intermediate_size=tensors["layers.0.fc1.weight"].shape[0] * parts,
        max_position_embeddings=int(options.get("max_target_positions") or options.get("tokens_per_sample") or 1024),
        final_norm=final_norm,
        scale_embedding=not options.get("no_scale_embedding", False),
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def decoder_tensors(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by name without `decoder.`, whatever has no place in the converted model included."""
    tensors = {}
    for name, tensor in checkpoint["model"].items():
        if not name.startswith("decoder.") or not isinstance(tensor, Tensor):
            raise MegapromptError(f"{path}: unknown entry {name}; only decoders can be converted")
        tensors[name.removeprefix("decoder.")] = tensor
    if "embed_tokens.weight" not in tensors:
        raise MegapromptError(f"{path}: has no decoder.embed_tokens.weight; only language models can be converted")
    return tensors


def find_parts(directory: Path) -> list[Path]:
    """The parts of a checkpoint, in order.

    Raises:
        UsageError: there are none, or some are missing.
    """
    found = {int(m[1]): p for p in directory.glob("*.pt") if (m := re.search(r"-model_part-(\d+)\.pt$", p.name))}
    if not found and (directory / "model.pt").is_file():
        return [directory / "model.pt"]
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UsageError(f"{directory}: there is no *-model_part-{missing[0]}.pt; give the directory with all parts")
    if len({re.sub(r"\d+\.pt$", "", path.name) for path in found.values()}) > 1:
        raise UsageError(f"{directory}: holds parts of several checkpoints; leave only those of one")
    return [found[i] for i in range(len(found))]
