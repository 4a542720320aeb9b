"""What can be known to be wrong before the backbone is loaded: `megaprompt probe ... --check`.

It takes seconds and one process, so a job script runs it on the login node and again before it starts all ranks.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import cached_property

import torch

from megaprompt.backbone import inspect_backbone, is_causal
from megaprompt.config import AUTO, RunConfig
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.prompt_encoder import number_of_parameters
from megaprompt.prompting.recipe import RECIPES, chosen
from megaprompt.prompting.template import Template
from megaprompt.run.directory import RunDirectory
from megaprompt.run.fitting import Fitted, Machines, choose, fitted
from megaprompt.run.material import Material, ReadMaterial

logger = logging.getLogger(__name__)

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
        self.embedding_size = self.parameters = 0
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
        if config.deepspeed not in (None, AUTO):
            read_deepspeed_config(config.deepspeed)
        about = [f"{config.recipe} recipe, batch of {recipe.batch_size}"]
        if config.trains_weights:
            about.append(f"weights of the model are trained as in the paper, at {config.fine_tuning_rate:g}")
        sharding = "ZeRO if the plan says so" if config.deepspeed == AUTO else str(config.deepspeed or "no ZeRO")
        return ", ".join([*about, sharding])

    def backbone(self) -> str:
        self.embedding_size, self.parameters, about = inspect_backbone(self.config.backbone)
        self.causal = is_causal(self.config.backbone)
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

    @property
    def whole_answers(self) -> bool:
        return self.material is not None and self.material.whole_answers

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
        if self.embedding_size and {"p-tuning", "best"} & set(config.columns):
            # With Adam's two averages, in single precision, of the tasks of one wave.
            sizes = sorted((3 * 4 * self._parameters(template) for template in self.templates), reverse=True)
            waves = 1 if self._known is None else self._known.waves
            of_wave = -(-len(sizes) // waves)
            together = 1 if self._known is None else self._known.together
            needed = _COPIES * sum(sizes[:of_wave]) * together
        if config.deepspeed == AUTO:
            whole_copies = self._known is not None and self._known.deepspeed is None
        else:
            whole_copies = config.deepspeed is None
        if config.trains_weights and whole_copies:  # sharded weights are not saved
            # Float32 weights, Adam's two averages, and the weights that were best on dev.
            needed = max(needed, _COPIES * 4 * 4 * self.parameters)
        free = shutil.disk_usage(where).free
        about = f"{config.out}: {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} GB"
        if free < needed:
            raise MegapromptError(f"--out {about}; free space, or choose another directory or fewer --relations")
        return about

    def _parameters(self, template: Template) -> int:
        """Of the encoder of a learned prompt."""
        return number_of_parameters(template.num_pseudo_tokens, self.embedding_size, self.config.encoder)

    @cached_property
    def _machines(self) -> Machines | None:
        return Machines.of_job()

    def _fitted(self) -> tuple[Fitted, str]:
        """The plans, and a line about them. Only where the machines are known.

        Raises:
            MegapromptError: nothing fits.
        """
        assert self._machines is not None
        if self.config.deepspeed == AUTO:
            return choose(self.config, self.templates, self._machines, whole_answers=self.whole_answers)
        found = fitted(self.config, self.templates, self._machines, self.config.deepspeed, self.whole_answers)
        return found, "; ".join(found.needs())

    @cached_property
    def _known(self) -> Fitted | None:
        """The plans, if the machines are known and something fits; else the check of memory tells."""
        with suppress(MegapromptError):
            return None if self._machines is None else self._fitted()[0]
        return None

    def memory(self) -> str:
        if self._machines is None:
            return "judged in the job, where the machines are known (here with GPU_MEMORY and HOST_MEMORY in site.env)"
        found, about = self._fitted()
        if self.config.deepspeed == AUTO:
            return about
        if not found.fits:
            raise MegapromptError(
                f"{about}; {found.reason}; `megaprompt plan` tells which configuration, nodes and GPUs suffice"
            )
        sharded = self.config.deepspeed is not None and "fine-tuning" not in found.plans
        if sharded and fitted(self.config, self.templates, self._machines, None, self.whole_answers).fits:
            about += "; whole copies of the backbone fit as well and are faster: leave --deepspeed out"
        return about
