"""A safetensors file that is written in place through memory maps, so that it may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaprompt.errors import MegapromptError
from megaprompt.files import write_file

TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# numpy has no bfloat16: tensors are copied as integers.
_SAME_SIZE = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}


class Place(NamedTuple):
    """Where a tensor is in the safetensors file."""

    offset: int  # bytes from the beginning of the file
    shape: tuple[int, ...]


def layout(model: nn.Module, dtype: torch.dtype) -> tuple[bytes, dict[str, Place], int]:
    """Header of the safetensors file (format: 8 bytes of length, JSON, data), place of each tensor, size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size, item = 0, dtype.itemsize
    for name, parameter in model.named_parameters():  # tied ones once
        length = parameter.numel() * item
        header[name] = {"dtype": TYPES[dtype], "shape": list(parameter.shape), "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {
        name: Place(start + about["data_offsets"][0], tuple(about["shape"]))
        for name, about in header.items()
        if name != "__metadata__"
    }
    return len(text).to_bytes(8, "little") + text, places, start + size


@contextmanager
def mapped(file: Path, place: Place, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """A tensor in the file, as integers of its size; its pages leave memory with the block."""
    array = np.memmap(file, _SAME_SIZE[dtype.itemsize][1], "r+", place.offset, place.shape)
    yield array
    array.flush()
    del array


def finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: exactly then, their sum in double precision is."""
    return bool(tensor.sum(dtype=torch.float64).isfinite())


def integers(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(_SAME_SIZE[tensor.dtype.itemsize][0]).numpy()


def join_columns(file: Path, place: Place, parts: int, dtype: torch.dtype, aside: Path) -> None:
    """Put the blocks that parts have written side by side.

    Each part has a few columns of each row. To write those in place would touch every page of the tensor in every part.
    The joined tensor is written aside first, so that an interruption never leaves a half-joined one.
    """
    with mapped(file, place, dtype) as whole:
        if not aside.exists():
            blocks = whole.reshape(parts, place.shape[0], -1)
            write_file(aside, np.ascontiguousarray(blocks.transpose(1, 0, 2)).tobytes())
        whole[...] = np.fromfile(aside, whole.dtype).reshape(place.shape)


def verify(file: Path, start: int, places: Mapping[str, Place], dtype: torch.dtype) -> str:
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
            if found.get_dtype() != TYPES[dtype] or tuple(found.get_shape()) != place.shape:
                raise wrong
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(start))
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            if not finite(torch.frombuffer(bytearray(chunk), dtype=dtype)):
                raise wrong
    return digest.hexdigest()
