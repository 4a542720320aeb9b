"""What a run needs in memory, per rank: predicted before anything is loaded.

`profile` counts what a pass takes, `gathering` what ZeRO-3 has gathered at once. What is left is arithmetic:

- P-tuning: the backbone's parameters (a share of them under ZeRO-3) and activations; no gradients, no optimizer.
  Each relation's prompt encoder takes 16 bytes per element: float32 weights, gradients, and Adam's two averages.
- Fine-tuning: 16 bytes per parameter in float32 (weights, gradients, two averages), 18 in half precision with float32
  copies; all of it shared among the ranks under ZeRO-3. See ZeRO (arXiv 1910.02054), section 3.1.
- Keys and values of constant text (`engine.trunks`) are not counted: they take no more than what plans leave free.

`measure` measures the same; docs/memory.md tells how well they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megaprompt.prompting.prompt_encoder import EncoderKind, number_of_parameters
from megaprompt.resources.gathering import Gathering, gathering
from megaprompt.resources.profile import Method, Profile

Place = Literal["device", "host", "nvme"]
CATEGORIES = ("parameters", "gathered", "gradients", "optimizer", "encoders", "activations", "buffers")


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs, by place and category."""

    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]
    gathering: Gathering

    def total(self, place: Place) -> int:
        """Bytes in one place."""
        return sum(getattr(self, place).values())


@dataclass(frozen=True)
class Job:
    """What is to be run, as far as memory depends on it."""

    method: Method
    dtype: torch.dtype = torch.float32
    zero: Mapping[str, Any] | None = (
        None  # the section zero_optimization of stage 3; None for a whole copy on each rank
    )
    ranks: int = 1
    relations: int = 1  # whose prompts are trained by one rank
    encoder: EncoderKind = "lstm"
    pseudo_tokens: int = 6
    on_cpu: bool = False  # devices are the host's cores

    @property
    def gather_among(self) -> int:
        """The ranks that parameters are gathered from: all, or those of a node where it holds the whole backbone."""
        of_node = (self.zero or {}).get("zero_hpz_partition_size", 1)
        return of_node if of_node > 1 else self.ranks


def predict(profile: Profile, job: Job) -> Need:
    """What one rank needs while it trains, at its peak."""
    size, parameters, ranks = job.dtype.itemsize, profile.parameters, job.ranks
    device, host, nvme = (Counter[str]() for _ in range(3))
    gathered = Gathering((), 0, 0)
    where_parameters = where_optimizer = device
    device["activations"] = profile.activations
    share = parameters
    if job.zero is not None:
        share = sum(-(-numel // ranks) for numel in profile.numels)
        offload = job.zero.get("offload_param", {}).get("device", "none")
        where_parameters = {"none": device, "cpu": host, "nvme": nvme}[offload]
        if job.gather_among < ranks:
            share += sum(-(-numel // job.gather_among) for numel in profile.numels)
        gathered = gathering(profile, job.zero, ranks, gloo=job.on_cpu)
        if ranks > 1 or (offload != "none" and not job.on_cpu):  # else what is gathered is where it was
            device["gathered"] = gathered.peak(profile, size)
        if offload == "nvme":
            swap = job.zero["offload_param"]
            host["buffers"] += swap.get("buffer_count", 5) * swap.get("buffer_size", 100_000_000) * size
    where_parameters["parameters"] = share * size
    if job.method == "p-tuning":
        device["encoders"] = (
            job.relations * 16 * number_of_parameters(job.pseudo_tokens, profile.embedding_size, job.encoder)
        )
    elif job.zero is None:
        device["gradients"] = share * size
        device["optimizer"] = 2 * share * size
    else:
        offload = job.zero.get("offload_optimizer", {}).get("device", "none")
        where_optimizer = {"none": device, "cpu": host, "nvme": nvme}[offload]
        where_optimizer["optimizer"] = (4 + 8) * share  # float32 weights, in any case, and Adam's averages
        bucket = size * min(job.zero.get("reduce_bucket_size", 500_000_000), parameters)
        during_pass = device["activations"] + device["gathered"] + 2 * bucket  # the second one while it is scattered
        if offload == "none":
            device["gradients"] = size * share
            group = min(job.zero.get("sub_group_size", 1_000_000_000), share)
            in_step = bucket + (4 if size >= 4 else 4 + size) * group  # its gradients in a row, and in float32
        else:
            host["gradients"] = (size + 4) * share
            norm = 8 * -(-max(profile.numels) // ranks)  # of the largest partition, in float64
            in_step = bucket + (norm if job.on_cpu else 0)
            host["buffers"] += 0 if job.on_cpu else norm
        device["buffers"] += max(during_pass, in_step) - device["activations"] - device["gathered"]
    return Need(dict(device), dict(host), dict(nvme), gathered)
