"""A DeepSpeed configuration whose buckets fit a model: `megaprompt plan ... --write-config FILE`.

A layer is gathered at once, as one leaf module, while the one before it computes; what is small stays gathered. See
ds_configs/README.md for what each value means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaprompt.backbone.packed import language_model
from megaprompt.config import PlanConfig, find_configuration
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.errors import UsageError
from megaprompt.files import write_file
from megaprompt.resources.layers import layers_of
from megaprompt.resources.plan import Plan, plan
from megaprompt.resources.profile import shape_of


@dataclass(frozen=True)
class Sizes:
    """Of a model's parameters, in elements."""

    layer_class: str  # empty if there are no layers of one kind
    layer: int  # matrices of the largest layer
    other: int  # of the largest module outside of the layers, such as the embedding
    largest: int  # of the largest parameter
    vector: int  # of the largest vector: norms and biases

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        layers = layers_of(model)
        parameters = list(model.parameters())
        inside = {p for layer in layers for p in layer.parameters()}
        outside = [sum(p.numel() for p in m.parameters(recurse=False) if p not in inside) for m in model.modules()]
        return cls(
            type(layers[0]).__name__ if layers else "",
            max((sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers), default=0),
            max(outside),
            max(p.numel() for p in parameters),
            max((p.numel() for p in parameters if p.dim() < 2), default=0),
        )


def write_configuration(config: PlanConfig, best: Plan) -> Plan:
    """Write a configuration to `config.write_config`, made of that of the best plan, or of zero3 if that has none.

    Returns its plan.

    Raises:
        UsageError: there is no such backbone, or the configuration does not shard.
    """
    assert config.write_config is not None
    base = Path("ds_configs/zero3.json" if best.name == "none" else best.name)
    if read_deepspeed_config(base).sharding is None:
        raise UsageError(f"--write-config: {base} does not shard; give --deepspeed with a configuration of stage 3")
    with torch.device("meta"):
        shape = shape_of(config.backbone)
        sizes = Sizes.of(language_model(shape).from_config(shape))
    settings = json.loads(find_configuration(base).read_text(encoding="utf-8"))
    for values in _values(sizes, settings["zero_optimization"], best.ranks):
        settings["zero_optimization"] |= values
        write_file(config.write_config, json.dumps(settings, indent=2).encode() + b"\n")
        found = plan(config, config.write_config)
        if found.fits:
            break
    return found


def _values(sizes: Sizes, zero: dict[str, Any], ranks: int) -> Iterator[dict[str, Any]]:
    """Section `zero_optimization`: first with a layer that is gathered ahead, then without."""
    at_once = max(sizes.layer, sizes.other)
    always: dict[str, Any] = {"stage3_param_persistence_threshold": sizes.vector, "reduce_bucket_size": at_once}
    if zero.get("offload_param", {}).get("device") == "nvme":  # which gathers ahead by its own rules, module by module
        yield always | {"offload_param": zero["offload_param"] | {"buffer_size": -(-sizes.largest // ranks)}}
        return
    if sizes.layer_class:
        always["leaf_module"] = {"classes": [sizes.layer_class]}
    for ahead in (at_once, 0):
        yield always | {
            "stage3_prefetch_bucket_size": ahead,
            "stage3_max_live_parameters": sizes.layer + sizes.other + ahead,
            "stage3_max_reuse_distance": ahead,
        }
