"""Vocabularies of answers: words that are one token in every one of several models, and the facts that they leave.

The models of the paper's Table 2 have different vocabularies, so that a score of one says little beside a score of
another. LAMA-34k, the whole of LAMA's T-REx facts, has objects that are one token for BERT; LAMA-29k is what remains
when they are also one token for the other models (section 4.1 of https://arxiv.org/abs/2103.10385).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from megaprompt.backbone.tokenization import Tokenization
from megaprompt.errors import UsageError
from megaprompt.tasks.lama.facts import SPLITS, Data, Split
from megaprompt.tasks.lama.questions import NOT_IN_VOCABULARY, NOT_ONE_TOKEN, load_vocabulary, usable_facts

LAMA_RELATIONS, LAMA_FACTS = 41, 34_039
"""What LAMA's T-REx part has; the first also counts relations of AutoPrompt's data, whose test facts are the same."""


def common_words(tokenizers: Sequence[Tokenization], candidates: Sequence[str] | None = None) -> list[str]:
    """The words that are one token in mid-sentence for every tokenizer, sorted.

    Args:
        tokenizers: of the models that are compared.
        candidates: words to choose from; if None, every token of every tokenizer that has a letter or digit.

    Raises:
        UsageError: there is none.
    """
    if candidates is None:
        words = {word for tokenizer in tokenizers for word in _words_of(tokenizer)}
    else:
        words = set(candidates)
    for tokenizer in tokenizers:
        special = set(tokenizer.tokenizer.all_special_ids)
        listed = sorted(words)
        found = zip(listed, tokenizer.single_tokens(listed), strict=True)
        words = {word for word, token in found if token is not None and token not in special}
    if not words:
        raise UsageError("no word is one token for all of the backbones; give fewer --backbones, or other --words")
    return sorted(words)


def _words_of(tokenizer: Tokenization) -> set[str]:
    """Its tokens as words, as far as they may be some; whether they really are, `single_tokens` tells."""
    special = set(tokenizer.tokenizer.all_special_ids)
    words = (tokenizer.text_of(token) for token in range(tokenizer.vocabulary_size) if token not in special)
    # A replacement character is a part of a letter; white space would not survive one word a line.
    return {
        word
        for word in words
        if any(map(str.isalnum, word)) and "\ufffd" not in word and not any(map(str.isspace, word))
    }


# ------------------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class Count:
    """How many facts of a relation remain, by split, and why others do not."""

    label: str
    facts: dict[Split, int]
    remaining: dict[Split, int]
    left_out: dict[str, int]


def count_facts(data: Data, vocabulary: str, tokenizer: Tokenization) -> dict[str, Count]:
    """Of each relation, the facts that can be scored.

    Args:
        data: any facts.
        vocabulary: as the option --vocab: a file, `none`, or `auto`.
        tokenizer: of the model.

    Raises:
        UsageError: the vocabulary cannot be read, or none of its words is one token.
    """
    allowed = load_vocabulary(vocabulary, data, tokenizer)
    counts = {}
    for name, relation in data.relations.items():
        usable, left_out = usable_facts(relation, tokenizer, allowed)
        counts[name] = Count(
            relation.label,
            {split: len(relation.facts[split]) for split in SPLITS},
            {split: len(usable[split]) for split in SPLITS},
            left_out,
        )
    return counts


def count_table(counts: dict[str, Count], title: str) -> Table:
    """For the terminal: per relation, what remains of the facts of each split."""
    table = Table(title=Text(title))
    for column in ("relation", "label", *SPLITS, NOT_ONE_TOKEN, NOT_IN_VOCABULARY):
        table.add_column(column, justify="left" if column in ("relation", "label") else "right")
    for name, count in counts.items():
        splits = [f"{count.remaining[split]} of {count.facts[split]}" for split in SPLITS]
        table.add_row(name, Text(count.label), *splits, *(str(count.left_out[why]) for why in _REASONS))
    table.add_section()
    total = [f"{_sum(counts, split)} of {sum(c.facts[split] for c in counts.values())}" for split in SPLITS]
    reasons = [str(sum(count.left_out[why] for count in counts.values())) for why in _REASONS]
    table.add_row(f"{len(counts)} relations", "", *total, *reasons)
    return table


def beside_lama(counts: dict[str, Count]) -> str | None:
    """The test facts beside LAMA's published totals; None if these are not the 41 relations of LAMA's T-REx part."""
    if len(counts) != LAMA_RELATIONS:
        return None
    facts, remaining = sum(count.facts["test"] for count in counts.values()), _sum(counts, "test")
    same = "as" if facts == LAMA_FACTS else f"{facts - LAMA_FACTS:+} compared with the {LAMA_FACTS}"
    return (
        f"{facts} test facts, {same} published for LAMA-34k; {remaining} remain (LAMA-29k, for the vocabularies of "
        "BERT and GPT together, has about 29000)"
    )


_REASONS = (NOT_ONE_TOKEN, NOT_IN_VOCABULARY)


def _sum(counts: dict[str, Count], split: Split) -> int:
    return sum(count.remaining[split] for count in counts.values())
