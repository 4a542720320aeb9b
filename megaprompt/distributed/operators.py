"""The operators that DeepSpeed compiles on first use, and the accelerator that it chooses when it is imported."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from megaprompt.errors import MegapromptError

logger = logging.getLogger(__name__)

_STALE_SECONDS = 180  # without a change to any file of an operator's build directory


def prefer_cpu_without_gpu() -> None:
    """DeepSpeed chooses its accelerator when it is imported; without a GPU it must be told."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def build_operators(config: dict[str, Any]) -> None:
    """Build the compiled operators that this run needs, if they are not in PyTorch's extension cache yet.

    A build that was killed leaves a file `lock` in the cache, on which PyTorch lets every later process wait for ever.
    Here one process at a time builds, under a lock of the operating system that a killed process does not keep. A
    left-over file is recognized by nobody working there and nothing having changed for three minutes, and deleted.

    Raises:
        MegapromptError: an operator cannot be built.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    accelerator = get_accelerator()
    nvme = config["zero_optimization"].get("offload_param", {}).get("device") == "nvme"
    names = (["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []) + ["AsyncIOBuilder"] * nvme
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for name in names:
        builder = accelerator.create_op_builder(name)
        if not builder.is_compatible(verbose=False):
            if name == "AsyncIOBuilder":
                raise MegapromptError(
                    "NVMe offload needs libaio with its headers: install libaio-dev (or libaio-devel)"
                )
            continue  # DeepSpeed does without
        with _only_process(cache / f"megaprompt-{builder.name}.lock"):
            _wait_for_other_builds(cache, builder.name)
            if not any(cache.glob(f"**/{builder.name}/*.so")):
                logger.info("building DeepSpeed's operator %s (on first use; a few minutes)", builder.name)
            try:
                builder.load(verbose=False)
            except Exception as error:
                raise MegapromptError(f"DeepSpeed's operator {builder.name} cannot be built ({error})") from error


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _somebody_works_in(directory: Path) -> bool:
    """Whether a compiler of this machine runs in a directory: some take minutes for a file."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()) == directory:
                return True
    return False


def _wait_for_other_builds(cache: Path, operator: str) -> None:
    """Wait until no other program builds an operator, or its lock has been left over."""
    said = False
    while locks := list(cache.glob(f"**/{operator}/lock")):
        for lock in locks:
            try:
                idle = time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir())
            except (FileNotFoundError, ValueError):
                continue
            if idle > _STALE_SECONDS and not _somebody_works_in(lock.parent):
                logger.warning("removing %s: the build that it belongs to was killed", lock)
                shutil.rmtree(lock.parent, ignore_errors=True)  # half-built objects with it
            elif not said:
                logger.warning("waiting for another build of %s (%s)", operator, lock)
                said = True
        time.sleep(0.5)
