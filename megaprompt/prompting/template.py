"""Templates: how an example becomes a query (P-tuning, arXiv 2103.10385, section 3.1).

    "<3>[X]<3>[Y]"                         three pseudo tokens, the subject, three pseudo tokens, the answer
    "<2> capital [X] <2>[Y]"               literal anchor words may stand anywhere (section 3.2)
    "The capital of [X] is [Y] ."          no pseudo tokens at all: a manual prompt
    "<3>[X]<3>[Y]<3>"                      for bidirectional models, which also read what follows the answer
    "[premise...] <1> [hypothesis] ? [Y]"  fields have the names that the task gives them; `...` may be cut to fit

`Template.parse` reads the notation, `Template.render` turns the fields of an example into the tokens of a query. A
pseudo token is not a token of any vocabulary; its vector is learned. In a sequence the k-th pseudo token of a template
is the negative number -1-k, so that one tuple of integers describes a query completely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megaprompt.errors import UsageError

FACT = ("X",)
"""The fields of a fact: its subject."""

ANSWER = "Y"


class Place(NamedTuple):
    """Where a field or the answer stands in a template."""

    name: str
    may_be_cut: bool = False

    def __str__(self) -> str:
        return f"[{self.name}{'...' * self.may_be_cut}]"


Piece = int | str | Place
"""One piece of a template: the length of a run of pseudo tokens, literal text, or a place."""


class Query(NamedTuple):
    """The tokens of one query. At `tokens[target]`, for each of the targets, the model's output is read: there it
    predicts the answer, or, where the answer is a text that is given, the token in `labels` that belongs to the target.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    labels: tuple[int, ...] = ()
    bidirectional: bool = False  # every token sees all others, not only those before it
    cuts: tuple[int, ...] = ()  # where its trunks end, ascending; tokens before are computed in advance (see `trunks`)


class TextEncoder(NamedTuple):
    """How one backbone reads text; made by `megaprompt.backbone`.

    `encode(text, is_start)` gives vocabulary ids without special tokens. Text that is not the start follows a word, as
    a new one if it starts with white space, else as a part of it ("'s").
    `prefix` is what stands before every text (a beginning-of-text token, or nothing). A bidirectional model has a
    `mask` token, which stands for the answer, and a `suffix` after every text.
    """

    encode: Callable[[str, bool], list[int]]
    prefix: tuple[int, ...] = ()
    mask: int | None = None
    suffix: tuple[int, ...] = ()


def default_template(causal: bool, places: Sequence[str] = ("[X]",)) -> str:
    """The paper's template for a kind of model: three pseudo tokens around every field, and before the answer."""
    return "<3>" + "".join(f"{place}<3>" for place in places) + ("[Y]" if causal else "[Y]<3>")


@dataclass(frozen=True)
class Template:
    """A parsed template; `text` is the notation that it was parsed from."""

    text: str
    pieces: tuple[Piece, ...]
    fields: tuple[str, ...] = FACT

    @classmethod
    def parse(cls, text: str, fields: Sequence[str] = FACT) -> Template:
        """Read the notation. Brackets around anything but [Y] and the names of fields are literal text.

        Args:
            fields: their names. A fact has one, X.

        Raises:
            UsageError: [Y] does not occur exactly once, a field more than once, or no field at all.
        """
        names = "|".join(map(re.escape, (*fields, ANSWER)))
        parts = re.split(rf"(<\d+>|\[(?:{names})(?:\.\.\.)?\])", text)
        pieces = tuple(_piece(part, (*fields, ANSWER)) for part in parts if part)
        counts = {name: sum(isinstance(p, Place) and p.name == name for p in pieces) for name in (*fields, ANSWER)}
        wrong = next((name for name, count in counts.items() if count > 1 or (count == 0 and name == ANSWER)), None)
        if wrong is None and not any(counts[name] for name in fields):
            wrong = fields[0]
        if wrong is not None:
            places = [f"[{name}]" for name in fields]
            others = "[X] (the subject)" if fields == FACT else f"each of {', '.join(places)}"
            raise UsageError(
                f"template {text!r} has {counts[wrong]} [{wrong}]; it needs exactly one {others} and one [Y] (the "
                f'answer), as in "{default_template(True, places)}"'
            )
        return cls(text, pieces, tuple(fields))

    @property
    def num_pseudo_tokens(self) -> int:
        """How many vectors a prompt for this template has."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))

    def with_pseudo_tokens(self, encoder: TextEncoder) -> tuple[Template, list[int]]:
        """A manual prompt with a pseudo token for each of its tokens, and the ids of these tokens.

        With their embeddings as vectors it asks what the manual prompt asks (OptiPrompt, arXiv 2104.05240, section 3).

        Raises:
            UsageError: there are pseudo tokens already.
        """
        text, tokens, is_start = "", [], True
        for piece in self.pieces:
            if isinstance(piece, int):
                raise UsageError(f"template {self.text!r} has pseudo tokens; a manual prompt has none")
            if isinstance(piece, Place):
                text += str(piece)
                is_start = False
                if piece.name == ANSWER and encoder.mask is None:  # a causal backbone reads no further
                    break
            elif piece.strip():
                ids = encoder.encode(piece.strip() if is_start else piece.rstrip(), is_start)
                text += f"<{len(ids)}>"
                tokens += ids
                is_start = False
        return Template.parse(text, self.fields), tokens

    def with_anchors(self) -> Template:
        """A manual prompt with pseudo tokens between: one before it and on both sides of every field, two before [Y].

        The words stay as anchors (paper, section 3.2).
        """
        text = "<1>"
        for piece in self.pieces:
            if isinstance(piece, Place):
                text += f"<2>{piece}" if piece.name == ANSWER else f"<1>{piece}<1>"
            else:
                text += str(piece)
        return Template.parse(text, self.fields)

    def fill(self, fields: Mapping[str, str], answer: str) -> str:
        """The text of a manual prompt with everything in its place, as it stands in a demonstration."""
        parts = []
        for piece in self.pieces:
            assert not isinstance(piece, int), "a demonstration is text"
            parts.append(piece if isinstance(piece, str) else {**fields, ANSWER: answer}[piece.name])
        return "".join(parts).strip()

    def render(
        self,
        fields: Mapping[str, str],
        encoder: TextEncoder,
        *,
        answer: str | None = None,
        before: str = "",
        max_tokens: int | None = None,
    ) -> Query:
        """The query of one example.

        Without an answer, it is asked for: a causal backbone reads everything before [Y] and answers at the last token;
        a bidirectional one reads all of the template and answers at the mask token that stands for [Y].
        With an answer, the query tells how likely it is. A causal backbone reads all of the template; targets are where
        it predicts the answer's tokens and the words behind them. A bidirectional one has a mask token for each token
        of the answer, which are the targets.

        Words are separated by the backbone's own convention: text that follows a pseudo token starts a new word, and
        spaces before a pseudo token or the answer are dropped, since they belong to the next word's token. Text
        that touches a field or follows [Y] without a space is a part of that word. The answer itself is always a word.

        Args:
            fields: the example's text for every field.
            answer: a text to put in the place of the answer.
            before: text in front of it all, such as demonstrations.
            max_tokens: cut the fields that may be cut, the last ones first, by words from their end, to fit.

        Raises:
            UsageError: a field stands after [Y], where a causal model cannot see it, nothing stands before the answer,
                or the query cannot be made to fit.
        """
        query = self._rendered(fields, encoder, answer, before)
        if max_tokens is None or len(query.tokens) <= max_tokens:
            return query
        places = [piece.name for piece in self.pieces if isinstance(piece, Place) and piece.may_be_cut]
        shorter = dict(fields)
        for name in reversed(places):
            words = fields[name].split()
            low, high = 0, len(words)  # the most words that fit are in [low, high), if any
            while low < high:
                middle = (low + high) // 2
                shorter[name] = " ".join(words[:middle])
                query = self._rendered(shorter, encoder, answer, before)
                low, high = (middle + 1, high) if len(query.tokens) <= max_tokens else (low, middle)
            shorter[name] = " ".join(words[: max(0, low - 1)])
            if low:
                return self._rendered(shorter, encoder, answer, before)
        raise UsageError(
            f"template {self.text!r}: {len(query.tokens)} tokens are left where {max_tokens} fit"
            + ("" if places else "; mark fields that may be cut, as [name...]")
        )

    def _rendered(self, fields: Mapping[str, str], encoder: TextEncoder, answer: str | None, before: str) -> Query:
        at = next(i for i, piece in enumerate(self.pieces) if isinstance(piece, Place) and piece.name == ANSWER)
        unread = self.pieces[at:] if encoder.mask is None and answer is None else ()
        if late := [str(piece) for piece in unread[1:] if isinstance(piece, Place)]:
            raise UsageError(
                f"template {self.text!r} has {late[0]} after [Y]; a causal backbone reads only what stands before the "
                f"answer"
            )
        writer = _Writer(encoder, before)
        for piece in self.pieces[: len(self.pieces) - len(unread)]:
            if isinstance(piece, int):
                writer.pseudo_tokens(piece)
            elif isinstance(piece, str):
                writer.text += piece
            elif piece.name != ANSWER:
                writer.text += fields[piece.name]
            elif answer is None:
                writer.mask(1)
            else:
                writer.answer(answer)
        return writer.query(answer)


def _piece(part: str, names: Sequence[str]) -> Piece:
    if re.fullmatch(r"<\d+>", part):
        return int(part[1:-1])
    if part[0] == "[" and part[-1] == "]" and part[1:-1].removesuffix("...") in names:
        return Place(part[1:-1].removesuffix("..."), part.endswith("...]"))
    return part


@dataclass
class _Writer:
    """The tokens of a query while they are written, piece by piece."""

    encoder: TextEncoder
    text: str = ""  # not encoded yet
    tokens: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)  # positions of the answer, and of words behind it
    labels: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)  # their positions
    pseudo: int = 0
    is_start: bool = True
    behind_pseudo_token: bool = False

    def __post_init__(self) -> None:
        self.tokens += self.encoder.prefix

    def flush(self) -> None:
        """Encode the text so far. A line's end is kept, spaces before the next word are not."""
        if self.text.strip():
            new_word = (self.behind_pseudo_token or self.text[0].isspace()) and not self.is_start
            words = self.text.strip(" \t")
            self._write(self.encoder.encode(f" {words}" if new_word else words, self.is_start))
            self.is_start = False
        self.text, self.behind_pseudo_token = "", False

    def _write(self, ids: Sequence[int]) -> None:
        if self.labelled and not self.masks:  # behind the answer of a causal backbone
            self.labelled += range(len(self.tokens), len(self.tokens) + len(ids))
            self.labels += ids
        self.tokens += ids

    def pseudo_tokens(self, count: int) -> None:
        self.flush()
        self.tokens += range(-1 - self.pseudo, -1 - self.pseudo - count, -1)
        self.pseudo += count
        self.behind_pseudo_token = True
        self.is_start = self.is_start and count == 0

    def mask(self, count: int) -> None:
        self.flush()
        assert self.encoder.mask is not None  # otherwise nothing is read from [Y] on
        self.masks += range(len(self.tokens), len(self.tokens) + count)
        self.tokens += [self.encoder.mask] * count
        self.is_start = False

    def answer(self, text: str) -> None:
        """A given answer."""
        self.flush()
        ids = self.encoder.encode(text.strip() if self.is_start else f" {text.strip()}", self.is_start)
        self.labels += ids
        if self.encoder.mask is not None:
            self.mask(len(ids))
            return
        self.labelled += range(len(self.tokens), len(self.tokens) + len(ids))
        self.tokens += ids
        self.is_start = False

    def query(self, answer: str | None) -> Query:
        self.flush()
        tokens = (*self.tokens, *self.encoder.suffix)
        if self.encoder.mask is not None:
            return Query(tokens, tuple(self.masks), tuple(self.labels), bidirectional=True)
        if answer is None:
            return Query(tokens, (len(tokens) - 1,))
        if self.labelled[:1] == [0]:
            raise UsageError(
                "nothing stands before the answer, and this tokenizer has no beginning-of-text token: put words or "
                "pseudo tokens before [Y]"
            )
        return Query(tokens, tuple(position - 1 for position in self.labelled), tuple(self.labels))
