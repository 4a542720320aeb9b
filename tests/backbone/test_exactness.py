"""Which models may be packed: the check tells those that compute packed queries exactly from those that nearly do."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
)

from megaprompt.backbone.exactness import exact_size
from megaprompt.backbone.packed import PackedModel
from megaprompt.prompting.packing import PassSize

WORDS = 600
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
LOCAL = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "attention_types": [[["global", "local"], 1]]}
MPT = {"n_layers": 2, "n_heads": 4, "d_model": 32, "max_seq_len": 512}
EXACT = {
    "gpt2": GPT2Config(n_layer=2, n_head=4, n_embd=32, initializer_range=0.2, vocab_size=WORDS, **NO_SPECIAL),
    "llama": LlamaConfig(**HEADS, initializer_range=0.2, vocab_size=WORDS, **NO_SPECIAL),
    "deep llama": LlamaConfig(
        **HEADS | {"num_hidden_layers": 12}, initializer_range=0.2, vocab_size=WORDS, **NO_SPECIAL
    ),
    "bert": BertConfig(**HEADS, initializer_range=0.2, vocab_size=WORDS),
    # A query sees no further than the window, since the row is not wider; with a trunk in front of it, it is.
    "gpt-neo, wide window": GPTNeoConfig(**LOCAL, window_size=256, vocab_size=WORDS, **NO_SPECIAL),
}
INEXACT = {  # the weaker their weights, the less attention matters, and the harder they are to tell
    "mpt": MptConfig(**MPT, vocab_size=WORDS, **NO_SPECIAL),
    "mpt, strong": MptConfig(**MPT, initializer_range=0.2, vocab_size=WORDS, **NO_SPECIAL),
    "gpt-neo": GPTNeoConfig(**LOCAL, window_size=128, vocab_size=WORDS, **NO_SPECIAL),
    "gpt-neo, strong": GPTNeoConfig(**LOCAL, window_size=128, initializer_range=0.2, vocab_size=WORDS, **NO_SPECIAL),
}


def size_for(config, dtype: torch.dtype, row_tokens: int | None = 256) -> PassSize:
    torch.manual_seed(0)
    kind, mask = (AutoModelForMaskedLM, 4) if config.model_type == "bert" else (AutoModelForCausalLM, None)
    model = PackedModel(kind.from_config(config, dtype=dtype))
    return exact_size(model, PassSize(row_tokens, 512), config.model_type, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_exact_models_are_packed(name, dtype):
    assert size_for(EXACT[name], dtype) == PassSize(256, 512, trunks=name != "gpt-neo, wide window")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INEXACT)
def test_inexact_models_get_rows_of_one_query(name, dtype, caplog):
    assert size_for(INEXACT[name], dtype) == PassSize(None, 512)
    assert "does not compute packed queries exactly (relative error" in caplog.text


def test_what_matters_is_the_width_of_the_row():
    """GPT-Neo is exact as long as rows are not wider than its window."""
    assert size_for(INEXACT["gpt-neo"], torch.float32, 128).row_tokens == 128
    assert size_for(EXACT["gpt-neo, wide window"], torch.float32, 512).row_tokens is None
