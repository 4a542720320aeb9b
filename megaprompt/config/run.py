"""What every command that asks a model, and trains prompts or the model for that, can be told.

No `from __future__ import annotations` here: cyclopts would look up inherited types by name in the inheriting module.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cyclopts import Parameter

from megaprompt.config.options import (
    ROW_TOKENS,
    Dtype,
    Encoder,
    Flag,
    Names,
    Number,
    NumberOrNone,
    Whole,
    WholeOrNone,
    above_zero,
)
from megaprompt.config.shipped import AUTO
from megaprompt.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that such commands share. What is asked, and in which ways, each says itself."""

    METHODS: ClassVar[tuple[str, ...]] = ()
    """Ways to ask that `methods` may name."""

    PARTS: ClassVar[str] = ""
    """The option that names what is asked about; runs that differ in nothing else are parts of one."""

    backbone: str = "smollm2-135m"
    """The model: smollm2-135m (packaged), a transformers name or directory, or a .gguf file."""
    data: str
    """What is asked."""
    out: Path = Path("runs/run")
    """Directory of this run. It must not hold another run."""
    methods: Names = ("manual", "p-tuning")
    """What to compare."""
    encoder: Encoder = "lstm"
    """Prompt encoder: lstm (the paper's), mlp, or none (the vectors themselves are trained)."""
    recipe: Literal["fast", "paper"] = "fast"
    """Preset of the six options that follow. 'paper' has the settings of the paper's code and is much slower."""
    learning_rate: NumberOrNone = None
    """Adam's learning rate."""
    weight_decay: NumberOrNone = None
    """Adam's weight decay."""
    batch_size: WholeOrNone = None
    """Facts (examples) per relation (task) and step."""
    max_epochs: WholeOrNone = None
    """Train each relation (task) for at most this many epochs."""
    max_steps: WholeOrNone = None
    """Train each relation (task) for at most this many steps; the learning rate then falls linearly to zero."""
    patience: WholeOrNone = None
    """Stop a relation (task) when dev was scored this many times without a better score: every 25 steps with the recipe
    'fast', else after every epoch."""
    control: Literal["random-weights"] | None = None
    """Do all the same with another model, to see what is learned from the facts alone: random-weights is the same
    architecture with random weights, which knows nothing."""
    fine_tuning_rate: Number = 5e-6
    """Adam's learning rate of the two methods that fine-tune. They take batch size, epochs, steps and patience from the
    options above where these are given, and otherwise from the paper's code."""
    seed: Whole = 0
    """Everything random follows from this number."""
    dtype: Dtype | None = None
    """Precision of the backbone. If not given: what the DeepSpeed configuration says, else bfloat16 on a GPU that
    computes with it, float32 on others and on a CPU. Prompts are always trained in float32."""
    deepspeed: Path | None = None
    """DeepSpeed configuration, a file or one that comes with megaprompt, such as zero3 (see ds_configs/): shard the
    backbone over the ranks. Plain PyTorch if not given. auto: whole copies where they fit, else ZeRO-3, else with
    offload to host memory, or to NVMe if the directory that zero3_nvme_offload names is there."""
    relation_groups: WholeOrNone = None
    """Divide the ranks into this many groups, each of which trains some of the relations (tasks). Does not change
    results. If not given: as many as there are ranks, or fewer where that would leave some without work."""
    row_tokens: Whole = ROW_TOKENS
    """Width of packed rows. Changes speed and memory, not results."""
    pass_tokens: WholeOrNone = None
    """Tokens that the backbone computes at once on each rank. Changes speed and memory, not results. If not given:
    1024, and on GPUs as many, up to 16384, as fit into a quarter of the memory that is left."""
    resume: Flag = False
    """Continue the interrupted run in the directory --out, with the options that it was started with."""
    check: Flag = False
    """Only see whether the run could start: versions, options, backbone, data, disk, memory. No weights are loaded, and
    nothing is written."""

    def __post_init__(self) -> None:
        if self.control is not None and self.deepspeed not in (None, AUTO):
            raise UsageError(f"--control {self.control}: is not for --deepspeed; leave one of them out")
        for method in self.methods:
            if method not in self.METHODS:
                raise UsageError(f"--methods {method}: unknown; choose from {', '.join(self.METHODS)}")
        above_zero(self, "relation_groups", "row_tokens", "pass_tokens", "learning_rate", "batch_size", "max_epochs")
        above_zero(self, "max_steps", "patience", "fine_tuning_rate")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UsageError(f"--weight-decay {self.weight_decay}: give 0 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        """`methods` as results call them."""
        return self.methods

    @property
    def trains_weights(self) -> bool:
        """Whether a method trains the backbone's own weights."""
        return any("fine-tuning" in column or column == "pet" for column in self.columns)

    def recipe_options(self) -> dict[str, Any]:
        """What was given for the recipe that `recipe` names."""
        return self._given("learning_rate", "weight_decay", "batch_size", "max_epochs", "max_steps", "patience")

    def fine_tuning_options(self) -> dict[str, Any]:
        """What was given for the recipe of the methods that fine-tune."""
        return {"learning_rate": self.fine_tuning_rate} | self._given(
            "batch_size", "max_epochs", "max_steps", "patience"
        )

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}
