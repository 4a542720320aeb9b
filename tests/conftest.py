"""Small real models and data, made on the spot: random GPT-2 and Llama backbones with a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cpu":  # `make test-gpu` says cuda
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; and threads of processes side by side wait for each other

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megaprompt.backbone import Backbone
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.task import Instance

PAIRS = {
    "P36": [
        ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Japan", "Tokyo"),
        ("Egypt", "Cairo"), ("Peru", "Lima"), ("Cuba", "Havana"), ("Austria", "Vienna"), ("Greece", "Athens"),
        ("South Korea", "Seoul"), ("South Sudan", "Juba"), ("North Macedonia", "Skopje"),
    ],
    "P30": [
        ("France", "Europe"), ("Italy", "Europe"), ("Spain", "Europe"), ("Japan", "Asia"), ("Egypt", "Africa"),
        ("South Korea", "Asia"), ("South Sudan", "Africa"), ("Norway", "Europe"), ("Greece", "Europe"),
    ],
}  # fmt: skip
TEMPLATES = {"P36": "The capital of [X] is [Y] .", "P30": "[X] is in [Y] ."}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    text = [f"a {s} {o} The capital of is in" for pairs in PAIRS.values() for s, o in pairs] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(kind: str, vocabulary: int, seed: int = 0):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            n_layer=2, n_head=4, n_embd=32, vocab_size=vocabulary, n_positions=64, initializer_range=0.2
        )
        return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=vocabulary, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


@pytest.fixture
def make_backbone(tokenizer):
    """A fresh small backbone in double precision: `make_backbone("gpt2")`."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> Backbone:
        model = make_model(kind, len(tokenizer), seed)
        return Backbone(model.to(dtype), tokenizer, name=kind)

    return make


def plain_logits(backbone: Backbone, queries, prompts: torch.Tensor) -> torch.Tensor:
    """No packing, no mask, no position ids: one forward of the transformers model per query."""
    rows = []
    for query in queries:
        ids = torch.tensor(query.tokens, device=backbone.device)
        embeddings = backbone.model.get_input_embeddings()(ids.clamp(min=0))
        embeddings = torch.where((ids < 0)[:, None], prompts[(-1 - ids).clamp(min=0)], embeddings)
        rows.append(backbone.model(inputs_embeds=embeddings[None]).logits[0, query.targets[0]])
    return torch.stack(rows)


def objective_of(backbone: Backbone, allowed: torch.Tensor | None = None, top: int = 10) -> OneToken:
    """One token of the whole vocabulary, if not told otherwise."""
    everything = torch.ones(backbone.vocabulary_size, dtype=torch.bool)
    return OneToken(everything if allowed is None else allowed, backbone.tokenization.text_of, top)


def instances_of(backbone: Backbone, template: Template, pairs) -> list[Instance]:
    """Facts, asked with a template."""
    subjects, objects = zip(*pairs, strict=True)
    queries = [template.render({"X": subject}, backbone.text_encoder()) for subject in subjects]
    gold = backbone.tokenization.single_tokens(objects)
    return [Instance((query,), token) for query, token in zip(queries, gold, strict=True)]


@pytest.fixture(scope="session")
def backbone_directory(tokenizer, tmp_path_factory) -> Path:
    """A transformers directory, as a user has it."""
    path = tmp_path_factory.mktemp("backbone")
    make_model("llama", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def data_directory(tmp_path) -> Path:
    """A directory in the LAMA layout: the facts above, the same ones in every split so that a tiny model can learn."""
    return write_data(tmp_path / "data")


def write_data(path: Path) -> Path:
    for relation, pairs in PAIRS.items():
        for split in ("train", "dev", "test"):
            write_facts(path / "trex" / split / f"{relation}.jsonl", pairs)
    rows = [{"relation": r, "template": t, "label": r.lower(), "type": "N-1"} for r, t in TEMPLATES.items()]
    (path / "relations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_facts(path: Path, pairs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"sub_label": s, "obj_label": o}) + "\n" for s, o in pairs))


def run_cli(*args: object, timeout: float = 300, launcher: tuple[str, ...] = (sys.executable,), **env: str):
    """Run `megaprompt` in a process of its own; returns the finished process with its output as text."""
    command = [*launcher, "-m", "megaprompt", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
