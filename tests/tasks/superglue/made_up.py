"""SuperGLUE's files with made-up examples, short enough for tiny models, and a tokenizer that has the words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
Row = dict[str, Any]


def _boolq(i: int) -> Row:
    animal = ANIMALS[i % 6]
    return {"passage": f"The {animal} is old .", "question": f"is the {animal} old", "label": i % 2 == 0}


def _cb(i: int) -> Row:
    label = ("entailment", "contradiction", "neutral")[i % 3]
    return {"premise": f"A {ANIMALS[i % 6]} ran .", "hypothesis": f"it ran {i % 4} miles .", "label": label}


def _copa(i: int) -> Row:
    about = {"premise": f"The {ANIMALS[i % 6]} ran .", "choice1": "It was old.", "choice2": "A dog came in."}
    return {**about, "question": ("cause", "effect")[i % 2], "label": i // 2 % 2}


def _multirc(i: int) -> Row:
    questions = [
        {
            "idx": 2 * i + q,
            "question": f"Who ran {q} miles ?",
            "answers": [{"idx": 4 * i + 2 * q + a, "text": ANIMALS[(i + a) % 6], "label": (i + a) % 2} for a in (0, 1)],
        }
        for q in (0, 1)
    ]
    return {"passage": {"text": f"The {ANIMALS[i % 6]} ran .", "questions": questions}}


def _rte(i: int) -> Row:
    label = ("entailment", "not_entailment")[i % 2]
    return {"premise": f"A {ANIMALS[i % 6]} ran .", "hypothesis": "it is old .", "label": label}


def _wic(i: int) -> Row:
    animal = ANIMALS[i % 6]
    sentences = {"sentence1": f"A {animal} ran .", "sentence2": f"The {animal} is old ."}
    return {"word": animal, **sentences, "label": i % 2 == 1}


def _wsc(i: int) -> Row:
    animal = ANIMALS[i % 6]
    target = {"span1_text": f"The {animal}", "span1_index": 0, "span2_text": "it", "span2_index": 3}
    return {"text": f"The {animal} ran it was old .", "target": target, "label": i % 3 > 0}


ROWS: dict[str, Callable[[int], Row]] = {
    "BoolQ": _boolq, "CB": _cb, "COPA": _copa, "MultiRC": _multirc, "RTE": _rte, "WiC": _wic, "WSC": _wsc,
}  # fmt: skip


def write_superglue(root: Path, rows: int = 6) -> Path:
    """A directory for --data; the splits have different rows."""
    for name, make in ROWS.items():
        for start, split in enumerate(("train", "dev32", "val")):
            write_rows(root / name / f"{split}.jsonl", [{"idx": i, **make(i + start)} for i in range(rows)])
    return root


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the words of all packaged patterns are one token."""
    words = "Yes No Maybe true false neither True False 2 b"
    texts = [f"a {words} {json.dumps(make(i))} Question: Answer: because so or question" for make in ROWS.values()
             for i in range(6)] * 20  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_model(path: Path) -> Path:
    """A tiny random Llama with this tokenizer in a transformers directory, as a user has it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
