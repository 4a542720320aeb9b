"""Tiny models that have the words of the packaged patterns."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from megaprompt.backbone import Backbone
from megaprompt.tasks.superglue.patterns import read_patterns
from megaprompt.tasks.superglue.reading import read_superglue
from megaprompt.tasks.superglue.tasks import superglue_tasks
from tests.tasks.superglue.made_up import make_tokenizer, write_superglue


@pytest.fixture(scope="session")
def causal() -> Backbone:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=len(tokenizer), n_positions=96, initializer_range=0.2
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    return Backbone(model.double(), tokenizer, name="gpt2")


@pytest.fixture(scope="session")
def masked() -> Backbone:
    plain = make_tokenizer()
    plain.add_special_tokens({"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>"})
    ids = {token: plain.convert_tokens_to_ids(token) for token in ("<cls>", "<sep>")}
    from tokenizers.processors import TemplateProcessing

    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B <sep>", special_tokens=list(ids.items())
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        mask_token="<mask>",
        cls_token="<cls>",
        sep_token="<sep>",
        pad_token="<pad>",
    )
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=len(tokenizer),
        max_position_embeddings=96, initializer_range=0.2,
    )  # fmt: skip
    model = BertForMaskedLM._from_config(config, attn_implementation="sdpa")
    return Backbone(model.double(), tokenizer, name="bert")


@pytest.fixture(params=["causal", "masked"])
def backbone(request) -> Backbone:
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_tasks(tmp_path):
    """The tasks on a backbone, with the packaged patterns."""
    root = write_superglue(tmp_path / "data")
    return lambda backbone: superglue_tasks(read_superglue(root, "few-shot"), read_patterns(None), backbone)
