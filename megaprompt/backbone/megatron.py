"""The Megatron 11B language model of fairseq, with the interface of a transformers model.

A pre-norm transformer with biases in all of its linear layers, exact GELU, sinusoidal positions, embeddings that are
scaled by the square root of the width, and an output layer that is the embedding matrix. (Facts: the release of the
model, fairseq's `transformer_lm_megatron_11b`.)

No class of transformers is exactly that. XGLM comes close, but scales inside its embedding layer, so vectors that are
given instead of embeddings would not be scaled; P-tuning's prompts are put in before the scale. And it always has a
final norm, which checkpoints of old versions have not.

In half precision PyTorch's softmax, GELU and layer norm compute in float32 inside. The residual stream does not; prefer
bfloat16 to float16 where there is a choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

_FIRST_POSITION = 2  # 0 is not used, 1 stands for padding


class FairseqMegatronConfig(PretrainedConfig):
    """Shape of the model. The defaults are Megatron 11B's."""

    model_type = "fairseq_megatron"

    def __init__(
        self,
        vocab_size: int = 51200,
        hidden_size: int = 3072,
        num_hidden_layers: int = 72,
        num_attention_heads: int = 32,
        intermediate_size: int = 18432,
        max_position_embeddings: int = 1024,
        final_norm: bool = True,
        scale_embedding: bool = True,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.final_norm = final_norm
        self.scale_embedding = scale_embedding
        more.setdefault("tie_word_embeddings", True)
        super().__init__(**more)


class SinusoidalPositions(nn.Module):
    """Position vectors: half of the elements are sines, the other half cosines, of geometrically falling frequencies.

    The table is computed in float32 and cast. It is no buffer, so that neither loading nor sharding touches it.
    """

    def __init__(self, positions: int, hidden_size: int) -> None:
        super().__init__()
        self.positions, self.hidden_size = positions, hidden_size
        self._table: Tensor | None = None

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [..., hidden size] of positions [...] that count from 0."""
        if self._table is None or self._table.device != position_ids.device:
            half = self.hidden_size // 2
            step = math.log(10000) / (half - 1)
            frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
            angles = torch.arange(self.positions + _FIRST_POSITION, dtype=torch.float32)[:, None] * frequencies
            self._table = torch.cat([angles.sin(), angles.cos()], dim=1).to(position_ids.device)
        return self._table[position_ids + _FIRST_POSITION].to(dtype)


class FairseqMegatronAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: FairseqMegatronConfig, layer: int) -> None:
        super().__init__()
        self.layer, width = layer, config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, past: Cache | None) -> Tensor:
        """x [R, T, hidden size]; mask [R, 1, T, K+T], boolean or additive; causal and without a past if None."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            key, value = past.update(key, value, self.layer)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FairseqMegatronLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each behind a norm and added to its input."""

    def __init__(self, config: FairseqMegatronConfig, layer: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = FairseqMegatronAttention(config, layer)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)  # fairseq's name for the one before the network
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, past: Cache | None) -> Tensor:
        """x [R, T, hidden size] -> the same shape."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask, past)
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


class FairseqMegatronPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the classes below."""

    config_class = FairseqMegatronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["FairseqMegatronLayer"]  # noqa: RUF012 (transformers declares it so)


class FairseqMegatronModel(FairseqMegatronPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: FairseqMegatronConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = SinusoidalPositions(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(FairseqMegatronLayer(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size) if config.final_norm else nn.Identity()
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states [R, T, hidden size].

        Args:
            input_ids: [R, T], or instead of them
            inputs_embeds: [R, T, hidden size], in the place of embeddings before they are scaled.
            attention_mask: [R, K+T] with 1 for tokens and 0 for padding (on the right, or results are meaningless), or
                [R, 1, T, K+T], boolean or additive, which says all; causal if not given.
            position_ids: [R, T], from 0; K, K+1, K+2, ... if not given.
            past_key_values: what is known of K positions before these.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        causal = torch.ones(length, past + length, dtype=torch.bool, device=inputs_embeds.device).tril(past)
        if attention_mask is None:
            attention_mask = causal if past else None
        elif attention_mask.dim() == 2:
            attention_mask = causal & attention_mask.bool()[:, None, None, :]
        elif attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.to(inputs_embeds.dtype)
        x = inputs_embeds * self.scale + self.embed_positions(position_ids, inputs_embeds.dtype)
        for layer in self.layers:
            x = layer(x, attention_mask, past_key_values)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class FairseqMegatronForCausalLM(FairseqMegatronPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FairseqMegatronConfig) -> None:
        super().__init__(config)
        self.model = FairseqMegatronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> CausalLMOutput:
        """Logits [R, T, vocabulary]; the options are those of `FairseqMegatronModel.forward`."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **options).last_hidden_state))


class FairseqMegatronTokenizer(PreTrainedTokenizerFast):
    """GPT-2's byte-level BPE with the ids of a fairseq dictionary (see `megaprompt.backbone.fairseq_bridge`).

    Tokens that the dictionary lacks have ids from `dictionary_size` on in the BPE model, which wants them different;
    what comes out is the id of `<unk>`. (A class with an `__init__` would not be read from tokenizer.json.)
    """

    def _convert_encoding(self, *args: Any, **options: Any) -> Any:
        found, encodings = super()._convert_encoding(*args, **options)
        size, unknown = self.init_kwargs["dictionary_size"], self.unk_token_id
        found["input_ids"] = [[i if i < size else unknown for i in ids] for ids in found["input_ids"]]
        return found, encodings


AutoConfig.register(FairseqMegatronConfig.model_type, FairseqMegatronConfig)
AutoModelForCausalLM.register(FairseqMegatronConfig, FairseqMegatronForCausalLM)
AutoTokenizer.register(FairseqMegatronConfig, fast_tokenizer_class=FairseqMegatronTokenizer)
