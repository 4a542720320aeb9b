"""Whether a run fits on given machines, what to change if not, and how fast a pass can be at best."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megaprompt.config import AUTO, PlanConfig, shipped_configurations
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config, whole_on_each_node
from megaprompt.engine.schedule import groups_for, waves_for
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template, default_template
from megaprompt.resources.predict import Job, Need, Place, predict
from megaprompt.resources.profile import Profile, Workload, profile, shape_of

RUNTIME: dict[Place, float] = {"host": 0.35e9, "device": 0.0, "nvme": 0.0}
"""Bytes of a process that has imported everything and loaded nothing, without a GPU (measured)."""
GPU_RUNTIME: dict[Place, float] = {"host": 3e9, "device": 0.8e9, "nvme": 0.0}
"""The same with one: CUDA's and NCCL's context and libraries (an estimate)."""
USABLE = 0.92
"""The share of a memory that a plan may fill: allocators leave gaps."""


@dataclass(frozen=True)
class Plan:
    """One configuration on the machines that were asked about."""

    name: str  # of the configuration
    dtype: str
    ranks: int
    bytes: dict[Place, dict[str, float]]  # of one rank, by category
    available: dict[Place, float]  # to one rank
    traffic: dict[str, float]  # bytes per pass and rank: network, pcie, disk
    seconds: float  # of a pass, at least
    reasons: list[str]  # why it does not fit; none if it does
    groups: int = 1  # of ranks, among which the relations are divided
    waves: int = 1  # of relations, one after the other

    @property
    def fits(self) -> bool:
        return not self.reasons

    def total(self, place: Place) -> float:
        """Bytes of one rank in one place."""
        return sum(self.bytes[place].values())


def plans(config: PlanConfig) -> list[Plan]:
    """The plan of the configuration that was asked for; of all that come into question if none was, cheapest first.

    Raises:
        UsageError: there is no such backbone or configuration.
    """
    if config.deepspeed not in (None, AUTO):
        return [plan(config, config.deepspeed)]
    found = [plan(config, None)]
    for path in _configurations():
        if read_deepspeed_config(path).dtype in (None, _default(config)):
            found.append(plan(config, path))
    return sorted(found, key=_cost)


def _cost(plan: Plan) -> tuple[float, ...]:
    return (not plan.fits, plan.seconds, plan.traffic["pcie"], plan.traffic["network"], plan.total("device"))


def _default(config: PlanConfig) -> torch.dtype:
    return getattr(torch, config.dtype or ("bfloat16" if config.gpus else "float32"))


def _configurations() -> list[Path]:
    """Those in ds_configs/ of this directory, or else those that come with megaprompt, as --deepspeed takes them."""
    folder = Path("ds_configs")
    return sorted(folder.glob("*.json")) or [folder / path.name for path in shipped_configurations()]


@cache
def profile_of(backbone: str, dtype: torch.dtype, work: Workload) -> Profile:
    """The profile of a backbone by name; computed once."""
    return profile(shape_of(backbone), dtype, work)


def bytes_of_pass(backbone: str, dtype: torch.dtype, size: PassSize, whole_answers: bool) -> int:
    """What a full training pass takes beside parameters: what is kept for the backward pass, and what is temporary.

    Raises:
        UsageError: there is no such backbone.
    """
    shape = shape_of(backbone)
    return profile_of(backbone, dtype, Workload.of(shape, "p-tuning", 1, size, whole_answers)).activations


def plan(config: PlanConfig, deepspeed: Path | None, together: int = 1, whole_answers: bool = False) -> Plan:
    """The plan of one configuration; None is PyTorch alone, with a whole copy of the backbone on every rank.

    Args:
        together: how many prompts of each relation are learned, which are in the same wave.
        whole_answers: see `Workload`.

    Raises:
        UsageError: there is no such backbone or configuration, or the groups do not divide the ranks.
    """
    relations, config = config.relations, dataclasses.replace(config, relations=config.relations * together)
    settings = read_deepspeed_config(deepspeed) if deepspeed is not None else DeepSpeedSettings()
    dtype = settings.dtype or _default(config)
    if settings.sharding is None and config.method == "fine-tuning":
        dtype = torch.float32  # in half precision only ZeRO keeps float32 copies
    tokens = PassSize(config.row_tokens, config.pass_tokens)
    work = Workload.of(shape_of(config.backbone), config.method, config.relations, tokens, whole_answers)
    run = profile_of(config.backbone, dtype, work)
    per_node = max(1, config.gpus)
    ranks = config.nodes * per_node
    groups = config.relation_groups or groups_for(config.relations, ranks)
    if ranks % groups:
        raise UsageError(
            f"--relation-groups {config.relation_groups}: does not divide the {ranks} ranks; give a divisor"
        )
    job = Job(
        method=config.method,
        dtype=dtype,
        zero=_zero(config, settings, run.parameters * dtype.itemsize),
        ranks=ranks,
        relations=1,
        encoder=config.encoder,
        pseudo_tokens=Template.parse(config.template or default_template(work.causal)).num_pseudo_tokens,
        on_cpu=not config.gpus,
    )
    available: dict[Place, float] = {
        "device": config.gpu_memory * 1e9 if config.gpus else 0.0,
        "host": config.host_memory * 1e9 / per_node,
        "nvme": float("inf"),
    }
    waves = min(relations, _waves(config, groups, _needed(config, predict(run, job)), available))
    of_wave = -(-relations // waves) * together
    job = dataclasses.replace(job, relations=-(-of_wave // groups))
    need = predict(run, job)
    needed = _needed(config, need)
    traffic = _traffic(run, job, need)
    seconds = _seconds(config, run, traffic, between_nodes=config.nodes > 1 and job.gather_among == ranks)
    reasons = _reasons(needed, available)
    name = str(deepspeed or "none")
    own = str(dtype).removeprefix("torch.")
    return Plan(name, own, ranks, needed, available, traffic, seconds, reasons, groups, waves)


def _waves(
    config: PlanConfig,
    groups: int,
    needed: Mapping[Place, Mapping[str, float]],
    available: Mapping[Place, float],
) -> int:
    """In how many waves the relations are learned, as `methods.p_tuning` finds it: encoders may fill half of what the
    backbone leaves.

    Args:
        needed: by a rank with one encoder.
    """
    place: Place = "device" if config.gpus else "host"
    one = needed[place].get("encoders", 0.0)
    free = available[place] - needed[place].get("parameters", 0.0) - needed[place].get("runtime", 0.0)
    return waves_for(config.relations, groups * max(1, int(free / 2 / one))) if one else 1


def _needed(config: PlanConfig, need: Need) -> dict[Place, dict[str, float]]:
    """What a rank needs in each place on these machines, with what every process takes."""
    needed: dict[Place, dict[str, float]] = {place: dict(getattr(need, place)) for place in ("device", "host", "nvme")}
    if not config.gpus:  # devices are the host
        needed["host"] = dict(Counter(needed["host"]) + Counter(needed["device"]))
        needed["device"] = {}
    for place, size in (GPU_RUNTIME if config.gpus else RUNTIME).items():
        if size:
            needed[place]["runtime"] = size
    return needed


def _reasons(needed: Mapping[Place, Mapping[str, float]], available: Mapping[Place, float]) -> list[str]:
    """Why a rank does not fit; none if it does."""
    reasons = []
    places: tuple[tuple[Place, str], ...] = (("device", "GPU"), ("host", "host"))
    for place, what in places:
        total = sum(needed[place].values())
        if total > USABLE * available[place]:
            most = max(needed[place], key=lambda category: needed[place][category])
            reasons.append(
                f"{what} memory: {gigabytes(total)} GB of {gigabytes(available[place])} GB per rank, of which at most "
                f"{USABLE:.0%} should be filled; {most} take {gigabytes(needed[place][most])} GB"
            )
    return reasons


def _zero(config: PlanConfig, settings: DeepSpeedSettings, weights: int) -> dict[str, Any] | None:
    """The section `zero_optimization` as a run has it."""
    if settings.sharding is None:
        return None
    zero = settings.sharding["zero_optimization"]
    if config.method == "fine-tuning":
        return zero
    return whole_on_each_node(zero, config.nodes, config.gpus, weights, config.gpu_memory * 1e9)


def _seconds(config: PlanConfig, run: Profile, traffic: Mapping[str, float], between_nodes: bool) -> float:
    """The time of a pass that is bound by the slowest of computing, network, PCIe and disk."""
    within = 50.0 if config.nodes > 1 else config.network or 50.0
    network = (config.network or 12.5) if between_nodes else within
    tflops = config.tflops or (100.0 if config.gpus else 1.0)
    return max(
        run.flops / (tflops * 1e12),
        traffic["network"] / (network * 1e9),
        traffic["pcie"] / (config.pcie * 1e9) if config.gpus else 0.0,
        traffic["disk"] * max(1, config.gpus) / (config.disk * 1e9),
    )


def _traffic(run: Profile, job: Job, need: Need) -> dict[str, float]:
    """Bytes that a rank receives and moves in a pass that is a whole step."""
    size, ranks = job.dtype.itemsize, job.ranks
    zero = job.zero or {}
    others = (job.gather_among - 1) / job.gather_among
    trained = run.parameters * size if job.method == "fine-tuning" else 0
    gathered = need.gathering.total * size if zero else 0.0
    parameters = zero.get("offload_param", {}).get("device", "none")
    optimizer = zero.get("offload_optimizer", {}).get("device", "none")
    pcie = (gathered / ranks if parameters != "none" else 0.0) + (2 * trained / ranks if optimizer != "none" else 0.0)
    if job.on_cpu:
        pcie = 0.0
    return {
        "network": (gathered + (1 if zero else 2) * trained) * others,  # all-reduce is a scatter and a gather
        "pcie": pcie,
        "disk": gathered / ranks if parameters == "nvme" else 0.0,
    }


def advice(config: PlanConfig, found: Sequence[Plan]) -> str:
    """What to do, in a sentence, and why."""
    best = found[0]
    if best.fits:
        option = "without --deepspeed" if best.name == "none" else f"with --deepspeed {best.name}"
        return f"fits {option} ({best.dtype}){arrangement(best)}; at least {best.seconds:.2g} s per pass"
    why = f" ({'; '.join(best.reasons)})"
    device = best.bytes["device"] or best.bytes["host"]
    most = max(device, key=lambda category: device[category])
    changes = {
        "encoders": "use more nodes, or a smaller --encoder (mlp, none)",
        "activations": "lower --pass-tokens",
        "optimizer": "use more nodes, or P-tuning, which has no optimizer state of the backbone",
        "gathered": "lower stage3_max_live_parameters and stage3_max_reuse_distance in the configuration",
        "buffers": "lower reduce_bucket_size, sub_group_size or buffer_count in the configuration",
    }
    if config.deepspeed not in (None, AUTO):
        return f"does not fit; leave --deepspeed out to see which configuration does{why}"
    return f"does not fit; {changes.get(most) or 'use more GPUs or nodes'}{why}"


def arrangement(plan: Plan) -> str:
    """How relations are divided, if they are."""
    groups = f" in {plan.groups} groups of ranks" if plan.groups > 1 else ""
    waves = f" in {plan.waves} waves, one after the other" if plan.waves > 1 else ""
    return f", relations{groups}{' and' * bool(groups and waves)}{waves}" if groups or waves else ""


def gigabytes(size: float) -> str:
    """With one place."""
    return f"{size / 1e9:.1f}"
