"""What `megaprompt superglue` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cyclopts import Parameter

from megaprompt.config.options import Flag, Names, Number, OptionalNames, Whole, WholeOrNone, above_zero
from megaprompt.config.run import RunConfig
from megaprompt.errors import UsageError

SUPERGLUE_TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "RTE", "WiC", "WSC")
"""All but ReCoRD, which the paper leaves out."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SuperGlueConfig(RunConfig):
    """Measure how well a language model does SuperGLUE's tasks: with manual prompts, learned ones, and fine-tuned."""

    METHODS: ClassVar = (
        "manual", "best-manual", "in-context", "p-tuning", "fine-tuning", "manual+fine-tuning", "pet"
    )  # fmt: skip

    PARTS: ClassVar = "tasks"

    data: str
    """Directory with BoolQ/train.jsonl and others, in SuperGLUE's format: FewGLUE with dev32.jsonl, or SuperGLUE."""
    out: Path = Path("runs/superglue")
    """Directory of this run. It must not hold another run."""
    methods: Names = ("manual", "p-tuning")
    """What to compare: manual, best-manual (of PET's patterns the best on dev, and their mean), in-context (training
    examples before the question), p-tuning (see --tune), fine-tuning (of the whole model and a classifier on it),
    manual+fine-tuning (of the whole model, on the manual prompt), pet (the same on each of PET's patterns: their mean,
    and the best on dev). Always giving the most frequent answer is reported beside them."""
    tune: Literal["prompts", "both"] = "prompts"
    """What p-tuning trains: prompts, with the model frozen, or both prompts and model, as the paper does on SuperGLUE.
    Results call the latter p-tuning+fine-tuning."""
    fine_tuning_rate: Number = 1e-5
    """AdamW's learning rate of the model's weights, for methods that train them. What is not given in the options above
    they take from the paper and its code, not from --recipe. With --tune both, --learning-rate is that of prompts."""
    grouped: Flag = False
    """For methods that train the model: the answers to a question of MultiRC follow each other in training, so that a
    step computes its passage once. Several times faster, in another order than the paper's."""
    search: Flag = False
    """For methods that train the model: learn each task with learning rates 1e-5, 2e-5 and 3e-5 of the weights and
    batches of 16 and 32, and take what is best on dev."""
    setting: Literal["few-shot", "full"] = "few-shot"
    """few-shot: train.jsonl and dev32.jsonl are used as they are. full: a tenth of train.jsonl is kept from training
    and chosen on instead. Either way, scores are those on val.jsonl."""
    select_on: Literal["dev", "validation"] = "dev"
    """validation: choose on val.jsonl itself, and train on all of train.jsonl. The paper did so on full data, where its
    scores are better than they would be on examples that were not chosen on. Results say so."""
    tasks: OptionalNames = ()
    """BoolQ, CB, COPA, MultiRC, RTE, WiC, WSC, in any case of letters. All of them if not given."""
    patterns: Path | None = None
    """TOML file with patterns of your own, which are added to the packaged ones or replace them."""
    limit_examples: WholeOrNone = None
    """Use at most so many examples per task and split: the first after a shuffle that depends on --data-seed. Those
    that are scored together, such as the answers to one question, stay together."""
    data_seed: Whole = 0
    """For --limit-examples, and for which tenth is kept from full training data. Runs with another --seed have the same
    examples."""
    row_tokens: Whole = 1024
    """Width of packed rows, which hold a passage once for all of its questions. Changes speed and memory, not
    results."""

    @property
    def columns(self) -> tuple[str, ...]:
        tuned = {"p-tuning": "p-tuning+fine-tuning"} if self.tune == "both" else {}
        return tuple(tuned.get(method, method) for method in self.methods)

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "limit_examples")
        if self.tune == "both" and "p-tuning" not in self.methods:
            raise UsageError("--tune both: says what p-tuning trains; add it to --methods")
        for option in ("search", "grouped"):
            if getattr(self, option) and not self.trains_weights:
                raise UsageError(f"--{option}: is for methods that train the model; add fine-tuning, or --tune both")
        if self.search and (self.batch_size is not None or self.fine_tuning_rate != SuperGlueConfig.fine_tuning_rate):
            raise UsageError(
                "--search: tries batches and learning rates; leave --batch-size and --fine-tuning-rate out"
            )
        known = {name.lower(): name for name in SUPERGLUE_TASKS}
        for name in self.tasks:
            if name.lower() not in known:
                raise UsageError(f"--tasks {name}: unknown; choose from {', '.join(SUPERGLUE_TASKS)}")
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(known[name.lower()] for name in self.tasks)))
