"""Language models as backbones, causal or masked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megaprompt.backbone.exactness import exact_size
from megaprompt.backbone.packed import PackedModel
from megaprompt.backbone.tokenization import WORD, Tokenization
from megaprompt.distributed.zero3 import whole
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import EmbeddingStatistics
from megaprompt.prompting.query import TextEncoder

_REMEMBERED = 1 << 12
"""Texts whose tokens are remembered: what stands before the answer is the same for all candidates."""


class Backbone(PackedModel):
    """A language model with its tokenizer; frozen, unless it is to be fine-tuned.

    `model` is the transformers model; `backbone(batch, prompts)` gives the logits at the batch's targets. Sharding
    (`megaprompt.distributed.zero3`) hooks into this module, so callers need not know whether it is sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        trainable: bool = False,
        random_weights: int | None = None,
    ) -> None:
        super().__init__(model, trainable)
        self.random_weights = random_weights  # their seed; None for those of the model itself
        weights = cast(nn.Parameter, model.get_input_embeddings().weight)
        with whole([weights]):
            self.embedding_statistics = _statistics(weights.detach())
        size = min(len(tokenizer), model.get_output_embeddings().out_features)
        self.tokenization = Tokenization(tokenizer, name, size)
        self.fingerprint = fingerprint(model)

    @property
    def name(self) -> str:
        """As the user gave it."""
        return self.tokenization.name

    @property
    def vocabulary_size(self) -> int:
        """Tokens that it can answer with."""
        return self.tokenization.vocabulary_size

    def text_encoder(self) -> TextEncoder:
        """What `Template.render` needs: one text at a time, and the special tokens around every text, if any.

        Raises:
            MegapromptError: a masked language model whose tokenizer has no mask token.
        """
        tokenization = self.tokenization  # not the weights: what is made here may outlive them
        plain = tokenization.tokenizer(WORD, add_special_tokens=False)["input_ids"]
        special = tokenization.tokenizer(WORD)["input_ids"]
        prefix = special[: special.index(plain[0])] if plain[0] in special else []

        @lru_cache(_REMEMBERED)
        def encode(text: str, is_start: bool) -> tuple[int, ...]:
            return tuple(tokenization.encode([text], is_start=is_start)[0])

        encoder = TextEncoder(encode, tuple(prefix))
        if self.causal:
            return encoder
        mask = tokenization.tokenizer.mask_token_id
        if mask is None:
            raise MegapromptError(
                f"the tokenizer of {self.name} has no mask token, which a masked language model needs"
            )
        suffix = special[len(prefix) + len(plain) :]
        fast = tokenization.tokenizer.is_fast
        words = (lambda text, is_start: tokenization.words(text, is_start=is_start)) if fast else None
        return encoder._replace(mask=mask, suffix=tuple(suffix), words=words)

    @torch.no_grad()
    def embeddings(self, tokens: Sequence[int]) -> Tensor:
        """The input vectors [tokens, hidden size] of some tokens, float32, on the CPU. All ranks must call it."""
        table = cast(nn.Embedding, self.model.get_input_embeddings())
        with whole([cast(nn.Parameter, table.weight)]):
            return table(torch.tensor(tokens, device=self.device)).float().cpu()

    @torch.no_grad()
    def embedding_products(self, vector: Tensor) -> Tensor:
        """The products [vocabulary] of the input vectors of all tokens with a vector [hidden size], float32. All ranks
        must call it."""
        table = cast(nn.Embedding, self.model.get_input_embeddings())
        tokens = torch.arange(self.vocabulary_size, device=self.device)
        with whole([cast(nn.Parameter, table.weight)]):
            return torch.cat([table(part).float() @ vector.float() for part in tokens.split(1 << 12)])

    # ----------------------------------------------------------------------------------------------------------- check

    def exact_size(self, size: PassSize) -> PassSize:
        """The size of passes that this model computes exactly: `size`, or with a row for each query. All ranks must
        call it.

        Raises:
            MegapromptError: not even that is exact (see `backbone.exactness`).
        """
        about = f"{self.name} ({self.model.config.model_type})"
        return exact_size(self, size, about, self.text_encoder().mask)


def _statistics(embeddings: Tensor) -> EmbeddingStatistics:
    mean = embeddings.mean(0, dtype=torch.float32)
    squares = sum((rows.float() - mean).square().sum().item() for rows in embeddings.split(1 << 12))
    return EmbeddingStatistics(mean, (squares / embeddings.numel()) ** 0.5)


def fingerprint(model: PreTrainedModel) -> str:
    """Names the weights: a hash of every parameter's name, shape and 64 of its values, as bfloat16.

    So it is the same in float32 and bfloat16, cheap, and different for two checkpoints of one architecture.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        with whole([parameter]):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
            digest.update(json.dumps([name, list(parameter.shape)]).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
