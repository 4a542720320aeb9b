"""A transformers model that computes packed batches: what every kind of backbone has in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from megaprompt.backbone.known import KeysValues, Known
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PackedBatch, pack
from megaprompt.prompting.query import Query
from megaprompt.prompting.trunks import Trunk


def language_model(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMaskedLM]:
    """Which kind of language model a configuration describes.

    It says so itself, unless it was made by hand; then models that can be masked ones are.
    """
    named = (config.architectures or [""])[0].replace("WithLMHeadModel", "")  # XLM's and FlauBERT's are masked ones
    if named.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False):
        return AutoModelForCausalLM
    return AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM


class PackedModel(nn.Module):
    """A language model without dropout, called on packed batches; gives the logits at their targets.

    Args:
        model: with a language model head, and a forward that takes `inputs_embeds` and `attention_mask`; for rows with
            many queries also 4D masks and `position_ids`.
        trainable: whether the model's own parameters get gradients.
    """

    def __init__(self, model: PreTrainedModel, trainable: bool = False) -> None:
        super().__init__()
        if model.get_output_embeddings() is None:
            raise MegapromptError(f"{type(model).__name__} has no output layer over tokens; give another backbone")
        _fuse_rms_norms(model)
        self.model = model.eval().requires_grad_(trainable)
        self.embedding_size = cast(nn.Embedding, model.get_input_embeddings()).embedding_dim  # of what goes in
        config = model.config.get_text_config()  # OPT's smallest makes its hidden states smaller at the end
        self.hidden_size: int = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        self.causal = language_model(model.config) is AutoModelForCausalLM
        self._first_position = 0 if self.causal else _first_position(model)
        self._targets: Tensor | None = None
        # The output layer is by far the widest: feed it the targets, not every position. Going through the model's own
        # head keeps whatever it does to the logits afterwards (scaling, soft caps).
        model.get_output_embeddings().register_forward_pre_hook(self._select_targets)
        if model.dtype in (torch.float16, torch.bfloat16):
            _answer_in_float32(cast(nn.Linear, model.get_output_embeddings()))

    @property
    def max_positions(self) -> int | None:
        """How many tokens a text can have, if the model's configuration sets a limit.

        Where layers see a sliding window only (Mistral, Gemma), that is the window: masks are the same for all layers.
        """
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        limits = [] if most is None else [most - self._first_position]
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            limits.append(window)
        return min(limits, default=None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def known_bytes(self) -> int:
        """How much memory the keys and values of one token take, about."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        heads = getattr(config, "num_key_value_heads", None) or heads
        return 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize

    def _select_targets(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._targets is None:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self._targets), *inputs[1:])

    def forward(
        self,
        batch: PackedBatch | Tensor,
        prompts: Tensor | None = None,
        reads: Literal["logits", "hidden"] = "logits",
        known: Known | None = None,
    ) -> Tensor:
        """Logits [N targets, vocabulary] of a packed batch, or the last hidden states [N targets, hidden size].

        Args:
            batch: see `prompting.packing`; on this model's device. Or the tokens [T] of one text, which are computed as
                transformers does of its own accord, with logits [T, vocabulary].
            prompts: prompt matrix [P, hidden size] that the batch's pseudo tokens index; may require a gradient.
            known: the keys and values of the batch's trunks.
        """
        if isinstance(batch, Tensor):
            return self.model(input_ids=batch[None]).logits[0]
        embeddings = self.model.get_input_embeddings()(batch.token_ids)  # [R, T, H]
        if prompts is not None:  # even where there are none to place: an empty pass must run backward with the others
            vectors = prompts.index_select(0, batch.pseudo_indices).to(embeddings.dtype)
            embeddings = embeddings.flatten(0, 1).index_copy(0, batch.pseudo_positions, vectors).view_as(embeddings)
        inputs: dict[str, Any] = {"use_cache": False} if self.causal else {}
        if batch.one_by_one:
            inputs |= {"attention_mask": batch.padding_mask()}
        else:
            positions = batch.position_ids + self._first_position
            inputs |= {"attention_mask": batch.added_mask(self.model.dtype), "position_ids": positions}
        if known is not None:
            inputs |= {"past_key_values": known}
        if reads == "hidden":
            states = self.model.base_model(inputs_embeds=embeddings, **inputs)[0]
            return states.flatten(0, 1).index_select(0, batch.targets)
        self._targets = batch.targets
        try:
            return self.model(inputs_embeds=embeddings, **inputs).logits
        finally:
            self._targets = None

    @torch.no_grad()
    def keys_and_values(self, trunk: Trunk | None, known: Mapping[Trunk, KeysValues]) -> KeysValues:
        """The keys and values of a trunk's own tokens, computed in a pass of its own; `known` has those before it.

        Without a trunk, a pass all the same: all ranks must make as many.
        """
        queries = [Query(trunk.tokens, (len(trunk.tokens) - 1,), cuts=trunk.cuts)] if trunk is not None else []
        batch = pack(queries, row_tokens=1).to(self.device)  # one row: it has no other query
        found = Known([[known[before] for before in row] for row in batch.trunks], collect=True)
        self(batch, None, "hidden", found)
        return found.of_row(0)


_HEAD_ROWS = 1 << 13  # of the output layer that are in single precision at once


def _answer_in_float32(head: nn.Linear) -> None:
    """Let a half-precision output layer compute in single precision where nothing is trained.

    In bfloat16 the logits of a small model are an eighth apart or more, and answers would be ranked by rounding.
    """
    half = head.forward

    def forward(hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() or isinstance(head.weight, FakeTensor):
            return half(hidden)
        states = hidden.float()
        parts = [states @ rows.float().T for rows in head.weight.split(_HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    head.forward = forward  # type: ignore[assignment, method-assign]


def _first_position(model: PreTrainedModel) -> int:
    """The position of the first token: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def _fuse_rms_norms(model: PreTrainedModel) -> None:
    """Replace the RMS norms that transformers writes as six operations by PyTorch's single one, where it is the same.

    A step of a small model spends a tenth of its time on them in float32. They are also more exact: transformers' norms
    round to float32 inside, and once more in half precision. Norms that compute anything else are left alone.
    """
    for name, norm in list(model.named_modules()):
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
        if not isinstance(eps, float) or weight is None or weight.dtype not in _PRECISIONS:
            continue
        if weight.dim() != 1 or not weight.numel() or isinstance(weight, FakeTensor):  # its values are elsewhere
            continue
        fused = nn.RMSNorm(len(weight), eps, device=weight.device, dtype=weight.dtype)
        fused.weight = norm.weight
        if _same(fused, norm, len(weight)):
            model.set_submodule(name, fused)


def _same(one: nn.Module, other: nn.Module, width: int) -> bool:
    """Whether two modules compute the same of vectors, whatever the precision of their weights."""
    x = torch.linspace(-3, 5, 2 * width, dtype=torch.float64).view(2, -1)
    a, b = (copy.deepcopy(module).cpu().double()(x) for module in (one, other))
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)
