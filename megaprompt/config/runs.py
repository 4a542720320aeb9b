"""What the commands about a run that is there, or its prompts, can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from megaprompt.config.options import Dtype, Flag, OptionalNames, Whole, WholeOrNone, above_zero
from megaprompt.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score saved prompts on facts."""

    prompts: Path
    """A run, a directory of prompts (.safetensors), an adapter of PEFT (prompt tuning, or P-tuning), or a directory of
    such adapters in directories named by relation."""
    template: str | None = None
    """For adapters of PEFT: the words behind their vectors, such as "The capital of [X] is [Y]."; the relation's manual
    prompt if not given."""
    method: str | None = None
    """Whose prompts of the run: best, p-tuning, in-context, best-manual, manual. If not given: the first of these that
    the run has."""
    backbone: str | None = None
    """The model that the prompts were learned on; its name is in the prompts if not given."""
    data: str | None = None
    """Facts to score on; those that the prompts were learned with if not given."""
    split: Literal["train", "dev", "test"] = "test"
    """Which of the data's splits to score."""
    relations: OptionalNames = ()
    """Wikidata ids; all for which there are prompts if not given."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, 'none' for all tokens, or 'auto': the data's own file if it has
    one, else the words that are objects anywhere in it; with --report those of the run."""
    limit_facts: WholeOrNone = None
    """Use at most this many facts per relation: the first after a shuffle that depends on --data-seed."""
    data_seed: Whole = 0
    """For --limit-facts."""
    dtype: Dtype | None = None
    """Precision of the backbone. If not given: bfloat16 on a GPU that computes with it, float32 on others and on a
    CPU."""
    out: Path | None = None
    """Also write the scores to this JSON file."""
    report: bool = False
    """Score the prompts of all methods of the run, and show the scores in its report beside its own."""

    def __post_init__(self) -> None:
        if self.report and (self.method is not None or self.out is not None):
            raise UsageError("--report: takes all methods and writes into the run; leave --method and --out out")
        above_zero(self, "limit_facts")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Ask the frozen model about one subject, with a saved prompt."""

    subject: str = field(kw_only=False)
    """What to ask about, such as "Denmark"."""
    prompts: Path
    """A run, or a directory of prompts (.safetensors)."""
    relation: str | None = None
    """Wikidata id, such as P36; may be left out if there is only one prompt."""
    top: Whole = 5
    """How many answers to print."""
    method: str | None = None
    """Whose prompts of the run: best, p-tuning, in-context, best-manual, manual. If not given: the first of these that
    the run has."""
    answers: Literal["token", "candidates", "text"] | None = None
    """'token': the best allowed tokens. 'candidates': the best of the relation's answers, of any length, in the data
    that the prompt was learned with. 'text': what a causal model writes by itself up to a punctuation mark, the best of
    a beam. If not given: as the prompt was learned."""
    vocab: str = "auto"
    """Allowed tokens: a file with one word a line, 'none' for all tokens, or 'auto': those of the data that the prompt
    was learned with."""
    backbone: str | None = None
    """The model that the prompts were learned on; its name is in the prompts if not given."""
    dtype: Dtype | None = None
    """Precision of the backbone. If not given: bfloat16 on a GPU that computes with it, float32 on others and on a
    CPU."""

    def __post_init__(self) -> None:
        above_zero(self, "top")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write prompts so that others can use them without megaprompt."""

    prompts: Path
    """A run, or a directory of prompts (.safetensors)."""
    to: Literal["transformers", "peft"] = "transformers"
    """transformers: a directory with the vectors, and a script that asks with transformers alone; for every template.
    peft: an adapter for PeftModel.from_pretrained; where all pseudo tokens stand before the subject."""
    out: Path
    """Directory to write into, with one directory for each relation."""
    method: str | None = None
    """Whose prompts of the run: best, p-tuning, in-context, best-manual, manual. If not given: the first of these that
    the run has."""
    relations: OptionalNames = ()
    """Wikidata ids; all for which there are prompts if not given."""
    backbone: str | None = None
    """The model that the prompts were learned on; its name is in the prompts if not given."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make the report of a run again, finished or not, or join several runs on the same data into one table."""

    runs: tuple[Path, ...] = field(kw_only=False)
    """The directory of a run, or of several: of other backbones, methods or seeds. A directory of runs over parts of
    the relations counts as one run: their results are put together. A directory of runs after steps of a training
    (step-500, ...) gets a report over the steps."""
    out: Path | None = None
    """Directory to write the report into. If not given: that of the run, or runs/report for several."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """Repeat a run with the options that it was given, and tell whether the same comes out. Files that options name are
    read again, from the directory in which the command is given."""

    run: Path = field(kw_only=False)
    """The directory of a complete run."""
    out: Path
    """Directory of the new run. It must not hold another run."""
    resume: Flag = False
    """Continue the interrupted rerun in the directory --out."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Tell how far a run is, from its progress.json."""

    run: Path = field(kw_only=False)
    """The directory of the run."""
