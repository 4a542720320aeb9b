"""A model that is being trained elsewhere, as a frozen backbone for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megaprompt.backbone.language_model import Backbone
from megaprompt.errors import MegapromptError


@contextmanager
def borrowed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[Backbone]:
    """The model as a backbone, for a block; behind it the model is as it was, and so is the state of random numbers.

    Args:
        model: with all of its weights in this process.
        name: what reports call it.

    Raises:
        MegapromptError: the weights are divided among processes.
    """
    if any(not parameter.numel() or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise MegapromptError(
            "the weights of the model are divided among processes; probe saved checkpoints with megaprompt probe"
        )
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    hooks = dict(head._forward_pre_hooks) if head is not None else {}
    training = {module: module.training for module in modules.values()}
    forwards = {module: module.__dict__["forward"] for module in modules.values() if "forward" in module.__dict__}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    cuda = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield Backbone(model, tokenizer, name)
    finally:
        for place, module in modules.items():
            if place and model.get_submodule(place) is not module:
                model.set_submodule(place, module)
        for module, was in training.items():
            module.training = was
            module.__dict__.pop("forward", None)
            if module in forwards:
                module.__dict__["forward"] = forwards[module]
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
        if head is not None:
            for key in [key for key in head._forward_pre_hooks if key not in hooks]:
                del head._forward_pre_hooks[key]
