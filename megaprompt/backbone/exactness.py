"""Whether a model computes packed queries exactly: found out by computing some, since no configuration tells.

Packing is exact where the state of a token depends on nothing but the tokens that its mask shows it, and their
positions. Some models have their own idea of that: MPT counts places in the row instead of `position_ids` (ALiBi),
GPT-Neo's local layers see a limited number of places, recurrent models see everything before. It may show only between
a prefix at the beginning of a row and a branch at its end, so the row that is tried is as wide as real ones.

What is compared are log-probabilities in float32, less their mean over the vocabulary: only differences between tokens
matter, and large logits would hide them. In half precision rounding alone makes a difference, the more the deeper the
model. Rows of one query, which are computed without any trick, tell how much; packing may add little to that.

Going on from known keys and values (see `prompting.trunks`) is tried in the same way, with many between a trunk and the
row, as there are with long trunks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megaprompt.backbone.known import KeysValues, Known
from megaprompt.backbone.packed import PackedModel
from megaprompt.errors import MegapromptError, first_line
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.prompting.trunks import Trunk, trunks_of

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.004, torch.bfloat16: 0.03}
"""The largest error of a target that needs no explanation: in half precision, four roundings."""
_LIMIT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
"""The largest error that rounding may explain. (Measured: 0.039 in bfloat16 with 30 layers.)"""
_TRUNK = 4  # tokens that all queries begin with
_CUTS = (2, 3)  # within them, where keys and values are tried
_BETWEEN = 4  # rows' widths of keys that nobody sees
_BRANCHES = (3, 9, 5, 14, 7)  # tokens behind them, in turn


class _Text(NamedTuple):
    tokens: tuple[int, ...]
    targets: tuple[int, ...]  # positions of it that are compared


@torch.no_grad()
def exact_size(model: PackedModel, size: PassSize, about: str, mask: int | None) -> PassSize:
    """The size of passes that a model computes exactly: `size`, or without trunks, or with a row for each query.

    All ranks must call it.

    Args:
        about: the model's name, for messages.
        mask: the token that stands for the answer, if the model is bidirectional.

    Raises:
        MegapromptError: not even rows of one query are exact, as with models that cannot be given vectors for tokens.
    """
    texts = _texts(model, size.row_tokens, mask)
    ordered = sorted(texts)  # as they stand in the row
    tried = [ordered[0], ordered[len(ordered) // 2], ordered[-1], max(texts, key=lambda text: len(text.tokens))]
    dtype = model.model.dtype
    noise, reason = _compare(model, tried, tried, None)
    if not noise < _LIMIT[dtype]:
        raise MegapromptError(
            f"backbone {about} does not compute queries exactly ({reason}); give a causal or masked model of "
            f"transformers that takes inputs_embeds and attention_mask"
        )
    if size.row_tokens is None:
        return size
    limit = max(_TOLERANCE[dtype], 2 * noise)
    error, reason = _compare(model, tried, texts, size.row_tokens)
    if not error < limit:
        logger.warning("%s does not compute packed queries exactly (%s)", about, reason)
        logger.warning("every query gets a row of its own, which is slower")
        return replace(size, row_tokens=None)
    if not model.causal or not size.trunks:
        return size
    error, reason = _compare(model, tried, texts, size.row_tokens, _CUTS)
    if error < limit:
        return size
    logger.info("%s does not go on exactly from known keys and values (%s); none are kept", about, reason)
    return replace(size, trunks=False)


def _compare(
    model: PackedModel,
    tried: Sequence[_Text],
    texts: Sequence[_Text],
    row_tokens: int | None,
    cuts: tuple[int, ...] = (),
) -> tuple[float, str]:
    """The error of some texts, computed among all texts, and a word about it.

    The truth is what transformers computes of its own accord for one text at a time.
    """
    try:
        plain = torch.cat([model(torch.tensor(t.tokens, device=model.device))[list(t.targets)] for t in tried])
        logits = dict(zip(_places(texts), _logits(model, texts, row_tokens, cuts), strict=True))
        error = _error(torch.stack([logits[place] for place in _places(tried)]), plain)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a model that does not know these arguments stumbles over
        return float("inf"), first_line(problem)
    return error, f"relative error {error:.1e}"


def _texts(model: PackedModel, row_tokens: int | None, mask: int | None) -> list[_Text]:
    """Texts of different length with a common beginning that fill a row, always the same ones."""
    table = cast(nn.Embedding, model.model.get_input_embeddings())
    # Padding has no position of its own in some models, whatever their configuration says.
    special = {table.padding_idx, getattr(model.model.config.get_text_config(), "pad_token_id", None), mask}
    usual = [token for token in range(min(table.num_embeddings, 2000)) if token not in special]
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> tuple[int, ...]:
        return tuple(usual[i] for i in torch.randint(len(usual), (count,), generator=generator))

    trunk = random(_TRUNK)
    texts: list[_Text] = []
    filled = 0
    while len(texts) < len(_BRANCHES) or filled < (row_tokens or 0):
        branch = random(_BRANCHES[len(texts) % len(_BRANCHES)])
        tokens = (*trunk, *branch) if mask is None else (*trunk, *branch, mask)
        last = len(tokens) - 1
        texts.append(_Text(tokens, (last // 2, last) if mask is None else (last,)))
        filled += len(branch) if mask is None else len(tokens)
    return texts


def _places(texts: Sequence[_Text]) -> list[tuple[tuple[int, ...], int]]:
    return [(text.tokens, target) for text in texts for target in text.targets]


def _logits(model: PackedModel, texts: Sequence[_Text], row_tokens: int | None, cuts: tuple[int, ...]) -> Tensor:
    """The logits [targets, vocabulary] of packed texts, which are cut."""
    queries = [Query(text.tokens, text.targets, bidirectional=not model.causal, cuts=cuts) for text in texts]
    batch = pack(queries, row_tokens).to(model.device)
    if not cuts:
        return model(batch)[batch.target_of_query]
    trunks: dict[Trunk, KeysValues] = {}
    for trunk in trunks_of(queries[0]):  # the same of all
        trunks[trunk] = model.keys_and_values(trunk, trunks)
    unseen = torch.zeros(len(batch.trunks), _BETWEEN * (row_tokens or 0), dtype=torch.int64, device=model.device)

    def wider(visible: Tensor) -> Tensor:
        return torch.cat([visible[:, : cuts[-1]], unseen, visible[:, cuts[-1] :]], dim=1)

    between = tuple(
        (
            keys.new_zeros(keys.shape[0], unseen.shape[1], keys.shape[2]),
            values.new_zeros(values.shape[0], unseen.shape[1], values.shape[2]),
        )
        for keys, values in trunks[trunk]
    )
    batch = replace(batch, visible_from=wider(batch.visible_from), visible_until=wider(batch.visible_until))
    known = Known([[*(trunks[trunk] for trunk in row), between] for row in batch.trunks])
    return model(batch, known=known)[batch.target_of_query]


def _error(logits: Tensor, expected: Tensor) -> float:
    """The largest relative error of the centred log-probabilities of a target."""
    found, true = (rows.float().log_softmax(-1) for rows in (logits, expected))
    found, true = (rows - rows.mean(-1, keepdim=True) for rows in (found, true))
    return ((found - true).norm(dim=-1) / true.norm(dim=-1)).max().item()
