"""DeepSpeed configurations: read, checked, and divided into what concerns weights, precision and loss scale."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaprompt.config import find_configuration, shipped_configurations
from megaprompt.distributed.loss_scale import LossScale
from megaprompt.distributed.operators import prefer_cpu_without_gpu
from megaprompt.errors import UsageError

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
        shipped = ", ".join(path.stem for path in shipped_configurations())
        raise UsageError(f"{option}: cannot be read ({error}); give a file, or one of {shipped}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed {path}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{option}: expected a JSON object")
    _check_keys(option, config)
    _check_zero(option, config)
    _check_values(option, config)
    _check_nvme(option, config.get("zero_optimization", {}))
    fp16, bf16 = config.get("fp16", {}), config.get("bf16", {})
    # The model has its precision from the start, and the loss scale belongs to the training of the prompts.
    sharding = {key: value for key, value in config.items() if key not in ("fp16", "bf16")}
    return DeepSpeedSettings(
        sharding if config.get("zero_optimization", {}).get("stage") == 3 else None,
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


def whole_on_each_node(
    zero: dict[str, Any], nodes: int, ranks_of_node: int, weights: float, memory: float
) -> dict[str, Any]:
    """The section `zero_optimization` for a frozen backbone, which each node also holds whole if there is room, a share
    on each of its ranks: then nothing is gathered between nodes (hpZ of ZeRO++, arXiv 2306.10209, section 3.2).

    Offloaded weights stay as they are, and so does what the configuration says itself.

    Args:
        weights: bytes of the backbone.
        memory: bytes that each rank has, of which the second share may take a quarter.
    """
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    if nodes < 2 or ranks_of_node < 2 or offloaded or _OF_NODE in zero or weights / ranks_of_node > memory / 4:
        return zero
    return zero | {_OF_NODE: ranks_of_node}


_OF_NODE = "zero_hpz_partition_size"


def _check_keys(option: str, config: dict[str, Any]) -> None:
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        if key in config:
            raise UsageError(f"{option}: remove {key}; only prompts are trained, with their own Adam")
    for key in config:
        if key not in _KNOWN:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            raise UsageError(f"{option}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))


def _check_zero(option: str, config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed allows, but is no use for a frozen backbone."""
    for section in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise UsageError(f"{option}: {section} is {json.dumps(config[section])}; give an object of settings")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 3):
        raise UsageError(
            f"{option}: zero_optimization.stage is {stage}; set it to 3, which shards parameters (a frozen backbone "
            f"has nothing else to shard), or to 0 for a whole copy on every rank"
        )
    if stage == 0 and zero.get("offload_param"):
        raise UsageError(f"{option}: offload_param needs zero_optimization.stage 3")
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise UsageError(f"{option}: fp16 and bf16 are both enabled; disable one")


def _check_nvme(option: str, zero: dict[str, Any]) -> None:
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    if not offload.get("nvme_path"):
        raise UsageError(f"{option}: offload_param.nvme_path is missing; name a directory on a local disk")
    for key in ("stage3_max_reuse_distance", "stage3_max_live_parameters"):
        if zero.get(key) != 0:  # what is kept gathered keeps its swap buffer; without a free one, DeepSpeed stops
            raise UsageError(f"{option}: set {key} to 0, or NVMe offload runs out of swap buffers")


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
