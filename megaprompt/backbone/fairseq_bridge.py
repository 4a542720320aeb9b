"""Between fairseq's model-parallel checkpoints (Megatron 11B) and transformers directories, both ways.

A release is a directory with `model-model_part-0.pt` to `-7.pt` (or any other name before `-model_part-`, any number of
parts, or a single `model.pt`), `dict.txt`, and GPT-2's `encoder.json` and `vocab.bpe`. Each part has, of every linear
layer, the rows or columns that one of the model-parallel processes had. They are written straight to their place in one
safetensors file, part after part, so that no more than one part is ever in memory.

Nothing in a checkpoint is executed: it is read with PyTorch's `weights_only` loader, and classes that old checkpoints
refer to are replaced by empty ones.

Where fairseq's releases differ or could not be looked at: tensors may be float16 or float32; `args` (2020) or `cfg`
(later) describes the model; the final norm exists if the tensor does, which must agree with `version` and the options,
because fairseq itself drops the norm silently when `version` is missing or below 3.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megaprompt.backbone.megatron import FairseqMegatronConfig, FairseqMegatronForCausalLM, FairseqMegatronTokenizer
from megaprompt.console import progress
from megaprompt.errors import MegapromptError, UsageError, first_line
from megaprompt.files import write_file

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first entries of every fairseq dictionary; they are not in dict.txt."""
BPE_FILES = ("encoder.json", "vocab.bpe")

_ROWS = re.compile(r"(embed_tokens|output_projection)\.weight|.*\.(q_proj|k_proj|v_proj|fc1)\.(weight|bias)")
_COLUMNS = re.compile(r".*\.(out_proj|fc2)\.weight")
_IGNORED = ("version", "embed_positions._float_tensor")
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# numpy has no bfloat16: tensors are copied as integers.
_SAME_SIZE = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}


# ------------------------------------------------------------------------------------------------------------- reading


class _Anything:
    """Stands for a class that a checkpoint refers to but that has nothing to do with its weights."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


_ALLOWED: list[Any] = [
    argparse.Namespace,
    *(
        (type(name.rpartition(".")[2], (_Anything,), {}), name)
        for name in (
            "fairseq.meters.AverageMeter",
            "fairseq.meters.StopwatchMeter",
            "fairseq.meters.TimeMeter",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "omegaconf.nodes.AnyNode",
            "typing.Any",
        )
    ),
]


def _load_part(path: Path) -> dict[str, Any]:
    """A part's checkpoint. Zip containers are mapped into memory, older ones read.

    Raises:
        MegapromptError: it is damaged, or holds anything but tensors and options.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        for mapped in (True, False):
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                break
            except Exception as error:
                if mapped and "mmap" in str(error):  # not a zip container
                    continue
                reason = next(
                    (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), ""
                )
                if reason or "WeightsUnpickler" in str(error):
                    raise MegapromptError(
                        f"{path}: refused, it holds more than tensors and options, maybe code ({reason.strip()})"
                    ) from error
                raise MegapromptError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise MegapromptError(f"{path}: is no fairseq checkpoint (no `model` in it)")
    return found


def _plain(value: Any) -> Any:
    """Options as plain Python, whatever containers (Namespace, omegaconf) they came in."""
    if isinstance(value, _Anything):
        return _plain(value.__dict__.get("_content", value.__dict__.get("_val")))
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _model_options(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    options = _plain(checkpoint.get("args")) or (_plain(checkpoint.get("cfg")) or {}).get("model")
    if not isinstance(options, dict):
        raise MegapromptError(f"{path}: neither `args` nor `cfg` describes the model; it cannot be converted")
    return options


def _configuration(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: int, path: Path
) -> FairseqMegatronConfig:
    """The model's shape: from the tensors, where they tell it, and checked against the options."""

    def refuse(why: str) -> MegapromptError:
        return MegapromptError(f"{path}: {why}; only models like transformer_lm_megatron_11b can be converted")

    if not options.get("decoder_normalize_before", True) or options.get("decoder_learned_pos"):
        raise refuse("it is no pre-norm transformer with sinusoidal positions")
    if options.get("activation_fn", "gelu") != "gelu":
        raise refuse(f"its activation is {options['activation_fn']}")
    if not options.get("share_decoder_input_output_embed", True) or "embed_out" in tensors:
        raise refuse("its output layer is not its embedding")
    if any(re.search(r"layer_norms\.\d|in_proj_weight|encoder_attn", name) for name in tensors):
        raise refuse("its tensors have names of fairseq before November 2019")
    rows, width = tensors["embed_tokens.weight"].shape
    layers = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))), default=-1)
    if options.get("decoder_layers", layers) != layers or not layers:
        raise refuse(f"it says {options.get('decoder_layers')} layers and has {layers}")
    if options.get("decoder_embed_dim", width) != width:
        raise refuse(f"it says a width of {options['decoder_embed_dim']} and has {width}")
    final_norm = "layer_norm.weight" in tensors
    version = float(tensors["version"].reshape(-1)[0]) if "version" in tensors else 0.0
    wants_norm = not (options.get("no_decoder_final_norm") or options.get("decoder_final_norm") is False)
    if final_norm != (version >= 3 and wants_norm):
        raise MegapromptError(
            f"{path}: `decoder.layer_norm` is {'there' if final_norm else 'missing'}, but version {version:g} and the "
            f"options say otherwise; fairseq would change the model silently, so repair the checkpoint first"
        )
    return FairseqMegatronConfig(
        vocab_size=rows * parts,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=int(options["decoder_attention_heads"]),
        intermediate_size=tensors["layers.0.fc1.weight"].shape[0] * parts,
        max_position_embeddings=int(options.get("max_target_positions") or options.get("tokens_per_sample") or 1024),
        final_norm=final_norm,
        scale_embedding=not options.get("no_scale_embedding", False),
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _decoder_tensors(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by name without `decoder.`, whatever has no place in the converted model included."""
    tensors = {}
    for name, tensor in checkpoint["model"].items():
        if not name.startswith("decoder.") or not isinstance(tensor, Tensor):
            raise MegapromptError(f"{path}: unknown entry {name}; only decoders can be converted")
        tensors[name.removeprefix("decoder.")] = tensor
    if "embed_tokens.weight" not in tensors:
        raise MegapromptError(f"{path}: has no decoder.embed_tokens.weight; only language models can be converted")
    return tensors


def find_parts(directory: Path) -> list[Path]:
    """The parts of a checkpoint, in order.

    Raises:
        UsageError: there are none, or some are missing.
    """
    found = {int(m[1]): p for p in directory.glob("*.pt") if (m := re.search(r"-model_part-(\d+)\.pt$", p.name))}
    if not found and (directory / "model.pt").is_file():
        return [directory / "model.pt"]
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UsageError(f"{directory}: there is no *-model_part-{missing[0]}.pt; give the directory with all parts")
    if len({re.sub(r"\d+\.pt$", "", path.name) for path in found.values()}) > 1:
        raise UsageError(f"{directory}: holds parts of several checkpoints; leave only those of one")
    return [found[i] for i in range(len(found))]


# -------------------------------------------------------------------------------------------------------- dictionaries


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


# ---------------------------------------------------------------------------------------------------------- conversion


class _Place(NamedTuple):
    """Where a tensor is in the safetensors file."""

    offset: int  # bytes from the beginning of the file
    shape: tuple[int, ...]


def _layout(config: FairseqMegatronConfig, dtype: torch.dtype) -> tuple[bytes, dict[str, _Place], int]:
    """Header of the safetensors file (format: 8 bytes of length, JSON, data), place of each tensor, size in bytes."""
    with torch.device("meta"):
        model = FairseqMegatronForCausalLM(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size, item = 0, dtype.itemsize
    for name, parameter in model.named_parameters():  # tied ones once
        length = parameter.numel() * item
        header[name] = {"dtype": _TYPES[dtype], "shape": list(parameter.shape), "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {
        name: _Place(start + about["data_offsets"][0], tuple(about["shape"]))
        for name, about in header.items()
        if name != "__metadata__"
    }
    return len(text).to_bytes(8, "little") + text, places, start + size


@contextmanager
def _mapped(file: Path, place: _Place, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """A tensor in the file, as integers of its size; its pages leave memory with the block."""
    array = np.memmap(file, _SAME_SIZE[dtype.itemsize][1], "r+", place.offset, place.shape)
    yield array
    array.flush()
    del array


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: exactly then, their sum in double precision is."""
    return bool(tensor.sum(dtype=torch.float64).isfinite())


def _integers(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(_SAME_SIZE[tensor.dtype.itemsize][0]).numpy()


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
    file, state_file = scratch / "model.safetensors", scratch / "conversion.json"
    about = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in parts]
    state = json.loads(state_file.read_text()) if state_file.exists() else None
    if state is None or state["parts"] != about or state["dtype"] != dtype:
        shutil.rmtree(scratch, ignore_errors=True)
        state = {"parts": about, "dtype": dtype, "done": 0, "joined": 0}

    first = _load_part(parts[0])
    tensors = _decoder_tensors(first, parts[0])
    config = _configuration(_model_options(first, parts[0]), tensors, len(parts), parts[0])
    if config.vocab_size < len(symbols):
        raise MegapromptError(f"{parts[0]}: {config.vocab_size} embeddings for the {len(symbols)} symbols of dict.txt")
    config.vocab_size = words
    kind = getattr(torch, dtype) if dtype else tensors["embed_tokens.weight"].dtype
    if kind not in _TYPES:
        raise UsageError(f"--dtype {kind}: choose float16, bfloat16 or float32")
    header, places, size = _layout(config, kind)
    names = set(tensors)
    del first, tensors
    if state["done"] == 0:
        scratch.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(scratch).free) < size:
            raise MegapromptError(f"{out} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free space")
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
    sizes = [path.stat().st_size >> 20 for path in parts]
    with progress("convert", sum(sizes), unit="MB") as update:
        update(sum(sizes[: state["done"]]))
        for number in range(state["done"], len(parts)):
            _write_part(parts[number], number, len(parts), names, file, places, kind)
            state["done"] = number + 1
            write_file(state_file, json.dumps(state).encode())
            update(sum(sizes[: number + 1]))
    columns = sorted(name for name in places if _COLUMNS.fullmatch(name)) if len(parts) > 1 else []
    for number in range(state["joined"], len(columns)):
        _join_columns(file, places[columns[number]], len(parts), kind, scratch / f"joined-{number}.bin")
        state["joined"] = number + 1
        write_file(state_file, json.dumps(state).encode())
        (scratch / f"joined-{number}.bin").unlink()
    config.dtype = str(kind).removeprefix("torch.")
    config.architectures = [FairseqMegatronForCausalLM.__name__]
    config.save_pretrained(scratch)
    if tokenizer:
        make_tokenizer(symbols[:words], source, config.max_position_embeddings).save_pretrained(scratch)
    for name in needed:
        shutil.copy(source / name, scratch / name)
    manifest = {
        "sha256": {file.name: _verify(file, len(header), places, kind)},
        "parts": about,
        "padding_rows_dropped": len(symbols) - words,
    }
    write_file(scratch / "manifest.json", json.dumps(manifest, indent=1).encode())
    state_file.unlink()
    os.rename(scratch, out)


def _write_part(
    path: Path, part: int, parts: int, names: set[str], file: Path, places: Mapping[str, _Place], dtype: torch.dtype
) -> None:
    """Write one part's share of every tensor to its place."""
    tensors = _decoder_tensors(_load_part(path), path)
    if tensors.keys() != names:
        odd = sorted(tensors.keys() ^ names)[0]
        raise MegapromptError(f"{path}: decoder.{odd} is not in all parts; they are not of one checkpoint")
    for name in sorted(names):
        tensor = tensors.pop(name)
        if name in _IGNORED:
            continue
        if not _finite(tensor):
            raise MegapromptError(f"{path}: decoder.{name} has values that are not finite; fetch the part again")
        checked_only = name == "output_projection.weight"  # of later versions: the embeddings again
        target = "model.embed_tokens.weight" if checked_only else f"model.{name}"
        if target not in places:
            raise MegapromptError(
                f"{path}: unknown tensor decoder.{name}; only models like Megatron 11B can be converted"
            )
        place = places[target]
        values = tensor.to(dtype)
        if values is not tensor and not _finite(values):
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
        with _mapped(file, place, dtype) as whole:
            if rows:
                begin = part * len(values)
                values = values[: max(0, place.shape[0] - begin)]
                here = whole[begin : begin + len(values)]
            elif columns:  # block after block for now, see _join_columns
                here = whole.reshape(parts, *values.shape)[part]
            else:
                here = whole
            integers = _integers(values)
            if (checked_only or (part and not rows and not columns)) and not np.array_equal(here, integers):
                other = "the embedding" if checked_only else "part 0"
                raise MegapromptError(
                    f"{path}: decoder.{name} differs from {other}; the parts are not of one checkpoint"
                )
            if not checked_only:
                here[...] = integers
            del here


def _join_columns(file: Path, place: _Place, parts: int, dtype: torch.dtype, aside: Path) -> None:
    """Put the blocks that parts have written side by side.

    Each part has a few columns of each row. To write those in place would touch every page of the tensor in every part.
    The joined tensor is written aside first, so that an interruption never leaves a half-joined one.
    """
    with _mapped(file, place, dtype) as whole:
        if not aside.exists():
            blocks = whole.reshape(parts, place.shape[0], -1)
            write_file(aside, np.ascontiguousarray(blocks.transpose(1, 0, 2)).tobytes())
        whole[...] = np.fromfile(aside, whole.dtype).reshape(place.shape)


def _verify(file: Path, start: int, places: Mapping[str, _Place], dtype: torch.dtype) -> str:
    """Read the result back, once: its header as a user's program will, and its data, from byte `start` on.

    Returns the checksum of the file.

    Raises:
        MegapromptError: tensors are missing or of another kind, or values are not finite.
    """
    wrong = MegapromptError(f"{file} was not written correctly; is the disk in order?")
    with safe_open(file, framework="pt") as probe:
        if set(probe.keys()) != set(places):
            raise wrong
        for name, place in places.items():
            found = probe.get_slice(name)
            if found.get_dtype() != _TYPES[dtype] or tuple(found.get_shape()) != place.shape:
                raise wrong
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(start))
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            if not _finite(torch.frombuffer(bytearray(chunk), dtype=dtype)):
                raise wrong
    return digest.hexdigest()


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
    options = argparse.Namespace(
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
    for part in range(parts):
        model: dict[str, Tensor] = {
            "decoder.version": torch.tensor([3.0]),
            "decoder.embed_positions._float_tensor": torch.zeros(1),
        }
        with safe_open(source / "model.safetensors", framework="pt") as file:
            for name in sorted(file.keys()):
                tensor, bare = file.get_tensor(name), name.removeprefix("model.")
                if bare == "embed_tokens.weight":
                    tensor = torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])
                if _ROWS.fullmatch(bare):
                    tensor = tensor.chunk(parts, dim=0)[part].clone()
                elif _COLUMNS.fullmatch(bare):
                    tensor = tensor.chunk(parts, dim=1)[part].clone()
                model[f"decoder.{bare}"] = tensor.contiguous()
        name = "model.pt" if parts == 1 else f"model-model_part-{part}.pt"
        torch.save({"args": options, "model": model, "optimizer_history": [], "extra_state": {}}, scratch / name)
    for name in ("dict.txt", *BPE_FILES):
        if (source / name).is_file():
            shutil.copy(source / name, scratch / name)
    os.rename(scratch, out)
