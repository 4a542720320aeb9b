"""Templates: how a fact becomes a query (P-tuning, arXiv 2103.10385, section 3.1).

    "<3>[X]<3>[Y]"                         three pseudo tokens, the subject, three pseudo tokens, the object
    "<2> capital [X] <2>[Y]"               literal anchor words may stand anywhere (section 3.2)
    "The capital of [X] is [Y] ."          no pseudo tokens at all: a manual prompt
    "<3>[X]<3>[Y]<3>"                      for bidirectional models, which also read what follows the object

`Template.parse` reads the notation, `Template.render` turns a subject into the token sequence of a query. A pseudo
token is not a token of any vocabulary; its vector is learned. In a sequence the k-th pseudo token of a template is the
negative number -1-k, so that one tuple of integers describes a query completely.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megaprompt.errors import UsageError

SUBJECT, OBJECT = "[X]", "[Y]"
DEFAULT_CAUSAL, DEFAULT_MASKED = "<3>[X]<3>[Y]", "<3>[X]<3>[Y]<3>"


def default_template(causal: bool) -> str:
    """The paper's template for a kind of model."""
    return DEFAULT_CAUSAL if causal else DEFAULT_MASKED


Piece = str | int
"""One piece of a template: the length of a run of pseudo tokens, `SUBJECT`, `OBJECT`, or literal text."""


class Query(NamedTuple):
    """The token sequence of one query. `tokens[target]` is where the model's output predicts the object."""

    tokens: tuple[int, ...]
    target: int
    bidirectional: bool = False  # every token sees all others, not only those before it


class TextEncoder(NamedTuple):
    """How one backbone reads text; made by `megaprompt.backbone`.

    `encode(text, is_start)` gives vocabulary ids without special tokens. Text that is not the start follows a word, as
    a new one if it starts with white space, else as a part of it ("'s").
    `prefix` is what stands before every text (a beginning-of-text token, or nothing). A bidirectional model has a
    `mask` token, which stands for the object, and a `suffix` after every text.
    """

    encode: Callable[[str, bool], list[int]]
    prefix: tuple[int, ...] = ()
    mask: int | None = None
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Template:
    """A parsed template; `text` is the notation that it was parsed from."""

    text: str
    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read the notation.

        Raises:
            UsageError: [X] or [Y] does not occur exactly once.
        """
        for placeholder in (SUBJECT, OBJECT):
            if (count := text.count(placeholder)) != 1:
                raise UsageError(
                    f"template {text!r} has {count} {placeholder}; it needs exactly one [X] (the subject) "
                    f'and one [Y] (the object), as in "{DEFAULT_CAUSAL}"'
                )
        parts = re.split(r"(<\d+>|\[X\]|\[Y\])", text)
        return cls(text, tuple(int(p[1:-1]) if re.fullmatch(r"<\d+>", p) else p for p in parts if p))

    @property
    def num_pseudo_tokens(self) -> int:
        """How many vectors a prompt for this template has."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))

    def softened(self, encoder: TextEncoder) -> tuple[Template, list[int]]:
        """A manual prompt with a pseudo token for each of its tokens, and the ids of these tokens.

        With their embeddings as vectors it asks what the manual prompt asks (OptiPrompt, arXiv 2104.05240, section 3).
        """
        text, tokens, is_start = "", [], True
        for piece in self.pieces:
            if isinstance(piece, int):
                raise UsageError(f"template {self.text!r} has pseudo tokens; a manual prompt has none")
            if piece in (SUBJECT, OBJECT):
                text += str(piece)
            elif piece.strip():
                ids = encoder.encode(piece.strip() if is_start else piece.rstrip(), is_start)
                text += f"<{len(ids)}>"
                tokens += ids
            is_start = is_start and not piece.strip()
            if piece == OBJECT and encoder.mask is None:  # a causal backbone reads no further
                break
        return Template.parse(text), tokens

    def render(self, subject: str, encoder: TextEncoder) -> Query:
        """The query of one subject.

        For a causal backbone that is everything before [Y], which is predicted from the last token; for a bidirectional
        one all of the template, with the mask token for [Y], which is predicted there.

        Words are separated by the backbone's own convention: text that follows a pseudo token starts a new word, and
        white space before a pseudo token or the object is dropped, since the space belongs to the next word's token.
        Text that touches [X] or follows [Y] without a space is a part of that word. The object itself is always a word.

        Raises:
            UsageError: [X] stands after [Y], where a causal model cannot see it, or nothing stands before [Y].
        """
        pieces = self.pieces if encoder.mask is not None else self.pieces[: self.pieces.index(OBJECT)]
        if SUBJECT not in pieces:
            raise UsageError(
                f"template {self.text!r} has [X] after [Y]; a causal backbone reads only what stands before the object"
            )
        tokens, pseudo, text, target = list(encoder.prefix), 0, "", 0
        is_start, behind_pseudo = True, False
        for piece in (*pieces, 0):  # the 0 flushes the last text
            if not isinstance(piece, int) and piece != OBJECT:
                text += subject if piece == SUBJECT else piece
                continue
            if words := text.strip():
                new_word = behind_pseudo or text[0].isspace()
                tokens += encoder.encode(f" {words}" if new_word and not is_start else words, is_start)
                is_start = False
            text, behind_pseudo = "", isinstance(piece, int)
            if isinstance(piece, int):
                tokens += range(-1 - pseudo, -1 - pseudo - piece, -1)
                pseudo += piece
                is_start = is_start and piece == 0
            else:
                assert encoder.mask is not None  # otherwise nothing is read from [Y] on
                target = len(tokens)
                tokens.append(encoder.mask)
                is_start = False
        if encoder.mask is None:
            return Query(tuple(tokens), len(tokens) - 1)
        return Query((*tokens, *encoder.suffix), target, bidirectional=True)
