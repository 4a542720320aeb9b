"""How a backbone's tokenizer reads words in mid-sentence, whatever its convention for the space before a word."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megaprompt.errors import MegapromptError

WORD = "a"
"""What stands before words that are encoded as a continuation."""

_DIGIT = "0"
"""What stands before the rest of a word: most tokenizers split digits from letters, so they do not join the two, but
start no new word there."""


class Tokenization:
    """A tokenizer as a backbone uses it; no weights are needed.

    Text that does not start a sequence is encoded behind a word, and the tokens of that word are taken off. That gives
    what the tokenizer writes in mid-sentence: `Paris` for WordPiece, `ĠParis` for byte-level BPE, `▁Paris` for
    SentencePiece and Llama. Text without white space before it goes on with the word: `##vik`, `vik`.

    Args:
        tokenizer: of transformers.
        name: of the backbone, for messages.
        vocabulary_size: tokens that the backbone can answer with; all of the tokenizer's if not given.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    vocabulary_size: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, vocabulary_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary_size = len(tokenizer) if vocabulary_size is None else vocabulary_size

    @property
    def beginning(self) -> int | None:
        """The token that stands for the beginning of a text, whether or not the tokenizer sets it; GPT-2 and others
        have one token for beginning and end."""
        own = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def encode(self, texts: Sequence[str], *, is_start: bool) -> list[list[int]]:
        """Vocabulary ids of each text, without special tokens.

        Text that is not the start is a new word if white space is before it, else the rest of a word.

        Raises:
            MegapromptError: the tokenizer joins a text to the word before it.
        """
        if is_start:
            return self._ids(texts)
        found = []
        for text, ids in zip(texts, self._continued(texts), strict=True):
            if ids is None:
                raise MegapromptError(
                    f"the tokenizer of {self.name} joins {text.strip()!r} to the word before it"
                    + ("" if text[:1].isspace() else "; put a space between them")
                )
            found.append(ids)
        return found

    def words(self, text: str, *, is_start: bool) -> list[int]:
        """The number of the word that each token of a text belongs to; the tokens are those of `encode`.

        What a word is, the tokenizer says, which has to be one of the fast ones.
        """
        before = "" if is_start else f"{WORD} " if text[:1].isspace() else _DIGIT
        [ids] = self.encode([text], is_start=is_start)
        found = self.tokenizer(before + (text if is_start else text.lstrip()), add_special_tokens=False).word_ids()
        return [word or 0 for word in found[len(found) - len(ids) :]]

    def single_tokens(self, words: Sequence[str]) -> list[int | None]:
        """The id of each word in mid-sentence, or None where it is not exactly one known token."""
        unknown = self.tokenizer.unk_token_id
        return [
            ids[0] if ids and len(ids) == 1 and ids[0] != unknown and ids[0] < self.vocabulary_size else None
            for ids in self._continued([f" {word}" for word in words])
        ]

    def text_of(self, token: int) -> str:
        """A token as a word, without the white space that it starts with."""
        return str(self.tokenizer.decode([token])).strip()

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _continued(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Ids of each text behind a word, or at its end; None where the tokenizer joins the two."""
        found = self._behind(WORD, [f" {text.lstrip()}" if text[:1].isspace() else text for text in texts])
        rests = [i for i, text in enumerate(texts) if not text[:1].isspace()]
        for i, ids in zip(rests, self._behind(_DIGIT, [texts[i] for i in rests]), strict=True):
            found[i] = ids or found[i]
        return found

    def _behind(self, word: str, texts: Sequence[str]) -> list[list[int] | None]:
        if not texts:
            return []
        [before] = self._ids([word])
        both = self._ids([word + text for text in texts])
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in both]
