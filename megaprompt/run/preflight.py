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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from megaprompt.backbone import inspect_backbone, read_config
from megaprompt.backbone.packed import language_model
from megaprompt.config import PlanConfig, ProbeConfig
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.recipe import RECIPES, chosen
from megaprompt.prompting.template import Template, default_template
from megaprompt.resources.plan import Plan, plan
from megaprompt.resources.predict import Method, Place
from megaprompt.run.directory import RunDirectory
from megaprompt.tasks.lama.facts import load_data, read_vocabulary

logger = logging.getLogger(__name__)

_PLACES: tuple[tuple[Place, str], ...] = (("device", "GPU"), ("host", "host"))
_COPIES = 3  # of a checkpoint on the disk at once, while a new one is written


def preflight(config: ProbeConfig) -> None:
    """Make every check and print a line for each.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: something else is wrong.
    """
    pseudo_tokens = hidden_size = relations = 0  # as far as the checks find out

    def versions() -> str:
        names = ("torch", "transformers", *(("deepspeed",) if config.deepspeed else ()))
        try:
            found = [f"{name} {importlib.import_module(name).__version__}" for name in names]
        except ImportError as error:
            raise MegapromptError(f"{error}; install the requirements") from error
        return ", ".join([f"python {sys.version.split()[0]}", *found, f"{torch.cuda.device_count()} GPU(s) here"])

    def options() -> str:
        nonlocal pseudo_tokens
        recipe = chosen(RECIPES[config.recipe], config.recipe_options())
        if config.template is not None:
            pseudo_tokens = Template.parse(config.template).num_pseudo_tokens
        if config.deepspeed is not None:
            from megaprompt.distributed.zero3 import read_deepspeed_config

            read_deepspeed_config(config.deepspeed)
        about = config.template or "the paper's template"
        return f"{about}, {config.recipe} recipe, batch of {recipe.batch_size}, {config.deepspeed or 'no ZeRO'}"

    def backbone() -> str:
        nonlocal hidden_size, pseudo_tokens
        hidden_size, about = inspect_backbone(config.backbone)
        if config.template is None:
            causal = language_model(read_config(config.backbone)) is AutoModelForCausalLM
            pseudo_tokens = Template.parse(default_template(causal)).num_pseudo_tokens
        return about

    def data() -> str:
        nonlocal relations
        found = load_data(config.data)
        chosen = found.select(config.relations)
        relations = len(chosen)
        if config.vocab not in ("auto", "none"):
            read_vocabulary(Path(config.vocab))
        counts = (f"{sum(len(r.facts[split]) for r in chosen)} {split}" for split in ("train", "dev", "test"))
        return f"{found.name}, {relations} relation(s), {', '.join(counts)} facts"

    def disk() -> str:
        RunDirectory.open(config)
        where = config.out.absolute()
        while not where.exists():
            where = where.parent
        try:
            with tempfile.TemporaryFile(dir=where) as file:
                file.write(b"megaprompt")
        except OSError as error:
            raise MegapromptError(f"--out {config.out}: cannot write into {where} ({error.strerror})") from error
        with torch.device("meta"):
            encoder = PromptEncoder(pseudo_tokens, hidden_size, config.encoder) if hidden_size else torch.nn.Module()
        # Parameters and Adam's two averages, in single precision.
        one = 3 * 4 * sum(p.numel() for p in encoder.parameters())
        needed = _COPIES * relations * one if "p-tuning" in config.methods else 0
        free = shutil.disk_usage(where).free
        about = f"{config.out}: {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} GB"
        if free < needed:
            raise MegapromptError(f"--out {about}; free space, or choose another directory or fewer --relations")
        return about

    def memory() -> str:
        training: dict[str, Method] = {"p-tuning": "p-tuning", "fine-tuning": "fine-tuning"}
        training |= {"manual+fine-tuning": "fine-tuning", "autoprompt": "p-tuning"}  # whose search needs no more
        lines = []
        for method in sorted({training[name] for name in config.methods if name in training}):
            needed = _plan_here(config, method, max(1, relations))
            needs = [f"{needed.total(place) / 1e9:.1f} GB of {what}" for place, what in _PLACES if needed.total(place)]
            lines.append(f"{method}: a rank of {needed.ranks} needs {' and '.join(needs)} memory")
            for place, what in _PLACES:
                if not _is_login_node() and needed.total(place) > needed.available[place]:
                    raise MegapromptError(
                        f"{lines[-1]}, and there are {needed.available[place] / 1e9:.1f} GB of {what} memory for it; "
                        f"`megaprompt plan` tells which configuration, nodes and GPUs suffice"
                    )
        if not lines:
            return "nothing is trained"
        return "; ".join(lines) + (" (judged in the job, where the machines are known)" if _is_login_node() else "")

    checks: tuple[Callable[[], str], ...] = (versions, options, backbone, data, disk, memory)
    errors: list[MegapromptError] = []
    for check in checks:
        if check is memory and errors:  # it would only say the same again
            continue
        try:
            print(f"ok    {check.__name__:9} {check()}", flush=True)
        except MegapromptError as error:
            print(f"WRONG {check.__name__:9} {error}", flush=True)
            errors.append(error)
    if errors:
        kind = UsageError if any(isinstance(error, UsageError) for error in errors) else MegapromptError
        raise kind(f"{len(errors)} of {len(checks)} checks failed; nothing was started. First: {errors[0]}")


def _is_login_node() -> bool:
    return bool(os.environ.get("MEGAPROMPT_LOGIN_NODE"))  # set by slurm/common.sh where it submits


def _plan_here(config: ProbeConfig, method: Method, relations: int) -> Plan:
    """The plan of a run on the machines of this job, or on this machine."""
    ranks = int(os.environ.get("SLURM_NTASKS") or os.environ.get("WORLD_SIZE") or 1)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    per_node = -(-ranks // nodes)
    given = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) << 20
    host = (given or psutil.virtual_memory().available) / 1e9
    gpus = torch.cuda.is_available()
    machines: dict[str, Any] = (
        {"nodes": nodes, "gpus": per_node, "gpu_memory": torch.cuda.mem_get_info()[0] / 1e9, "host_memory": host}
        if gpus
        else {"nodes": ranks, "gpus": 0, "host_memory": host / per_node}  # each rank as a node with its share
    )
    return plan(
        PlanConfig(
            config.backbone,
            method=method,
            deepspeed=config.deepspeed,
            dtype=config.dtype,
            relations=relations,
            relation_groups=config.relation_groups,
            template=config.template,
            encoder=config.encoder,
            row_tokens=config.row_tokens,
            pass_tokens=config.pass_tokens,
            **machines,
        ),
        config.deepspeed,
    )
