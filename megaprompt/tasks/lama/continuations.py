"""What a causal model writes on its own where the answer stands: its likeliest continuations, as whole strings.

A continuation ends before a punctuation mark, a new line, or the end of the text. Its probability is that of its tokens
times that of ending there. Continuations only get less likely as they get longer, so the beam ends when none that is
open can be among the best any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaprompt.backbone.tokenization import Tokenization
from megaprompt.prompting.query import Query

_MARKS = '.,;:!?()[]{}"\n'
LONGEST = 16
"""Tokens of a continuation, at most."""


def ends(tokenization: Tokenization) -> Tensor:
    """Bool [vocabulary]: the tokens before which a continuation ends."""
    tokenizer, size = tokenization.tokenizer, tokenization.vocabulary_size
    texts = tokenizer.batch_decode([[token] for token in range(size)])
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    found = torch.tensor([_is_end(text, piece) for text, piece in zip(texts, pieces, strict=True)])
    found[[token for token in tokenizer.all_special_ids if token < size]] = True
    return found


def _is_end(text: str, piece: str) -> bool:
    """Whether it is a mark or nothing at all. White space is none, which some models write as a token of its own."""
    visible = text.lstrip(" ")
    if visible:
        return visible[0] in _MARKS
    return not piece or bool(piece.strip(_WHITE))


_WHITE = " \u2581\u0120"  # as SentencePiece and byte-level BPE write a space


def continuations(
    query: Query,
    log_probabilities: Callable[[Sequence[Query]], Tensor],
    end: Tensor,
    decode: Callable[[Sequence[int]], str],
    count: int,
) -> list[tuple[str, float]]:
    """The best continuations of a query that asks for an answer, with their probabilities.

    The beam is `count` wide, so it finds what is best among what begins well.

    Args:
        log_probabilities: of the next token [Q, vocabulary] behind each of some queries.
        end: bool [vocabulary], the tokens before which a continuation ends.
        decode: tokens to text.
        count: how many are wanted at most.
    """
    written: dict[str, float] = {}  # the same text in other tokens is as likely as they are together
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for length in range(LONGEST + 1):
        asked = [query._replace(tokens=(*query.tokens, *w), targets=(query.targets[0] + length,)) for _, w in beam]
        log = log_probabilities(asked).double().cpu()
        before = torch.tensor([score for score, _ in beam], dtype=torch.float64)
        if length:
            for (_, tokens), p in zip(beam, (before + log[:, end].logsumexp(1)).exp().tolist(), strict=True):
                text = decode(tokens).strip()
                written[text] = written.get(text, 0.0) + p
        scores = (before[:, None] + log).masked_fill(end, -torch.inf).flatten()
        best = scores.topk(min(count, len(scores)))
        least = sorted(written.values(), reverse=True)[count - 1] if len(written) >= count else 0.0
        beam = [
            (score, (*beam[place // len(end)][1], place % len(end)))
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if torch.tensor(score).exp() > least
        ]
        if not beam:
            break
    return sorted(written.items(), key=lambda one: -one[1])[:count]
