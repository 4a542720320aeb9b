"""Whether a run fits on its machines, and what it takes with `--deepspeed auto`: both are decided by the plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch

from megaprompt.backbone import dtype_of
from megaprompt.backbone.load import inspect_backbone
from megaprompt.config import AUTO, PASS_TOKENS, PlanConfig, RunConfig
from megaprompt.config.options import Dtype
from megaprompt.distributed.deepspeed_config import read_deepspeed_config, whole_on_each_node
from megaprompt.distributed.world import World, ranks_on_this_machine
from megaprompt.errors import MegapromptError
from megaprompt.methods.candidates import FOLDS, MOST
from megaprompt.prompting.template import Template
from megaprompt.resources.plan import Plan, arrangement, gigabytes, plan
from megaprompt.resources.predict import Place
from megaprompt.resources.profile import Method

_PLACES: tuple[tuple[Place, str], ...] = (("device", "GPU"), ("host", "host"))
_SHARDED = tuple(Path("ds_configs") / f"zero3{more}.json" for more in ("", "_cpu_offload", "_nvme_offload"))
"""From the fastest to that which needs least."""
_TRAINED: dict[str, Method] = {
    "p-tuning": "p-tuning",
    "best": "p-tuning",
    "autoprompt": "p-tuning",
    "fine-tuning": "fine-tuning",
    "manual+fine-tuning": "fine-tuning",
    "p-tuning+fine-tuning": "fine-tuning",
    "pet": "fine-tuning",
}
"""What methods train, as far as memory is concerned. (AutoPrompt's search needs no more than P-tuning.)"""


class Machines(NamedTuple):
    """Those of a job, with what is free on them, in GB."""

    nodes: int
    gpus: int  # of each node, with a rank for each; 0 for ranks without GPUs, each of which counts as a node
    gpu_memory: float
    host_memory: float  # of each node

    @classmethod
    def of_job(cls) -> Machines | None:
        """Of the job that the environment tells of, or this one; None where a login node does not know them."""
        if login := os.environ.get("MEGAPROMPT_LOGIN_NODE"):  # set by slurm/common.sh where it submits
            return _asked_for(login)
        ranks = int(os.environ.get("SLURM_NTASKS") or os.environ.get("WORLD_SIZE") or 1)
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
        per_node = -(-ranks // nodes)
        given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) << 20
        host = (given or psutil.virtual_memory().available) / 1e9
        if torch.cuda.is_available():
            return cls(nodes, per_node, torch.cuda.mem_get_info()[0] / 1e9, host)
        return cls(ranks, 0, 0.0, host / per_node)

    @classmethod
    def of(cls, world: World) -> Machines:
        """Of ranks that have found each other. All must call it."""
        host = world.free_host_memory() / 1e9
        if world.device.type != "cuda":
            return cls(world.size, 0, 0.0, host)
        per_node = ranks_on_this_machine() if world.size > 1 else 1
        most = max(world.gather(per_node))
        return cls(-(-world.size // most), most, world.free_memory() / 1e9, host * most)


def _asked_for(login: str) -> Machines | None:
    """What a script asks for, as NODES*RANKS, on nodes of which slurm/site.env tells."""
    nodes, _, ranks = login.partition("*")
    sizes = [os.environ.get(name) for name in ("GPU_MEMORY", "HOST_MEMORY")]
    if not (nodes.isdecimal() and ranks.isdecimal() and all(sizes)):
        return None
    try:
        gpu, host = (float(size or 0) for size in sizes)
    except ValueError as error:
        raise MegapromptError(f"site.env: GPU_MEMORY and HOST_MEMORY are numbers of GB ({error})") from error
    return Machines(int(nodes), int(ranks), gpu, host)


@dataclass(frozen=True)
class Fitted:
    """A configuration on the machines of a run."""

    deepspeed: Path | None  # None for whole copies of the backbone
    plans: dict[str, Plan]  # by what is trained; "answers" if nothing is
    together: int = 1  # prompts that are learned of each task

    @property
    def fits(self) -> bool:
        return all(found.fits for found in self.plans.values())

    @property
    def reason(self) -> str:
        """Why it does not fit."""
        return next(reason for found in self.plans.values() for reason in found.reasons)

    @property
    def waves(self) -> int:
        """Of relations, one after the other."""
        return max(found.waves for found in self.plans.values())

    def needs(self) -> Iterator[str]:
        """A line for each plan."""
        for name, found in self.plans.items():
            needs = [f"{gigabytes(found.total(place))} GB of {what}" for place, what in _PLACES if found.total(place)]
            yield f"{name}: a rank of {found.ranks} needs {' and '.join(needs)} memory{arrangement(found)}"


def fitted(
    config: RunConfig,
    templates: Sequence[Template],
    machines: Machines,
    deepspeed: Path | None,
    whole_answers: bool = False,
) -> Fitted:
    """The plans of a run with one configuration.

    Args:
        templates: of the learned prompts, one for each task; the plan is made for the most pseudo tokens.
        whole_answers: whether answers of any length are ranked.

    Raises:
        UsageError: an option cannot work.
    """
    most = max((template.num_pseudo_tokens for template in templates), default=0)
    trained = sorted({_TRAINED[name] for name in config.columns if name in _TRAINED})
    options: dict[str, Any] = {
        "dtype": config.dtype or (_dtype_here() if machines.gpus and torch.cuda.is_available() else None),
        "relation_groups": config.relation_groups,
        "template": f"<{most}>[X][Y]",
        "row_tokens": config.row_tokens,
        "pass_tokens": config.pass_tokens or PASS_TOKENS,
        **machines._asdict(),
    }
    options["gpu_memory"] = machines.gpu_memory or 1.0  # which no plan without GPUs looks at
    if not trained:  # only answers, which need less than learning a few vectors
        asked = PlanConfig(config.backbone, encoder="none", **options)
        return Fitted(deepspeed, {"answers": plan(asked, deepspeed, 1, whole_answers)})
    options |= {"relations": max(1, len(templates)), "encoder": config.encoder}
    for together in _together(config):
        plans: dict[str, Plan] = {
            method: plan(PlanConfig(config.backbone, method=method, **options), deepspeed, together, whole_answers)
            for method in trained
        }
        found = Fitted(deepspeed, plans, together)
        if found.fits:
            break
    return found


def _dtype_here() -> Dtype:
    return cast(Dtype, str(dtype_of(None, torch.device("cuda"))).removeprefix("torch."))


def _together(config: RunConfig) -> list[int]:
    """How many prompts of each task are learned, most first: as `best` does, fewer where they do not fit.

    Each candidate may have folds, which only the data tells.
    """
    if "best" not in config.methods:
        return [1]
    given = getattr(config, "candidates", None)
    return [most * (1 + FOLDS) for most in ([given] if given else [MOST, 1])]


def choose(
    config: RunConfig,
    templates: Sequence[Template],
    machines: Machines,
    before: str | None = None,
    whole_answers: bool = False,
) -> tuple[Fitted, str]:
    """What `--deepspeed auto` takes, and a line that says so.

    Args:
        before: what the run had when it was interrupted, "none" or a file; taken again if it fits, so that it goes on
            exactly.

    Raises:
        MegapromptError: nothing fits.
    """
    first = [] if before is None else [None if before == "none" else Path(before)]
    others = [] if config.control is not None else [path for path in _SHARDED if _has_its_disk(path)]
    too_large: list[str] = []
    for deepspeed in dict.fromkeys([*first, None, *others]):
        found = fitted(config, templates, machines, deepspeed, whole_answers)
        what = "whole copies" if deepspeed is None else deepspeed.stem
        if found.fits:
            why = f", since {' and '.join(too_large)} would be too large" if too_large else ""
            needs = "; ".join(found.needs())
            return found, f"--deepspeed auto takes {what.replace('copies', 'copies of the backbone')}{why}: {needs}"
        too_large.append(what)
    raise MegapromptError(
        f"--deepspeed auto: nothing fits, {what} neither ({found.reason}); `megaprompt plan` tells which nodes and "
        f"GPUs suffice"
    )


def _has_its_disk(path: Path) -> bool:
    """Whether the directory that a configuration offloads to is there, if it has one."""
    sharding = read_deepspeed_config(path).sharding or {}
    where = sharding["zero_optimization"].get("offload_param", {}).get("nvme_path")
    return where is None or Path(where).is_dir()


def settled(
    config: RunConfig, templates: Sequence[Template], world: World, before: str | None, whole_answers: bool
) -> tuple[Path | None, str]:
    """The configuration that a run with `--deepspeed auto` takes, the same on all ranks, and a line that says so.

    Raises:
        MegapromptError: on all ranks, if nothing fits.
    """
    assert config.deepspeed == AUTO
    machines = Machines.of(world)
    found: tuple[Path | None, str] | MegapromptError | None = None
    if world.is_main:
        try:
            chosen, line = choose(config, templates, machines, before, whole_answers)
            found = (chosen.deepspeed, line)
        except MegapromptError as error:
            found = error
    found = world.gather(found)[0]
    if isinstance(found, MegapromptError):
        raise found
    return cast(tuple[Path | None, str], found)


def on_nodes(backbone: str, sharding: dict[str, Any], dtype: torch.dtype, world: World) -> dict[str, Any]:
    """The configuration of a frozen backbone, which each node holds whole if there are several with room for it. All
    ranks must call it.

    Raises:
        UsageError: there is no such backbone.
    """
    machines = Machines.of(world)
    # Nothing is gathered between nodes; or on CPUs, or with other numbers of ranks on other nodes.
    if machines.nodes < 2 or machines.nodes * machines.gpus != world.size:
        return sharding
    weights, memory = inspect_backbone(backbone)[1] * dtype.itemsize, min(world.gather(world.memory()))
    zero = sharding["zero_optimization"]
    return sharding | {"zero_optimization": whole_on_each_node(zero, machines.nodes, machines.gpus, weights, memory)}
