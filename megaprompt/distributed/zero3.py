"""ZeRO-3: the frozen backbone is partitioned over the ranks, and gathered layer by layer while it computes.

Without an optimizer, DeepSpeed's stage 3 keeps parameters only: there is no gradient or optimizer memory for a frozen
backbone. Its hooks sit on the module itself, so the sharded backbone is called exactly like a plain one. Parameters can
be offloaded to host memory or NVMe; which, is up to the DeepSpeed configuration (see ds_configs/README.md).
"""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from megaprompt.config import find_configuration
from megaprompt.distributed.loss_scale import LossScale
from megaprompt.errors import MegapromptError, UsageError

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)

_KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "fp16",
    "bf16", "aio", "comms_logger", "communication_data_type", "data_types", "dump_state", "memory_breakdown",
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Top-level keys of a DeepSpeed configuration that mean something, or do no harm, for a frozen backbone."""

PRECISION_SECTIONS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {},
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True}},
}
"""How DeepSpeed is told a type. (0.19 does not listen to `zero.Init(dtype=...)` where float16 is not supported.)"""

_STALE_SECONDS = 180  # without a change to any file of an operator's build directory


# ------------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What a DeepSpeed configuration says about a frozen backbone."""

    sharding: dict[str, Any] | None = None  # what DeepSpeed gets; None for a whole copy of the backbone on every rank
    dtype: torch.dtype | None = None  # of the backbone, if the configuration says
    loss_scale: LossScale = field(default_factory=LossScale)  # for float16
    precision: dict[str, Any] = field(default_factory=dict)  # the sections bf16 and fp16

    def for_training(self, dtype: torch.dtype) -> dict[str, Any] | None:
        """What DeepSpeed gets for a backbone of this type that is trained; None if it is not sharded.

        Weights in half precision then have float32 copies, to which the steps are added.
        """
        return None if self.sharding is None else self.sharding | PRECISION_SECTIONS[dtype] | self.precision


def read_deepspeed_config(path: Path) -> DeepSpeedSettings:
    """Read and check a DeepSpeed configuration.

    Raises:
        UsageError: it cannot be read, is not JSON, has unknown keys or wrong values, or asks for something that is no
            use for a frozen backbone.
    """
    option = f"--deepspeed {path}"
    path = find_configuration(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed {path}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{option}: expected a JSON object")
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        if key in config:
            raise UsageError(f"{option}: remove {key}; only prompts are trained, with their own Adam")
    for key in config:
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            raise UsageError(f"{option}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 3):
        raise UsageError(
            f"{option}: zero_optimization.stage is {stage}; set it to 3, which shards parameters (a frozen backbone "
            f"has nothing else to shard), or to 0 for a whole copy on every rank"
        )
    offload = zero.get("offload_param")
    if stage == 0 and offload:
        raise UsageError(f"{option}: offload_param needs zero_optimization.stage 3")
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise UsageError(f"{option}: fp16 and bf16 are both enabled; disable one")
    _check_values(option, config)
    if offload and offload.get("device") == "nvme":
        if not offload.get("nvme_path"):
            raise UsageError(f"{option}: offload_param.nvme_path is missing; name a directory on a local disk")
        for key in ("stage3_max_reuse_distance", "stage3_max_live_parameters"):
            if zero.get(key) != 0:  # what is kept gathered keeps its swap buffer; without a free one, DeepSpeed stops
                raise UsageError(f"{option}: set {key} to 0, or NVMe offload runs out of swap buffers")
    fp16, bf16 = config.get("fp16", {}), config.get("bf16", {})
    # The precision is the model's own from the start, and the loss scale belongs to the training of the prompts.
    sharding = {key: value for key, value in config.items() if key not in ("fp16", "bf16")}
    return DeepSpeedSettings(
        sharding if stage == 3 else None,
        torch.float16 if fp16.get("enabled") else torch.bfloat16 if bf16.get("enabled") else None,
        LossScale(
            scale=fp16.get("loss_scale", 0) or 2.0 ** fp16.get("initial_scale_power", 16),
            dynamic=not fp16.get("loss_scale", 0),
            window=fp16.get("loss_scale_window", 1000),
            hysteresis=fp16.get("hysteresis", 2),
            minimum=fp16.get("min_loss_scale", 1),
        ),
        {key: config[key] for key in ("fp16", "bf16") if key in config},
    )


def _check_values(option: str, config: dict[str, Any]) -> None:
    """Let DeepSpeed's own schemas judge the sections."""
    prefer_cpu_without_gpu()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    schemas = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for section, schema in schemas.items():
        try:
            schema(**config.get(section, {}))
        except (ValidationError, TypeError) as error:
            if not isinstance(error, ValidationError):
                raise UsageError(f"{option}: {section} must be a JSON object") from error
            first = error.errors()[0]
            where = ".".join(map(str, (section, *first["loc"])))
            raise UsageError(f"{option}: {where}: {first['msg']}") from error


# ------------------------------------------------------------------------------------------------------------- loading


def shard(model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Let a module whose parameters came from `load_sharded` gather them while it computes; returns DeepSpeed's engine.

    From here on only passes through `model(...)` may touch the parameters, and every rank must make the same number of
    them.

    Args:
        optimizer: of the module's parameters, if they are trained. ZeRO-3 then partitions its state as well.
    """
    prefer_cpu_without_gpu()
    import deepspeed

    # Of its own accord DeepSpeed would clip gradients to a norm of 1, and insist on its own Adam in host memory.
    config = config | {"gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    object.__setattr__(model, "engine", engine)  # keeps it alive without making it a submodule
    return engine


def release(model: nn.Module) -> None:
    """Let go of a module that was sharded."""


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within this context the parameters can be read, sharded or not. All ranks must enter it together."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


# ----------------------------------------------------------------------------------------------------------- operators


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
