"""Backbones: the frozen language models. Whatever differs between them is in this package and nowhere else."""

from megaprompt.backbone.language_model import Backbone
from megaprompt.backbone.load import dtype_of, inspect_backbone, is_causal, load_backbone, load_tokenizer, read_config
from megaprompt.backbone.tokenization import Tokenization

__all__ = [
    "Backbone",
    "Tokenization",
    "dtype_of",
    "inspect_backbone",
    "is_causal",
    "load_backbone",
    "load_tokenizer",
    "read_config",
]
