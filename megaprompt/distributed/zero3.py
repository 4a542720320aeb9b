"""ZeRO-3: the frozen backbone is partitioned over the ranks, and gathered layer by layer while it computes.

Without an optimizer, DeepSpeed's stage 3 keeps parameters only: there is no gradient or optimizer memory for a frozen
backbone. Its hooks sit on the module itself, so the sharded backbone is called exactly like a plain one.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from megaprompt.backbone import CausalBackbone
from megaprompt.errors import UsageError

logger = logging.getLogger(__name__)


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        UsageError: it cannot be read, is not JSON, or asks for a ZeRO stage that is no use for a frozen backbone.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--deepspeed {path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed {path}:{error.lineno}: not valid JSON ({error.msg})") from error
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    if stage != 3:
        raise UsageError(
            f"--deepspeed {path}: zero_optimization.stage is {stage}; set it to 3, which shards parameters "
            f"(a frozen backbone has nothing else to shard), or leave --deepspeed out"
        )
    if "optimizer" in config:
        raise UsageError(f"--deepspeed {path}: remove the optimizer; only prompts are trained, with their own Adam")
    return config


def shard(backbone: CausalBackbone, config: dict[str, Any]) -> Any:
    """Partition the backbone's parameters over all ranks, in place. Keep the returned engine as long as the backbone.

    The process group must exist. From here on only passes through `backbone(...)` may touch the parameters, and every
    rank must make the same number of them.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    engine, *_ = deepspeed.initialize(model=backbone, config=config)
    return engine
