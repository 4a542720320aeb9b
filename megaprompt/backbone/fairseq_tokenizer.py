"""fairseq's dictionary and GPT-2's byte-level BPE as one tokenizer of transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megaprompt.backbone.megatron import FairseqMegatronTokenizer
from megaprompt.errors import MegapromptError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first entries of every fairseq dictionary; they are not in dict.txt."""
BPE_FILES = ("encoder.json", "vocab.bpe")


def read_dictionary(path: Path) -> list[str]:
    """The symbols of a fairseq dictionary in the order of their ids, special ones included.

    Raises:
        MegapromptError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MegapromptError(f"{path}: cannot be read ({error})") from error
    symbols = list(SPECIALS)
    for number, line in enumerate(lines, 1):
        fields = line.rstrip().removesuffix(" #fairseq:overwrite").rsplit(" ", 1)
        if len(fields) != 2 or not fields[1].isdecimal():
            raise MegapromptError(f"{path}:{number}: expected a symbol and a count; fetch the file again")
        symbols.append(fields[0])
    return symbols


def make_tokenizer(symbols: list[str], directory: Path, max_length: int) -> FairseqMegatronTokenizer:
    """GPT-2's byte-level BPE, with the ids of a fairseq dictionary, whose symbols are GPT-2's ids as text.

    Nothing is put before a text: P-tuning's templates do not either (fairseq's own scoring begins with `</s>`).
    """
    try:
        encoder = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
        lines = (directory / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, ValueError) as error:
        raise MegapromptError(
            f"{directory}: cannot read {' and '.join(BPE_FILES)} ({error}); fetch them again"
        ) from error
    id_of = {symbol: number for number, symbol in enumerate(symbols)}
    vocabulary = {symbol: number for number, symbol in enumerate(SPECIALS)}
    lacking = itertools.count(len(symbols))
    vocabulary |= {token: id_of.get(str(number)) or next(lacking) for token, number in encoder.items()}
    pairs = (line.split(" ") for line in lines if line.strip())
    merges = [(first, second) for first, second in pairs]
    fast = Tokenizer(models.BPE(vocabulary, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    # fairseq encodes the text "<s>" like any other.
    return FairseqMegatronTokenizer(
        tokenizer_object=fast,
        dictionary_size=len(symbols),
        split_special_tokens=True,
        model_max_length=max_length,
        **names,
    )
