"""Small Megatron checkpoints as fairseq writes them, made without the code under test."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

LAYERS, WIDTH, FFN, HEADS, WORDS = 2, 32, 64, 8, 80
OPTIONS = {
    "decoder_layers": LAYERS, "decoder_embed_dim": WIDTH, "decoder_ffn_embed_dim": FFN,
    "decoder_attention_heads": HEADS, "decoder_normalize_before": True, "decoder_learned_pos": False,
    "share_decoder_input_output_embed": True, "activation_fn": "gelu", "max_target_positions": 64,
    "no_scale_embedding": False,
}  # fmt: skip


def random_model(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a whole model, by fairseq's names."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    model = {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    model["decoder.embed_tokens.weight"] = make(rows, WIDTH)
    for i in range(LAYERS):
        at = f"decoder.layers.{i}."
        for name, outputs, inputs in (
            *((f"self_attn.{p}_proj", WIDTH, WIDTH) for p in ("q", "k", "v", "out")),
            ("fc1", FFN, WIDTH), ("fc2", WIDTH, FFN),
        ):  # fmt: skip
            model[f"{at}{name}.weight"], model[f"{at}{name}.bias"] = make(outputs, inputs), make(outputs)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            model[f"{at}{name}.weight"], model[f"{at}{name}.bias"] = 1 + make(WIDTH), make(WIDTH)
    model["decoder.layer_norm.weight"], model["decoder.layer_norm.bias"] = 1 + make(WIDTH), make(WIDTH)
    return model


def split(model: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """By the rules of Megatron's parallel layers: columns of an output are rows of its weight."""
    by_rows = ("embed_tokens.weight", "q_proj.", "k_proj.", "v_proj.", "fc1.", "output_projection.weight")
    by_columns = ("out_proj.weight", "fc2.weight")
    result: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in model.items():
        dim = 0 if any(key in name for key in by_rows) else 1 if any(key in name for key in by_columns) else None
        pieces = [tensor] * parts if dim is None else tensor.chunk(parts, dim)
        for part, piece in zip(result, pieces, strict=True):
            part[name] = piece.clone()
    return result


def write_checkpoint(
    path: Path, model: dict[str, Tensor], parts: int, *, zip_file: bool = True, cfg: bool = False
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    about = {"cfg": {"model": OPTIONS}, "args": None} if cfg else {"args": argparse.Namespace(**OPTIONS)}
    for i, tensors in enumerate(split(model, parts)):
        name = f"model-model_part-{i}.pt" if parts > 1 else "model.pt"
        content = {**about, "model": tensors, "extra_state": {"val_loss": 1.0}, "optimizer_history": []}
        torch.save(content, path / name, _use_new_zipfile_serialization=zip_file)
    return path


def write_dictionaries(path: Path, words: int = WORDS, padding: int = 0) -> Path:
    """dict.txt, encoder.json and vocab.bpe with letters, a few merges, and some letters that dict.txt lacks."""
    from tokenizers.pre_tokenizers import ByteLevel

    path.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u0120", "the"),
        ("i", "n"),
        ("\u0120", "P"),
        ("a", "r"),
        ("\u0120P", "ar"),
        ("i", "s"),
    ]
    tokens = letters + ["".join(pair) for pair in merges]
    (path / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (path / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    frequent = [
        str(tokens.index(t)) for t in ("the", "\u0120the", "\u0120Par", "\u0120P", "is", "in", "e", "t", "\u0120", "s")
    ]
    others = [str(i) for i, t in enumerate(tokens) if t.isascii() and str(i) not in frequent]
    symbols = (frequent + others)[: words - 4]
    lines = [f"{symbol} {1000 - i}\n" for i, symbol in enumerate(symbols)]
    lines += [f"madeupword{i:04} 0\n" for i in range(padding)]
    (path / "dict.txt").write_text("".join(lines))
    return path


def plain_logits(model: dict[str, Tensor], ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
    """Logits [T, rows] of one sequence, straight from the description of the model, in float64."""
    w = {name.removeprefix("decoder."): tensor.double() for name, tensor in model.items()}
    x = w["embed_tokens.weight"][ids] if embeddings is None else embeddings
    length, half = len(x), WIDTH // 2
    positions = torch.arange(2, length + 2, dtype=torch.float32)
    angles = positions[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    x = x * math.sqrt(WIDTH) + torch.cat([angles.sin(), angles.cos()], 1).double()

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(LAYERS):
        at = f"layers.{i}."
        y = norm(x, f"{at}self_attn_layer_norm")
        q, k, v = (linear(y, f"{at}self_attn.{p}_proj").view(length, HEADS, -1).transpose(0, 1) for p in "qkv")
        scores = q * (WIDTH // HEADS) ** -0.5 @ k.transpose(1, 2)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        x = x + linear(mixed, f"{at}self_attn.out_proj")
        y = linear(norm(x, f"{at}final_layer_norm"), f"{at}fc1")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{at}fc2")
    return norm(x, "layer_norm") @ w["embed_tokens.weight"].T
