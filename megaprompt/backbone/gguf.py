"""GGUF files, which are dequantized once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megaprompt.errors import MegapromptError

logger = logging.getLogger(__name__)


def dequantized(gguf: Path) -> Path:
    """A safetensors copy of a GGUF file in the cache; made on first use, since dequantizing takes much longer.

    Raises:
        MegapromptError: the cache cannot be written.
    """
    with gguf.open("rb") as file:
        digest = hashlib.sha256(f"{gguf.stat().st_size}".encode())
        digest.update(file.read(1 << 20))
        file.seek(max(0, gguf.stat().st_size - (1 << 20)))
        digest.update(file.read())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaprompt"
    target = cache / f"{gguf.stem}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    logger.info("dequantizing %s into %s (first use only)", gguf.name, target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except OSError as error:
        raise MegapromptError(f"cannot write the cache {cache} ({error}); set XDG_CACHE_HOME") from error
    try:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        plain = AutoModelForCausalLM.from_config(config)  # transformers does not save a model that was read as GGUF
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
