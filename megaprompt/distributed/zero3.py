"""ZeRO-3: the frozen backbone is partitioned over the ranks, and gathered layer by layer while it computes.

Without an optimizer, DeepSpeed's stage 3 keeps parameters only: there is no gradient or optimizer memory for a frozen
backbone. Its hooks sit on the module itself, so the sharded backbone is called exactly like a plain one. Parameters can
be offloaded to host memory or NVMe; which, is up to the DeepSpeed configuration (see ds_configs/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from megaprompt.distributed.operators import prefer_cpu_without_gpu


def shard(
    model: nn.Module,
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
) -> Any:
    """Let a module whose parameters came from `load_sharded` gather them while it computes; returns DeepSpeed's engine.

    From here on only passes through `model(...)` may touch the parameters, and every rank must make the same number of
    them.

    Args:
        optimizer: of the module's parameters, if they are trained. ZeRO-3 then partitions its state as well.
        clip: the largest norm of their gradients together.
    """
    prefer_cpu_without_gpu()
    import deepspeed

    # Of its own accord DeepSpeed would clip gradients to a norm of 1, and insist on its own Adam in host memory.
    config = config | {"gradient_clipping": clip or 0.0, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    object.__setattr__(model, "engine", engine)  # keeps it alive without making it a submodule
    return engine


def release(model: nn.Module) -> None:
    """Let go of a module that `shard` was given. All ranks must call it; a module that is not sharded is left alone.

    Afterwards it is freed like any other object, with its engine, optimizer and partitions, once nobody else refers to
    it. (They refer to each other, so call `gc.collect()` then.)

    DeepSpeed of its own accord keeps every module that it ever sharded: on a global stack that `destroy` does not
    clear (its issues 5674 and 7204).
    """
    engine = vars(model).pop("engine", None)
    if engine is None:
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    engine.destroy()
    own = set(model.modules())  # of which an interrupted pass leaves some there
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in own]


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within this context the parameters can be read, sharded or not. All ranks must enter it together."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
