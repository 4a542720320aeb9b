"""Between fairseq's model-parallel checkpoints (Megatron 11B) and transformers directories, both ways.

A release is a directory with `model-model_part-0.pt` to `-7.pt` (or any other name before `-model_part-`, any number of
parts, or a single `model.pt`), `dict.txt`, and GPT-2's `encoder.json` and `vocab.bpe`. Each part has, of every linear
layer, the rows or columns that one of the model-parallel processes had. They are written straight to their place in one
safetensors file, part after part, so that no more than one part is ever in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megaprompt.backbone.fairseq_parts import configuration, decoder_tensors, find_parts, load_part, model_options
from megaprompt.backbone.fairseq_tokenizer import BPE_FILES, make_tokenizer, read_dictionary
from megaprompt.backbone.mapped_safetensors import TYPES, Place, finite, integers, join_columns, layout, mapped, verify
from megaprompt.backbone.megatron import FairseqMegatronConfig, FairseqMegatronForCausalLM
from megaprompt.console import progress
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file

_ROWS = re.compile(r"(embed_tokens|output_projection)\.weight|.*\.(q_proj|k_proj|v_proj|fc1)\.(weight|bias)")
_COLUMNS = re.compile(r".*\.(out_proj|fc2)\.weight")
_IGNORED = ("version", "embed_positions._float_tensor")


class _State:
    """How far a conversion is, in a file beside the weights, so that the next call can go on."""

    def __init__(self, scratch: Path, parts: Sequence[Path], dtype: str | None) -> None:
        self.path = scratch / "conversion.json"
        self.about = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in parts]
        state = json.loads(self.path.read_text()) if self.path.exists() else {}
        if (state.get("parts"), state.get("dtype")) != (self.about, dtype):
            shutil.rmtree(scratch, ignore_errors=True)
            state = {}
        self.dtype = dtype
        self.written: int = state.get("done", 0)  # parts
        self.joined: int = state.get("joined", 0)  # tensors

    def write(self) -> None:
        state = {"parts": self.about, "dtype": self.dtype, "done": self.written, "joined": self.joined}
        write_file(self.path, json.dumps(state).encode())


def convert(source: Path, out: Path, *, dtype: str | None = None, tokenizer: bool = True) -> None:
    """Turn a fairseq checkpoint into a directory that `load_backbone` opens.

    It is made in a directory beside `out` and renamed at the end. If it is interrupted, the next call goes on after the
    last finished part.

    Args:
        dtype: of the result; that of the checkpoint if not given.
        tokenizer: False converts weights only.

    Raises:
        UsageError: files are missing, or `out` exists.
        MegapromptError: a checkpoint is damaged, dangerous, or of another kind of model.
    """
    parts = find_parts(source)
    needed = ["dict.txt", *(BPE_FILES if tokenizer else ())]
    if missing := [name for name in needed if not (source / name).is_file()]:
        hint = "fetch them from the release" + ("" if "dict.txt" in missing else ", or convert with --no-tokenizer")
        raise UsageError(f"{source}: {', '.join(missing)} missing; {hint}")
    if out.exists():
        raise UsageError(f"{out} exists; choose another directory, or delete it")
    symbols = read_dictionary(source / "dict.txt")
    words = max((i for i, s in enumerate(symbols) if not s.startswith("madeupword")), default=0) + 1
    scratch = out.with_name(f".{out.name}.partial")
    state = _State(scratch, parts, dtype)

    first = load_part(parts[0])
    tensors = decoder_tensors(first, parts[0])
    config = configuration(model_options(first, parts[0]), tensors, len(parts), parts[0])
    if config.vocab_size < len(symbols):
        raise MegapromptError(f"{parts[0]}: {config.vocab_size} embeddings for the {len(symbols)} symbols of dict.txt")
    config.vocab_size = words
    kind = getattr(torch, dtype) if dtype else tensors["embed_tokens.weight"].dtype
    if kind not in TYPES:
        raise UsageError(f"--dtype {kind}: choose float16, bfloat16 or float32")
    names = set(tensors)
    del first, tensors
    sha256 = _write_weights(scratch / "model.safetensors", config, kind, parts, names, state)
    config.dtype = str(kind).removeprefix("torch.")
    config.architectures = [FairseqMegatronForCausalLM.__name__]
    config.save_pretrained(scratch)
    if tokenizer:
        make_tokenizer(symbols[:words], source, config.max_position_embeddings).save_pretrained(scratch)
    for name in needed:
        shutil.copy(source / name, scratch / name)
    manifest = {
        "sha256": {"model.safetensors": sha256},
        "parts": state.about,
        "padding_rows_dropped": len(symbols) - words,
    }
    write_file(scratch / "manifest.json", json.dumps(manifest, indent=1).encode())
    state.path.unlink()
    os.rename(scratch, out)


def _write_weights(
    file: Path,
    config: FairseqMegatronConfig,
    dtype: torch.dtype,
    parts: Sequence[Path],
    names: set[str],
    state: _State,
) -> str:
    """Write what is missing of the safetensors file, and check it; returns its checksum.

    Args:
        names: of the tensors in each part.
    """
    with torch.device("meta"):
        header, places, size = layout(FairseqMegatronForCausalLM(config), dtype)
    if state.written == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(file.parent).free) < size:
            raise MegapromptError(f"{file} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free space")
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
    sizes = [path.stat().st_size >> 20 for path in parts]
    with progress("convert", sum(sizes), unit="MB") as update:
        update(sum(sizes[: state.written]))
        for number in range(state.written, len(parts)):
            _write_part(parts[number], number, len(parts), names, file, places, dtype)
            state.written = number + 1
            state.write()
            update(sum(sizes[: number + 1]))
    columns = sorted(name for name in places if _COLUMNS.fullmatch(name)) if len(parts) > 1 else []
    for number in range(state.joined, len(columns)):
        aside = file.with_name(f"joined-{number}.bin")
        join_columns(file, places[columns[number]], len(parts), dtype, aside)
        state.joined = number + 1
        state.write()
        aside.unlink()
    for leftover in file.parent.glob("joined-*.bin"):  # of a call that ended between these two
        leftover.unlink()
    return verify(file, len(header), places, dtype)


def _write_part(
    path: Path, part: int, parts: int, names: set[str], file: Path, places: Mapping[str, Place], dtype: torch.dtype
) -> None:
    """Write one part's share of every tensor to its place."""
    tensors = decoder_tensors(load_part(path), path)
    if tensors.keys() != names:
        odd = sorted(tensors.keys() ^ names)[0]
        raise MegapromptError(f"{path}: decoder.{odd} is not in all parts; they are not of one checkpoint")
    for name in sorted(names):
        tensor = tensors.pop(name)
        if name in _IGNORED:
            continue
        if not finite(tensor):
            raise MegapromptError(f"{path}: decoder.{name} has values that are not finite; fetch the part again")
        checked_only = name == "output_projection.weight"  # of later versions: the embeddings again
        target = "model.embed_tokens.weight" if checked_only else f"model.{name}"
        if target not in places:
            raise MegapromptError(
                f"{path}: unknown tensor decoder.{name}; only models like Megatron 11B can be converted"
            )
        place = places[target]
        values = tensor.to(dtype)
        if values is not tensor and not finite(values):
            raise MegapromptError(f"{path}: decoder.{name} does not fit into {dtype}; give another --dtype")
        rows, columns = bool(_ROWS.fullmatch(name)), bool(_COLUMNS.fullmatch(name))
        # The vocabulary is cut, so it alone may not divide evenly.
        padded = name.endswith(("embed_tokens.weight", "output_projection.weight"))
        expected = list(place.shape)
        if rows and not padded:
            expected[0] //= parts
        elif columns:
            expected[1] //= parts
        if list(tensor.shape)[int(padded) :] != expected[int(padded) :]:
            raise MegapromptError(
                f"{path}: decoder.{name} is {list(tensor.shape)}, not {expected}; it is another model's"
            )
        with mapped(file, place, dtype) as whole:
            if rows:
                begin = part * len(values)
                values = values[: max(0, place.shape[0] - begin)]
                here = whole[begin : begin + len(values)]
            elif columns:  # block after block for now, see join_columns
                here = whole.reshape(parts, *values.shape)[part]
            else:
                here = whole
            numbers = integers(values)
            if (checked_only or (part and not rows and not columns)) and not np.array_equal(here, numbers):
                other = "the embedding" if checked_only else "part 0"
                raise MegapromptError(
                    f"{path}: decoder.{name} differs from {other}; the parts are not of one checkpoint"
                )
            if not checked_only:
                here[...] = numbers
            del here


def convert_back(source: Path, out: Path, parts: int) -> None:
    """Split a converted directory into the parts of a fairseq checkpoint.

    Raises:
        UsageError: `source` is no converted checkpoint, `out` exists, or the model cannot be split into so many parts.
    """
    if not (source / "manifest.json").is_file() or not (source / "dict.txt").is_file():
        raise UsageError(f"{source}: is no converted fairseq checkpoint (no manifest.json and dict.txt)")
    if out.exists():
        raise UsageError(f"{out} exists; choose another directory, or delete it")
    config = FairseqMegatronConfig.from_pretrained(source)
    if parts < 1 or config.num_attention_heads % parts or config.intermediate_size % parts:
        raise UsageError(f"--parts {parts}: does not divide the {config.num_attention_heads} attention heads")
    symbols = read_dictionary(source / "dict.txt")
    rows = -(-len(symbols) // (8 * parts)) * 8 * parts  # fairseq pads the dictionary so
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    options = _options(config, parts)
    for part in range(parts):
        model = _part_of(source / "model.safetensors", part, parts, rows)
        name = "model.pt" if parts == 1 else f"model-model_part-{part}.pt"
        torch.save({"args": options, "model": model, "optimizer_history": [], "extra_state": {}}, scratch / name)
    for name in ("dict.txt", *BPE_FILES):
        if (source / name).is_file():
            shutil.copy(source / name, scratch / name)
    os.rename(scratch, out)


def _part_of(file: Path, part: int, parts: int, rows: int) -> dict[str, Tensor]:
    """The tensors of one part, by fairseq's names; the embedding is padded to `rows` rows."""
    model: dict[str, Tensor] = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_positions._float_tensor": torch.zeros(1),
    }
    with safe_open(file, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor, bare = tensors.get_tensor(name), name.removeprefix("model.")
            if bare == "embed_tokens.weight":
                tensor = torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])
            if _ROWS.fullmatch(bare):
                tensor = tensor.chunk(parts, dim=0)[part].clone()
            elif _COLUMNS.fullmatch(bare):
                tensor = tensor.chunk(parts, dim=1)[part].clone()
            model[f"decoder.{bare}"] = tensor.contiguous()
    return model


def _options(config: FairseqMegatronConfig, parts: int) -> argparse.Namespace:
    """What fairseq's own training would have written about the model."""
    return argparse.Namespace(
        arch="transformer_lm_megatron_11b",
        task="language_modeling",
        decoder_layers=config.num_hidden_layers,
        decoder_embed_dim=config.hidden_size,
        decoder_input_dim=config.hidden_size,
        decoder_output_dim=config.hidden_size,
        decoder_ffn_embed_dim=config.intermediate_size,
        decoder_attention_heads=config.num_attention_heads,
        decoder_normalize_before=True,
        decoder_learned_pos=False,
        no_decoder_final_norm=not config.final_norm,
        no_scale_embedding=not config.scale_embedding,
        share_decoder_input_output_embed=True,
        activation_fn="gelu",
        max_target_positions=config.max_position_embeddings,
        tokens_per_sample=config.max_position_embeddings,
        model_parallel_size=parts,
        add_bos_token=False,
    )
