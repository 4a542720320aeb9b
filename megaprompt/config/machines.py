"""What the commands about memory can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from megaprompt.config.options import (
    PASS_TOKENS,
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
from megaprompt.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Tell what a run will need in memory, on given machines, before anything is loaded."""

    backbone: str = field(kw_only=False)
    """bert-base, bert-large, roberta-base, roberta-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, megatron-11b, or a
    transformers name or directory, of which only config.json is read."""
    method: Literal["p-tuning", "fine-tuning"] = "p-tuning"
    """What is trained: prompts, or the whole model. (manual+fine-tuning needs what fine-tuning needs.)"""
    deepspeed: Path | None = None
    """The DeepSpeed configuration to look at, as for `megaprompt probe`. The cheapest of ds_configs/ that fits if not
    given, or auto."""
    nodes: Whole = 1
    """Number of machines."""
    gpus: Whole = 1
    """GPUs per node, with one rank for each; 0 for nodes without GPUs, with one rank per node."""
    gpu_memory: Number = 80.0
    """Memory of each GPU, in GB."""
    host_memory: Number = 256.0
    """Memory of each node, in GB."""
    dtype: Dtype | None = None
    """Precision of the backbone. If not given: what the DeepSpeed configuration says, else bfloat16 on GPUs, float32
    without."""
    relations: Whole = 1
    """Number of relations whose prompts are trained at the same time; each has an encoder of its own."""
    relation_groups: WholeOrNone = None
    """Number of groups of ranks among which the relations are divided; what `megaprompt probe` takes if not given."""
    template: str | None = None
    """Template of the learned prompts; the number of its pseudo tokens counts. The paper's if not given."""
    encoder: Encoder = "lstm"
    """Prompt encoder: lstm, mlp, or none."""
    row_tokens: Whole = ROW_TOKENS
    """Width of packed rows."""
    pass_tokens: Whole = PASS_TOKENS
    """Tokens that the backbone computes at once on each rank."""
    tflops: NumberOrNone = None
    """What each rank computes in a second, in 10^12 floating-point operations: 100 if not given, 1 without GPU."""
    network: NumberOrNone = None
    """GB/s into each rank from other nodes, or within a single one: 12.5 and 50 if not given."""
    pcie: Number = 25.0
    """GB/s between each GPU and its host."""
    disk: Number = 3.0
    """GB/s that each node reads from its local disk."""
    json: Flag = False
    """Print JSON instead of tables."""
    write_config: Path | None = None
    """Also write a DeepSpeed configuration into this file: the best one, or that of --deepspeed, with buckets that fit
    the model (see ds_configs/README.md)."""
    chart: Path | None = None
    """Also draw the memory of all configurations into this PNG file."""

    def __post_init__(self) -> None:
        above_zero(self, "nodes", "gpu_memory", "host_memory", "relations", "relation_groups", "row_tokens")
        above_zero(self, "pass_tokens", "tflops", "network", "pcie", "disk")
        if self.gpus < 0:
            raise UsageError(f"--gpus {self.gpus}: give 0 or more")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Measure what training needs in memory, beside what is predicted, with random weights at their true shapes."""

    out: Path = Path("runs/memory")
    """Directory for memory.json, memory.md and memory.png. Cases that are there already are not run again."""
    backbones: Names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "megatron-11b")
    """As for `megaprompt plan`. What needs twice the memory that there is, or more ranks, is only predicted."""
    methods: Names = ("p-tuning", "fine-tuning")
    """What is trained: p-tuning (prompts), fine-tuning (the whole model)."""
    deepspeed: Names = ("ds_configs/zero3.json", "ds_configs/zero3_cpu_offload.json")
    """DeepSpeed configurations; 'none' for PyTorch alone."""
    ranks: Names = ("1",)
    """Numbers of ranks. In a Slurm job they are started with srun, on all of its nodes, else on this machine."""
    memory_limit: NumberOrNone = None
    """GB that all ranks of a node may use together; more is "out of memory". What is free, less a tenth, if not given;
    on GPUs, their memory is the limit."""
    dtype: Dtype = "float32"
    """Precision of the backbone, where the DeepSpeed configuration says nothing."""
    relations: Whole = 1
    """Number of relations whose prompts are trained at the same time."""
    row_tokens: Whole = 256
    """Width of packed rows."""
    pass_tokens: Whole = 256
    """Tokens that the backbone computes at once on each rank."""
    case_seconds: Whole = 3600
    """Give up a case after this many seconds."""
    collect: Flag = False
    """Measure nothing: put what is in --out, and in the directories in it, into one table and chart."""

    def __post_init__(self) -> None:
        above_zero(self, "relations", "row_tokens", "pass_tokens", "case_seconds", "memory_limit")
        for method in self.methods:
            if method not in ("p-tuning", "fine-tuning"):
                raise UsageError(f"--methods {method}: unknown; choose from p-tuning, fine-tuning")
        for ranks in self.ranks:
            if not ranks.isdecimal() or not int(ranks):
                raise UsageError(f"--ranks {ranks}: give numbers above 0")
