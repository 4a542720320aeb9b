"""What can be known to be wrong before the backbone is loaded: `megaprompt probe ... --check`.

It takes seconds and one process, so a job script runs it on the login node and again before it starts all ranks.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import AutoModelForCausalLM

from megaprompt.backbone import dtype_of, inspect_backbone, read_config
from megaprompt.backbone.packed import language_model
from megaprompt.config import PASS_TOKENS, PlanConfig, RunConfig
from megaprompt.config.options import Dtype
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.prompt_encoder import number_of_parameters
from megaprompt.prompting.recipe import RECIPES, chosen
from megaprompt.prompting.template import Template
from megaprompt.resources.plan import Plan, arrangement, plan
from megaprompt.resources.predict import Place
from megaprompt.resources.profile import Method
from megaprompt.run.directory import RunDirectory
from megaprompt.run.material import Material, ReadMaterial

logger = logging.getLogger(__name__)

_PLACES: tuple[tuple[Place, str], ...] = (("device", "GPU"), ("host", "host"))
_COPIES = 3  # of a checkpoint on the disk at once, while a new one is written


def preflight(config: RunConfig, read: ReadMaterial) -> None:
    """Make every check and print a line for each.

    Args:
        read: reads what is asked.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: something else is wrong.
    """
    checks = _Checks(config, read)
    errors: list[MegapromptError] = []
    for name in _Checks.ORDER:
        if name == "memory" and errors:  # it would only say the same again
            continue
        try:
            print(f"ok    {name:9} {getattr(checks, name)()}", flush=True)
        except MegapromptError as error:
            print(f"WRONG {name:9} {error}", flush=True)
            errors.append(error)
    if errors:
        kind = UsageError if any(isinstance(error, UsageError) for error in errors) else MegapromptError
        raise kind(f"{len(errors)} of {len(_Checks.ORDER)} checks failed; nothing was started. First: {errors[0]}")


class _Checks:
    """The checks, in order; each returns a line about what it has seen, and leaves to later ones what it found out."""

    ORDER = ("versions", "options", "backbone", "data", "disk", "memory")

    def __init__(self, config: RunConfig, read: ReadMaterial) -> None:
        self.config, self._read = config, read
        self.material: Material | None = None  # this and the others as far as they are known
        self.hidden_size = 0
        self.causal = True

    def versions(self) -> str:
        names = ("torch", "transformers", *(("deepspeed",) if self.config.deepspeed else ()))
        try:
            found = [f"{name} {importlib.import_module(name).__version__}" for name in names]
        except ImportError as error:
            raise MegapromptError(f"{error}; install the requirements") from error
        return ", ".join([f"python {sys.version.split()[0]}", *found, f"{torch.cuda.device_count()} GPU(s) here"])

    def options(self) -> str:
        config = self.config
        recipe = chosen(RECIPES[config.recipe], config.recipe_options())
        if config.deepspeed is not None:
            read_deepspeed_config(config.deepspeed)
        about = [f"{config.recipe} recipe, batch of {recipe.batch_size}"]
        if config.trains_weights:
            about.append(f"weights of the model are trained as in the paper, at {config.fine_tuning_rate:g}")
        return ", ".join([*about, str(config.deepspeed or "no ZeRO")])

    def backbone(self) -> str:
        self.hidden_size, about = inspect_backbone(self.config.backbone)
        self.causal = language_model(read_config(self.config.backbone)) is AutoModelForCausalLM
        return about

    def data(self) -> str:
        self.material = self._read()
        texts = list(dict.fromkeys(template.text for template in self.material.templates(self.causal).values()))
        prompts = f"learned prompts {texts[0]}" + (f" and {len(texts) - 1} others" if len(texts) > 1 else "")
        return f"{self.material.describe()}; {prompts}"

    @property
    def templates(self) -> list[Template]:
        """Of the learned prompts, one for each task."""
        return [] if self.material is None else list(self.material.templates(self.causal).values())

    def disk(self) -> str:
        config = self.config
        RunDirectory.open(config)
        where = config.out.absolute()
        while not where.exists():
            where = where.parent
        try:
            with tempfile.TemporaryFile(dir=where) as file:
                file.write(b"megaprompt")
        except OSError as error:
            raise MegapromptError(f"--out {config.out}: cannot write into {where} ({error.strerror})") from error
        needed = 0
        for template in self.templates if self.hidden_size and {"p-tuning", "best"} & set(config.columns) else ():
            parameters = number_of_parameters(template.num_pseudo_tokens, self.hidden_size, config.encoder)
            # With Adam's two averages, in single precision.
            needed += _COPIES * 3 * 4 * parameters * _candidates(config)
        free = shutil.disk_usage(where).free
        about = f"{config.out}: {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} GB"
        if free < needed:
            raise MegapromptError(f"--out {about}; free space, or choose another directory or fewer --relations")
        return about

    def memory(self) -> str:
        training: dict[str, Method] = dict.fromkeys(("p-tuning", "best"), "p-tuning")
        training |= {"autoprompt": "p-tuning"}  # whose search needs no more
        training |= dict.fromkeys(("fine-tuning", "manual+fine-tuning", "p-tuning+fine-tuning", "pet"), "fine-tuning")
        lines = []
        for method in sorted({training[name] for name in self.config.columns if name in training}):
            found = _plan_here(self.config, method, self.templates, self.config.deepspeed)
            needs = [f"{found.total(place) / 1e9:.1f} GB of {what}" for place, what in _PLACES if found.total(place)]
            lines.append(f"{method}: a rank of {found.ranks} needs {' and '.join(needs)} memory{arrangement(found)}")
            if not found.fits and not _is_login_node():
                raise MegapromptError(
                    f"{lines[-1]}; {found.reasons[0]}; `megaprompt plan` tells which configuration, nodes and GPUs "
                    f"suffice"
                )
            sharded = found.fits and method == "p-tuning" and self.config.deepspeed is not None
            if sharded and _plan_here(self.config, method, self.templates, None).fits:
                lines[-1] += "; whole copies of the backbone fit as well and are faster: leave --deepspeed out"
        if not lines:
            return "nothing is trained"
        return "; ".join(lines) + (" (judged in the job, where the machines are known)" if _is_login_node() else "")


def _is_login_node() -> bool:
    return bool(os.environ.get("MEGAPROMPT_LOGIN_NODE"))  # set by slurm/common.sh where it submits


def _candidates(config: RunConfig) -> int:
    """How many prompts of each task must be learned at once. (`best` takes more where they fit.)"""
    return (getattr(config, "candidates", None) or 1) if "best" in config.methods else 1


def _plan_here(config: RunConfig, method: Method, templates: Sequence[Template], deepspeed: Path | None) -> Plan:
    """The plan of a run on the machines of this job, or on this machine.

    Args:
        templates: of the learned prompts, one for each task; the plan is made for the most pseudo tokens.
        deepspeed: the configuration; None for whole copies of the backbone.
    """
    most = max((template.num_pseudo_tokens for template in templates), default=0)
    ranks = int(os.environ.get("SLURM_NTASKS") or os.environ.get("WORLD_SIZE") or 1)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    per_node = -(-ranks // nodes)
    given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) << 20
    host = (given or psutil.virtual_memory().available) / 1e9
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machines: dict[str, Any] = (
        {"nodes": nodes, "gpus": per_node, "gpu_memory": torch.cuda.mem_get_info()[0] / 1e9, "host_memory": host}
        if device.type == "cuda"
        else {"nodes": ranks, "gpus": 0, "host_memory": host / per_node}  # each rank as a node with its share
    )
    return plan(
        PlanConfig(
            config.backbone,
            method=method,
            deepspeed=deepspeed,
            dtype=config.dtype or cast(Dtype, str(dtype_of(None, device)).removeprefix("torch.")),
            relations=max(1, len(templates)) * _candidates(config),
            relation_groups=config.relation_groups,
            template=f"<{most}>[X][Y]",
            encoder=config.encoder,
            row_tokens=config.row_tokens,
            pass_tokens=config.pass_tokens or PASS_TOKENS,
            **machines,
        ),
        deepspeed,
    )
