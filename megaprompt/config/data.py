"""What the commands that fetch, convert and count can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from megaprompt.config.options import Flag, Names, Whole, above_zero
from megaprompt.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Download published facts or examples into a directory for --data. Called again, it goes on where it stopped."""

    source: Literal["lama", "autoprompt-trex", "p-tuning-lama", "superglue", "fewglue", "bear"] = field(kw_only=False)
    """lama (LAMA's test facts), autoprompt-trex (AutoPrompt's train, dev and test), p-tuning-lama (the same with the
    vocabularies of the P-tuning paper), superglue (train and val of seven tasks), fewglue (32 examples of each to learn
    from and 32 to choose on), or bear (BEAR and BEAR-big)."""
    out: Path | None = None
    """Directory to write; data/SOURCE if not given. It must not exist."""
    url: str | None = None
    """Another address of the archive, such as a mirror. Of superglue: of the directory with BoolQ.zip and others."""
    hub: str | None = None
    """Take LAMA from the model hub instead, with the package datasets: facebook/lama, or one with the same columns."""

    def __post_init__(self) -> None:
        if self.hub is not None and (self.source != "lama" or self.url is not None):
            raise UsageError("--hub: only lama is on the model hub, which needs no --url")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Write the words that are one token for every one of several models: a file for --vocab."""

    backbones: Names
    """Names as for `megaprompt probe`, separated by commas. Only their tokenizers are loaded."""
    out: Path
    """A file to write, one word a line."""
    words: Path | None = None
    """Choose only among these words, one a line, such as LAMA's common vocabulary."""

    def __post_init__(self) -> None:
        if not self.backbones:
            raise UsageError("--backbones: name at least one")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """Count the facts whose object is one token of a model and in a vocabulary, by relation and split."""

    data: str = "world"
    """world (packaged), or a directory in the LAMA layout."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, 'none' for all tokens, or 'auto': the data's own file if it has
    one, else the words that are objects anywhere in it."""
    backbone: str = "smollm2-135m"
    """As for `megaprompt probe`. Only its tokenizer is loaded."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a fairseq checkpoint, such as Megatron 11B, into a directory for --backbone, or back."""

    source: Path = field(kw_only=False)
    """The directory with the checkpoint's parts (model-model_part-N.pt, or model.pt), dict.txt, encoder.json and
    vocab.bpe."""
    out: Path = field(kw_only=False)
    """A directory to write. It must not exist."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Precision of the converted weights; that of the checkpoint if not given."""
    no_tokenizer: Flag = False
    """Convert the weights only, without encoder.json and vocab.bpe."""
    to_fairseq: Flag = False
    """The other way: SOURCE is a converted directory."""
    parts: Whole = 1
    """With --to-fairseq: into how many model-parallel parts."""

    def __post_init__(self) -> None:
        above_zero(self, "parts")
