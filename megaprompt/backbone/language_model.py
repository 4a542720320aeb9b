"""Language models as backbones, causal or masked: any of transformers that takes 4D masks and position_ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megaprompt.backbone.packed import PackedModel
from megaprompt.distributed.zero3 import whole
from megaprompt.errors import MegapromptError
from megaprompt.packing import pack
from megaprompt.prompt_encoder import EmbeddingStatistics
from megaprompt.template import Query, TextEncoder

_WORD = "a"  # what stands before text that is encoded as a continuation


class Backbone(PackedModel):
    """A language model with its tokenizer; frozen, unless it is to be fine-tuned.

    `model` is the transformers model; `backbone(batch, prompts)` gives the logits at the batch's targets. Sharding
    (`megaprompt.distributed.zero3`) hooks into this module, so callers need not know whether it is sharded.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, trainable: bool = False
    ) -> None:
        super().__init__(model, trainable)
        self.tokenizer = tokenizer
        self.name = name
        weights = cast(nn.Parameter, model.get_input_embeddings().weight)
        with whole([weights]):
            self.embedding_statistics = _statistics(weights.detach())
        self.vocabulary_size: int = min(len(tokenizer), model.get_output_embeddings().out_features)
        self.fingerprint = fingerprint(model)

    # ---------------------------------------------------------------------------------------------------- tokenization

    def encode(self, texts: Sequence[str], *, is_start: bool) -> list[list[int]]:
        """Vocabulary ids of each text, without special tokens.

        Text that does not start the sequence follows a word: it is encoded behind one, which gives the right
        leading-space convention for every kind of tokenizer.
        """
        if not texts:
            return []
        if is_start:
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        word = self.tokenizer(_WORD, add_special_tokens=False)["input_ids"]
        both = self.tokenizer([f"{_WORD} {text.lstrip()}" for text in texts], add_special_tokens=False)["input_ids"]
        for ids, text in zip(both, texts, strict=True):
            if ids[: len(word)] != word:
                raise MegapromptError(f"the tokenizer of {self.name} joins {text!r} to the word before it")
        return [ids[len(word) :] for ids in both]

    def text_encoder(self) -> TextEncoder:
        """What `Template.render` needs: one text at a time, and the special tokens around every text, if any.

        Raises:
            MegapromptError: a masked language model whose tokenizer has no mask token.
        """
        plain = self.tokenizer(_WORD, add_special_tokens=False)["input_ids"]
        special = self.tokenizer(_WORD)["input_ids"]
        prefix = special[: special.index(plain[0])] if plain[0] in special else []
        encoder = TextEncoder(lambda text, is_start: self.encode([text], is_start=is_start)[0], tuple(prefix))
        if self.causal:
            return encoder
        if self.tokenizer.mask_token_id is None:
            raise MegapromptError(
                f"the tokenizer of {self.name} has no mask token, which a masked language model needs"
            )
        suffix = special[len(prefix) + len(plain) :]
        return encoder._replace(mask=self.tokenizer.mask_token_id, suffix=tuple(suffix))

    def single_tokens(self, words: Sequence[str]) -> list[int | None]:
        """The id of each word in mid-sentence, or None where it is not exactly one known token."""
        unknown = self.tokenizer.unk_token_id
        ids = self.encode(words, is_start=False)
        return [i[0] if len(i) == 1 and i[0] != unknown and i[0] < self.vocabulary_size else None for i in ids]

    @torch.no_grad()
    def embeddings(self, tokens: Sequence[int]) -> Tensor:
        """The input vectors [tokens, hidden size] of some tokens, float32, on the CPU. All ranks must call it."""
        table = cast(nn.Embedding, self.model.get_input_embeddings())
        with whole([cast(nn.Parameter, table.weight)]):
            return table(torch.tensor(tokens, device=self.device)).float().cpu()

    def text_of(self, token: int) -> str:
        """A token as a word, without the white space that it starts with."""
        return str(self.tokenizer.decode([token])).strip()

    # ----------------------------------------------------------------------------------------------------------- check

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compute three short queries packed and one by one, and compare.

        Raises:
            MegapromptError: the model ignores masks or positions (recurrent models, ALiBi), so packing is not exact.
        """
        texts = ((11, 12, 13), (11, 12, 14, 15), (11, 16))
        queries = [Query(tokens, len(tokens) - 1, not self.causal) for tokens in texts]
        together = self(pack(queries, row_tokens=64).to(self.device))
        alone = torch.cat([self(pack([query], row_tokens=64).to(self.device)) for query in queries])
        packed = pack(queries, row_tokens=64)
        together = together[packed.target_of_query.to(self.device)].float()
        error = (together - alone.float()).norm() / alone.float().norm()
        tolerance = 0.05 if self.model.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not error < tolerance:
            raise MegapromptError(
                f"backbone {self.name} ({self.model.config.model_type}) computes packed queries wrongly (relative "
                f"error {error:.1e}); it needs a transformer that takes 4D attention masks and position_ids"
            )


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
