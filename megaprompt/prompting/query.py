"""Queries: what a template becomes, and how its tokens are written, piece by piece.

Text between pseudo tokens is encoded as one piece, with the answer in it where that is given, so that a sentence has
the tokens that it would have in any text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import ne
from typing import NamedTuple

from megaprompt.errors import MegapromptError, UsageError


class Query(NamedTuple):
    """The token sequence of one query.

    At `tokens[target]`, for each of the targets, the model's output is read: there it predicts the answer, or, where
    the answer is a text that is given, the token in `labels` that belongs to the target.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    labels: tuple[int, ...] = ()
    bidirectional: bool = False  # every token sees all others, not only those before it
    cuts: tuple[int, ...] = ()  # where its trunks end, ascending; tokens before are computed in advance (see `trunks`)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two sequences begin with alike."""
    return next((i for i, differ in enumerate(map(ne, a, b)) if differ), min(len(a), len(b)))


class TextEncoder(NamedTuple):
    """How one backbone reads text; made by `megaprompt.backbone`.

    `encode(text, is_start)` gives vocabulary ids without special tokens. Text that is not the start follows a word, as
    a new one if it starts with white space, else as a part of it ("'s").
    `prefix` is what stands before every text (a beginning-of-text token, or nothing). A bidirectional model has a
    `mask` token, which stands for the answer, a `suffix` after every text, and `words(text, is_start)`, the number of
    the word that each of the same tokens belongs to.
    """

    encode: Callable[[str, bool], Sequence[int]]
    prefix: tuple[int, ...] = ()
    mask: int | None = None
    suffix: tuple[int, ...] = ()
    words: Callable[[str, bool], list[int]] | None = None


@dataclass
class QueryWriter:
    """The tokens of a query while they are written, piece by piece.

    Args:
        encoder: of the backbone.
        text: that is not encoded yet; at first what stands in front of it all, such as demonstrations.
    """

    encoder: TextEncoder
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    words: list[int | None] = field(default_factory=list)  # the word of each token; None of pseudo and special tokens
    labels: dict[int, int] = field(default_factory=dict)  # by position: tokens of the answer, and of words behind it
    masks: list[int] = field(default_factory=list)  # positions where the answer is asked for
    pseudo: int = 0
    is_start: bool = True
    behind_pseudo_token: bool = False
    _own: int = 0  # characters of `text` that stand in front of it all
    _answer: tuple[int, int] | None = None  # where in `text` the answer is
    _first: int = 0  # position of the first token behind what stands in front
    _answered: tuple[int, int] = (0, 0)  # positions of the answer

    def __post_init__(self) -> None:
        self._write(self.encoder.prefix, [None] * len(self.encoder.prefix))
        self._own, self._first = len(self.text), len(self.tokens)

    def _as_it_stands(self, text: str) -> tuple[str, bool]:
        """Text as it is encoded: a line's end is kept, spaces before the next word are not."""
        new_word = (self.behind_pseudo_token or text[:1].isspace()) and not self.is_start
        words = text.strip(" \t")
        return (f" {words}" if new_word else words), self.is_start

    def _shared(self, length: int, ids: Sequence[int]) -> int:
        """How many of the tokens of `text` are those of its first `length` characters alone."""
        alone = self.encoder.encode(*self._as_it_stands(self.text[:length])) if self.text[:length].strip() else []
        return common(alone, ids)

    def flush(self) -> None:
        """Encode the text so far."""
        if self.text.strip():
            stands = self._as_it_stands(self.text)
            ids, start = self.encoder.encode(*stands), len(self.tokens)
            words: Sequence[int | None] = [None] * len(ids)
            if self.encoder.words is not None:
                before = 1 + max((word for word in self.words if word is not None), default=-1)
                words = [before + word for word in self.encoder.words(*stands)]
            if self._own:
                self._first = start + self._shared(self._own, ids)
            if self._answer is not None:
                first, end = (self._shared(length, ids) for length in self._answer)
                self._answered = (start + first, start + end)
            elif self._answered[1] and self.encoder.mask is None:  # behind the answer of a causal backbone
                first = 0
            else:
                first = len(ids)
            self.labels |= {start + i: ids[i] for i in range(first, len(ids))}
            self._write(ids, words)
            self.is_start = False
        self.text, self.behind_pseudo_token, self._own, self._answer = "", False, 0, None

    def _write(self, ids: Sequence[int], words: Sequence[int | None]) -> None:
        self.tokens += ids
        self.words += words

    def pseudo_tokens(self, count: int) -> None:
        self.flush()
        self._write(range(-1 - self.pseudo, -1 - self.pseudo - count, -1), [None] * count)
        self.pseudo += count
        self.behind_pseudo_token = True
        self.is_start = self.is_start and count == 0

    def mask(self) -> None:
        """The answer is asked for here."""
        self.flush()
        assert self.encoder.mask is not None  # otherwise nothing is read from [Y] on
        self.masks.append(len(self.tokens))
        self._write([self.encoder.mask], [None])
        self.is_start = False

    def answer(self, text: str) -> None:
        """A given answer, which starts a word."""
        if self.text[-1:].isalnum():
            self.text += " "
        start = len(self.text)
        self.text += text.strip()
        self._answer = (start, len(self.text))

    # ------------------------------------------------------------------------------------------------ what was written

    def query(self, asked: bool) -> Query:
        """The query.

        Args:
            asked: for the answer, instead of how likely a given one is.

        Raises:
            UsageError: nothing stands before a given answer, or it has no tokens.
        """
        self.flush()
        mask, tokens = self.encoder.mask, (*self.tokens, *self.encoder.suffix)
        if asked:
            return Query(tokens, tuple(self.masks) if mask is not None else (len(tokens) - 1,), (), mask is not None)
        if mask is not None:
            answer = range(*self._answered)
            labels = tuple(tokens[i] for i in answer)
            return Query(tuple(mask if i in answer else t for i, t in enumerate(tokens)), tuple(answer), labels, True)
        if 0 in self.labels:
            raise UsageError(
                "nothing stands before the answer, and this tokenizer has no beginning-of-text token: put words or "
                "pseudo tokens before [Y]"
            )
        if not self.labels:
            raise UsageError("the answer has no tokens; give one that has letters or digits")
        # The last label is only predicted, and nothing behind it is read.
        targets = tuple(position - 1 for position in self.labels)
        return Query(tokens[: targets[-1] + 1], targets, tuple(self.labels.values()))

    def pseudo_likelihood(self, answer_only: bool) -> tuple[Query, ...]:
        """A query for each token of the text, or of the answer alone: how likely is it, given all others but the later
        ones of its word?

        Raises:
            MegapromptError: the tokenizer does not tell what is a word.
        """
        self.flush()
        if self.encoder.words is None or self.encoder.mask is None:
            raise MegapromptError("this tokenizer does not tell where words are, which pseudo log-likelihoods need")
        positions = range(*self._answered) if answer_only else range(self._first, len(self.tokens))
        queries = []
        for i in positions:
            if self.words[i] is not None:
                tokens = [*self.tokens, *self.encoder.suffix]
                for j in range(i, len(self.words)):
                    if self.words[j] == self.words[i]:
                        tokens[j] = self.encoder.mask
                queries.append(Query(tuple(tokens), (i,), (self.tokens[i],), bidirectional=True))
        return tuple(queries)
