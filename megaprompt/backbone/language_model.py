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
from megaprompt.backbone.tokenization import WORD, Tokenization
from megaprompt.distributed.zero3 import whole
from megaprompt.errors import MegapromptError
from megaprompt.packing import pack
from megaprompt.prompt_encoder import EmbeddingStatistics
from megaprompt.template import Query, TextEncoder


class Backbone(PackedModel, Tokenization):
    """A language model with its tokenizer; frozen, unless it is to be fine-tuned.

    `model` is the transformers model; `backbone(batch, prompts)` gives the logits at the batch's targets. Sharding
    (`megaprompt.distributed.zero3`) hooks into this module, so callers need not know whether it is sharded.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, trainable: bool = False
    ) -> None:
        super().__init__(model, trainable)
        weights = cast(nn.Parameter, model.get_input_embeddings().weight)
        with whole([weights]):
            self.embedding_statistics = _statistics(weights.detach())
        size = min(len(tokenizer), model.get_output_embeddings().out_features)
        Tokenization.__init__(self, tokenizer, name, size)
        self.fingerprint = fingerprint(model)

    # ---------------------------------------------------------------------------------------------------- tokenization

    def text_encoder(self) -> TextEncoder:
        """What `Template.render` needs: one text at a time, and the special tokens around every text, if any.

        Raises:
            MegapromptError: a masked language model whose tokenizer has no mask token.
        """
        plain = self.tokenizer(WORD, add_special_tokens=False)["input_ids"]
        special = self.tokenizer(WORD)["input_ids"]
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

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compute three short queries packed and as transformers computes them one by one, and compare.

        Raises:
            MegapromptError: the model cannot be given masks and positions, or ignores them (recurrent models, ALiBi),
                or has its own idea of them, so packing is not exact.
        """
        texts = ((11, 12, 13), (11, 12, 14, 15), (11, 16))
        queries = [Query(tokens, len(tokens) - 1, not self.causal) for tokens in texts]
        batch = pack(queries, row_tokens=64).to(self.device)
        alone = [self(torch.tensor(query.tokens, device=self.device))[query.target] for query in queries]
        try:
            together = self(batch)[batch.target_of_query]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model that does not know these arguments stumbles over
            reason = f"cannot compute packed queries ({next(iter(str(error).splitlines()), type(error).__name__)})"
        else:
            plain = torch.stack(alone).float()
            difference = (together.float() - plain).norm() / plain.norm()
            if difference < (0.05 if self.model.dtype in (torch.float16, torch.bfloat16) else 1e-3):
                return
            reason = f"computes packed queries wrongly (relative error {difference:.1e})"
        raise MegapromptError(
            f"backbone {self.name} ({self.model.config.model_type}) {reason}; it needs a transformer that takes 4D "
            f"attention masks and position_ids"
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
