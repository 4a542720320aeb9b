"""The layers of a model: modules of one kind, one after the other, that hold most of its parameters."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """In their order; none if no kind is repeated, as where one layer's weights serve all (ALBERT)."""
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    alike = [layers for layers in lists if len(layers) > 1 and len({type(layer) for layer in layers}) == 1]
    return max(alike, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()), default=[])
