"""Templates: how an example becomes a query (P-tuning, arXiv 2103.10385, section 3.1).

    "<3>[X]<3>[Y]"                         three pseudo tokens, the subject, three pseudo tokens, the answer
    "<2> capital [X] <2>[Y]"               literal anchor words may stand anywhere (section 3.2)
    "The capital of [X] is [Y] ."          no pseudo tokens at all: a manual prompt
    "<3>[X]<3>[Y]<3>"                      for bidirectional models, which also read what follows the answer
    "[premise...] <1> [hypothesis~] ? [Y]" fields of other tasks; `...` may be cut to fit, `~` loses final punctuation

`Template.parse` reads the notation, `Template.render` turns the fields of an example into the tokens of a query. A
pseudo token is not a token of any vocabulary; its vector is learned. In a sequence the k-th pseudo token of a template
is the negative number -1-k, so that one tuple of integers describes a query completely.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaprompt.errors import UsageError
from megaprompt.prompting.query import Query, QueryWriter, TextEncoder

FACT = ("X",)
"""The fields of a fact: its subject."""

ANSWER = "Y"


class Place(NamedTuple):
    """Where a field or the answer stands in a template."""

    name: str
    may_be_cut: bool = False
    stripped: bool = False  # of the punctuation at its end

    def __str__(self) -> str:
        return f"[{self.name}{'~' * self.stripped}{'...' * self.may_be_cut}]"

    def of(self, fields: Mapping[str, str]) -> str:
        """The text that stands here."""
        return fields[self.name].rstrip(string.punctuation if self.stripped else "")


Piece = int | str | Place
"""One piece of a template: the length of a run of pseudo tokens, literal text, or a place."""


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
        parts = re.split(rf"(<\d+>|\[(?:{names})~?(?:\.\.\.)?\])", text)
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

    def with_pseudo_tokens(self, encoder: TextEncoder, given_answer: bool = False) -> tuple[Template, list[int]]:
        """A manual prompt with a pseudo token for each of its tokens, and the ids of these tokens.

        With their embeddings as vectors it asks what the manual prompt asks (OptiPrompt, arXiv 2104.05240, section 3).

        Args:
            encoder: of the backbone.
            given_answer: answers will be given; then a causal backbone also predicts the text behind the last place,
                which stays as it is.

        Raises:
            UsageError: there are pseudo tokens already.
        """
        text, is_start = "", True
        tokens: list[int] = []
        for i, piece in enumerate(self.pieces):
            if isinstance(piece, int):
                raise UsageError(f"template {self.text!r} has pseudo tokens; a manual prompt has none")
            if isinstance(piece, Place):
                text += str(piece)
                is_start = False
                if piece.name == ANSWER and encoder.mask is None and not given_answer:  # no more is read
                    break
            elif given_answer and encoder.mask is None and i == len(self.pieces) - 1:
                text += piece
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
            parts.append(piece if isinstance(piece, str) else piece.of({**fields, ANSWER: answer}))
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

        def rendered(fields: Mapping[str, str]) -> Query:
            return _written(self, fields, encoder, answer, before).query(asked=answer is None)

        query = rendered(fields)
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
                query = rendered(shorter)
                low, high = (middle + 1, high) if len(query.tokens) <= max_tokens else (low, middle)
            shorter[name] = " ".join(words[: max(0, low - 1)])
            if low:
                return rendered(shorter)
        raise UsageError(
            f"template {self.text!r}: {len(query.tokens)} tokens are left where {max_tokens} fit"
            + ("" if places else "; mark fields that may be cut, as [name...]")
        )


def pseudo_likelihood(
    template: Template,
    fields: Mapping[str, str],
    encoder: TextEncoder,
    answer: str,
    *,
    before: str = "",
    answer_only: bool = False,
) -> tuple[Query, ...]:
    """The queries that tell a bidirectional model's pseudo log-likelihood of a text with a given answer: one for
    each token, which is masked together with the later tokens of its word (Kauf and Ivanova, arXiv 2305.10588).

    The tokens of what stands `before` are not asked for; with `answer_only`, only those of the answer are.

    Raises:
        MegapromptError: the tokenizer does not tell what is a word.
    """
    return _written(template, fields, encoder, answer, before).pseudo_likelihood(answer_only)


def _written(
    template: Template, fields: Mapping[str, str], encoder: TextEncoder, answer: str | None, before: str
) -> QueryWriter:
    at = next(i for i, piece in enumerate(template.pieces) if isinstance(piece, Place) and piece.name == ANSWER)
    unread = template.pieces[at:] if encoder.mask is None and answer is None else ()
    if late := [str(piece) for piece in unread[1:] if isinstance(piece, Place)]:
        raise UsageError(
            f"template {template.text!r} has {late[0]} after [Y]; a causal backbone reads only what stands before the "
            f"answer"
        )
    writer = QueryWriter(encoder, before)
    for piece in template.pieces[: len(template.pieces) - len(unread)]:
        if isinstance(piece, int):
            writer.pseudo_tokens(piece)
        elif isinstance(piece, str):
            writer.text += piece
        elif piece.name != ANSWER:
            writer.text += piece.of(fields)
        elif answer is None:
            writer.mask()
        else:
            writer.answer(answer)
    return writer


def _piece(part: str, names: Sequence[str]) -> Piece:
    if re.fullmatch(r"<\d+>", part):
        return int(part[1:-1])
    name = part[1:-1].removesuffix("...").removesuffix("~")
    if part[0] == "[" and part[-1] == "]" and name in names:
        return Place(name, part.endswith("...]"), "~" in part.removeprefix(f"[{name}"))
    return part
