"""Everything that a run can be told, as dataclasses: the command line, YAML files and Python calls all make these."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from megaprompt.errors import UsageError
from megaprompt.prompting.packing import ROW_TOKENS, PassSize
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.tasks.lama.facts import Split

Names = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,..",
        instance_from_str=lambda args: tuple(name for name in args[0].split(",") if name),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda names: [",".join(names)],
    ),
]
"""Several names, separated by commas on the command line."""

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
METHODS = ("manual", "autoprompt", "p-tuning", "fine-tuning", "manual+fine-tuning")


@dataclass(frozen=True)
class ProbeConfig:
    """Measure what a frozen language model knows: score hand-written prompts, learn prompts, and score them."""

    backbone: str = "smollm2-135m"
    """The frozen model: smollm2-135m (packaged), a transformers name or directory, or a .gguf file."""
    data: str = "geonames"
    """geonames (packaged), or a directory in the LAMA layout."""
    out: Path = Path("runs/probe")
    """Directory of this run. It must not hold another run."""
    methods: Names = ("manual", "p-tuning")
    """What to compare: manual, autoprompt (a search for words), p-tuning, fine-tuning (of the whole model, on the
    subject alone), manual+fine-tuning (of the whole model, on the manual prompt). The majority object is always
    reported beside them."""
    discrete: Names = ()
    """Discrete prompts to score as well: NAME=PATH,.. where PATH is a .jsonl file with relation and template, or a
    directory of P36.jsonl and others. Of several for a relation, the best on train and all together are scored."""
    relations: Names = ()
    """Wikidata ids such as P36,P30. All relations of the data if not given."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, `none` for all tokens, or `auto`: the data's own file, if any."""
    limit_facts: int | None = None
    """Use at most so many facts per relation and split: the first after a shuffle that depends on the seed."""
    template: str | None = None
    """Template of the learned prompts, and of those that AutoPrompt searches. If not given, that of the paper: for
    causal models <3>[X]<3>[Y], for masked ones <3>[X]<3>[Y]<3>; for AutoPrompt [X]<5>[Y], and a full stop for masked
    ones."""
    encoder: EncoderKind = "lstm"
    """Prompt encoder: lstm (the paper's), mlp, or none (the vectors themselves are trained)."""
    init: Literal["manual"] | None = None
    """With --encoder none, `manual` starts with the embeddings of the relation's manual prompt, each of whose tokens
    becomes a pseudo token in its place (OptiPrompt); instead of --template."""
    recipe: Literal["fast", "paper"] = "fast"
    """Preset of the six options that follow. `paper` takes what the paper's code sets and is much slower."""
    learning_rate: float | None = None
    """Adam's learning rate."""
    weight_decay: float | None = None
    """Adam's weight decay."""
    batch_size: int | None = None
    """Facts per relation and step."""
    max_epochs: int | None = None
    """Train each relation for at most so many epochs."""
    max_steps: int | None = None
    """Train each relation for at most so many steps; the learning rate then falls linearly to zero."""
    patience: int | None = None
    """Stop a relation after so many epochs without a better P@1 on dev."""
    autoprompt_steps: int = 100
    """Steps of AutoPrompt's search for each relation, in each of which one token may be replaced."""
    fine_tuning_rate: float = 5e-6
    """Adam's learning rate of the two methods that fine-tune. They take batch size, epochs, steps and patience from the
    options above where these are given, and otherwise from the paper's code."""
    seed: int = 0
    """Everything random follows from this number."""
    dtype: Dtype | None = None
    """Of the backbone. If not given: what the DeepSpeed configuration says, else float32 on a CPU, bfloat16 on a GPU.
    Prompts are always trained in float32."""
    deepspeed: Path | None = None
    """DeepSpeed configuration (see ds_configs/): shard the backbone over the ranks. Plain PyTorch if not given."""
    relation_groups: int = 1
    """Divide the ranks into so many groups, each of which trains some of the relations. Does not change results."""
    row_tokens: int = ROW_TOKENS
    """Width of packed rows. Changes speed and memory, not results."""
    pass_tokens: int = PassSize().pass_tokens
    """Tokens that the backbone computes at once on each rank. Changes speed and memory, not results."""
    resume: bool = False
    """Continue the interrupted run in the directory --out, with the options that it was started with."""
    check: bool = False
    """Only see whether the run could start: options, backbone, data, disk, versions. Nothing is loaded or written."""

    def recipe_options(self) -> dict[str, Any]:
        """What was given for the recipe that `recipe` names.

        Raises:
            UsageError: a value makes no sense.
        """
        return self._given("learning_rate", "weight_decay", "batch_size", "max_epochs", "max_steps", "patience")

    def fine_tuning_options(self) -> dict[str, Any]:
        """What was given for the recipe of the methods that fine-tune.

        Raises:
            UsageError: a value makes no sense.
        """
        given = self._given("fine_tuning_rate", "batch_size", "max_epochs", "max_steps", "patience")
        return {"learning_rate": given.pop("fine_tuning_rate"), **given}

    def _given(self, *names: str) -> dict[str, Any]:
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if value < 0 or (value == 0 and name != "weight_decay"):
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a number above 0")
        return given

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UsageError(f"--methods {method}: unknown; choose from {', '.join(METHODS)}")
        _above_zero(self, "limit_facts", "relation_groups", "row_tokens", "pass_tokens", "autoprompt_steps")
        self.discrete_prompts()
        if self.init == "manual" and (self.encoder != "none" or self.template is not None):
            raise UsageError("--init manual: give --encoder none, and no --template")

    def discrete_prompts(self) -> dict[str, Path]:
        """The files of discrete prompts, by the name of the method.

        Raises:
            UsageError: an option is not NAME=PATH, or a name is taken.
        """
        named: dict[str, Path] = {}
        for text in self.discrete:
            name, equals, path = text.partition("=")
            if not (name and equals and path) or name in named or name in (*METHODS, "majority"):
                raise UsageError(f"--discrete {text}: give NAME=PATH, each name once and not that of another method")
            named[name] = Path(path)
        return named


@dataclass(frozen=True)
class EvaluateConfig:
    """Score saved prompts on facts."""

    prompts: Path
    """A run, or a directory of *.safetensors prompts."""
    backbone: str | None = None
    """The model that the prompts were learned on; its name is in the prompts if not given."""
    data: str | None = None
    """Facts to score on; those that the prompts were learned with if not given."""
    split: Split = "test"
    """Which of the data's splits to score."""
    relations: Names = ()
    """Wikidata ids; all for which there are prompts if not given."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, `none` for all tokens, or `auto`: the data's own file, if any."""
    limit_facts: int | None = None
    """Use at most so many facts per relation: the first after a shuffle that depends on the seed."""
    seed: int = 0
    """For --limit-facts."""
    dtype: Dtype | None = None
    """Of the backbone. float32 on a CPU, bfloat16 on a GPU if not given."""
    out: Path | None = None
    """Also write the scores to this JSON file."""


@dataclass(frozen=True)
class AskConfig:
    """Ask the frozen model about one subject, with a saved prompt."""

    subject: tyro.conf.Positional[str]
    """What to ask about, such as "Denmark"."""
    prompts: Path
    """A run, or a directory of *.safetensors prompts."""
    relation: str | None = None
    """Wikidata id, such as P36; may be left out if there is only one prompt."""
    top: int = 5
    """How many answers to print."""
    backbone: str | None = None
    """The model that the prompts were learned on; its name is in the prompts if not given."""
    dtype: Dtype | None = None
    """Of the backbone. float32 on a CPU, bfloat16 on a GPU if not given."""


@dataclass(frozen=True)
class ReportConfig:
    """Make the report of a run again, finished or not, or join several runs on the same data into one table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs: of other backbones, methods or seeds. A directory of runs over parts of the relations counts
    as one run: their results are put together."""
    out: Path | None = None
    """Directory to write the report into. If not given: that of the run, or runs/report for several."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("RUNS: give the directory of a run, or of several")


@dataclass(frozen=True)
class StatusConfig:
    """Tell how far a run is, from its progress.json."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a fairseq checkpoint, such as Megatron 11B, into a directory for --backbone, or back."""

    source: tyro.conf.Positional[Path]
    """Directory with the checkpoint's parts (*-model_part-N.pt, or model.pt), dict.txt, encoder.json and vocab.bpe."""
    out: tyro.conf.Positional[Path]
    """Directory to write. It must not exist."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Of the converted weights; that of the checkpoint if not given."""
    no_tokenizer: bool = False
    """Convert the weights only, without encoder.json and vocab.bpe."""
    to_fairseq: bool = False
    """The other way: SOURCE is a converted directory."""
    parts: int = 1
    """With --to-fairseq: into how many model-parallel parts."""


@dataclass(frozen=True)
class PlanConfig:
    """Tell what a run will need in memory, on given machines, before anything is loaded."""

    backbone: tyro.conf.Positional[str]
    """bert-base, bert-large, roberta-base, roberta-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, megatron-11b, or a
    transformers name or directory, of which only config.json is read."""
    method: Literal["p-tuning", "fine-tuning"] = "p-tuning"
    """manual+fine-tuning needs what fine-tuning needs."""
    deepspeed: Path | None = None
    """The DeepSpeed configuration to look at. The cheapest of ds_configs/ that fits if not given."""
    nodes: int = 1
    """Machines."""
    gpus: int = 1
    """Per node, with one rank for each; 0 for nodes without GPUs, with one rank for each."""
    gpu_memory: float = 80.0
    """Of each GPU, in GB."""
    host_memory: float = 256.0
    """Of each node, in GB."""
    dtype: Dtype | None = None
    """Of the backbone. If not given: what the DeepSpeed configuration says, else bfloat16 on GPUs, float32 without."""
    relations: int = 1
    """Whose prompts are trained at the same time; each has an encoder of its own."""
    relation_groups: int = 1
    """Into how many groups of ranks they are divided."""
    template: str | None = None
    """Its pseudo tokens count. The paper's if not given, as for `megaprompt probe`."""
    encoder: EncoderKind = "lstm"
    """Prompt encoder: lstm, mlp, or none."""
    row_tokens: int = ROW_TOKENS
    """Width of packed rows."""
    pass_tokens: int = PassSize().pass_tokens
    """Tokens that the backbone computes at once on each rank."""
    tflops: float | None = None
    """What each rank computes in a second, in 10^12 floating-point operations: 100 if not given, 1 without GPU."""
    network: float | None = None
    """GB/s into each rank from other ranks: 12.5 if not given, 50 within a single node."""
    pcie: float = 25.0
    """GB/s between each GPU and its host."""
    disk: float = 3.0
    """GB/s that each node reads from its local disk."""
    json: bool = False
    """Print JSON instead of tables."""
    chart: Path | None = None
    """Also draw the memory of all configurations into this PNG file."""

    def __post_init__(self) -> None:
        _above_zero(self, "nodes", "gpu_memory", "host_memory", "relations", "relation_groups", "row_tokens")
        _above_zero(self, "pass_tokens", "tflops", "network", "pcie", "disk")
        if self.gpus < 0:
            raise UsageError(f"--gpus {self.gpus}: give 0 or more")


@dataclass(frozen=True)
class MemoryConfig:
    """Measure what training needs in memory, beside what is predicted, with random weights at their true shapes."""

    out: Path = Path("runs/memory")
    """Directory for memory.json, memory.md and memory.png. Cases that are there already are not run again."""
    backbones: Names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    """As for `megaprompt plan`."""
    methods: Names = ("p-tuning", "fine-tuning")
    """p-tuning, fine-tuning."""
    deepspeed: Names = ("ds_configs/zero3.json", "ds_configs/zero3_cpu_offload.json")
    """DeepSpeed configurations; `none` for PyTorch alone."""
    ranks: Names = ("1",)
    """Numbers of ranks. In a Slurm job they are started with srun, on all of its nodes, else on this machine."""
    memory_limit: float | None = None
    """GB that all ranks of a node may use together; more is `out of memory`. What is free, less a tenth, if not given;
    on GPUs, their memory is the limit."""
    dtype: Dtype = "float32"
    """Of the backbone, where the DeepSpeed configuration says nothing."""
    relations: int = 1
    """Whose prompts are trained at the same time."""
    row_tokens: int = 256
    """Width of packed rows."""
    pass_tokens: int = 256
    """Tokens that the backbone computes at once on each rank."""
    case_seconds: int = 3600
    """Give a case up after so long."""
    collect: bool = False
    """Measure nothing: put what is in --out, and in the directories in it, into one table and chart."""

    def __post_init__(self) -> None:
        _above_zero(self, "relations", "row_tokens", "pass_tokens", "case_seconds", "memory_limit")
        for method in self.methods:
            if method not in ("p-tuning", "fine-tuning"):
                raise UsageError(f"--methods {method}: unknown; choose from p-tuning, fine-tuning")
        for ranks in self.ranks:
            if not ranks.isdecimal() or not int(ranks):
                raise UsageError(f"--ranks {ranks}: give numbers above 0")


@dataclass(frozen=True)
class FetchConfig:
    """Download published facts into a directory for --data. Called again, it goes on where it stopped."""

    source: tyro.conf.Positional[Literal["lama", "autoprompt-trex", "p-tuning-lama"]]
    """lama: LAMA's test facts. autoprompt-trex: AutoPrompt's train, dev and test. p-tuning-lama: the same with the
    vocabularies of the P-tuning paper."""
    out: Path | None = None
    """Directory to write; data/SOURCE if not given. It must not exist."""
    url: str | None = None
    """Another address of the archive, such as a mirror."""
    hub: str | None = None
    """Take LAMA from the model hub instead, with the package datasets: facebook/lama, or one with the same columns."""

    def __post_init__(self) -> None:
        if self.hub is not None and (self.source != "lama" or self.url is not None):
            raise UsageError("--hub: only lama is on the model hub, which needs no --url")


@dataclass(frozen=True)
class VocabularyConfig:
    """Write the words that are one token for every one of several models: a file for --vocab."""

    backbones: Names
    """As for `megaprompt probe`, separated by commas. Only their tokenizers are loaded."""
    out: Path
    """File to write, one word a line."""
    words: Path | None = None
    """Choose only among these words, one a line, such as LAMA's common vocabulary."""

    def __post_init__(self) -> None:
        if not self.backbones:
            raise UsageError("--backbones: name at least one")


@dataclass(frozen=True)
class CountConfig:
    """Count the facts whose object is one token of a model and in a vocabulary, by relation and split."""

    data: str = "geonames"
    """geonames (packaged), or a directory in the LAMA layout."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, `none` for all tokens, or `auto`: the data's own file, if any."""
    backbone: str = "smollm2-135m"
    """As for `megaprompt probe`. Only its tokenizer is loaded."""


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number above 0")


C = TypeVar("C")


def parse(config: type[C], args: Sequence[str], prog: str, default: C | None = None) -> C:
    """Read a configuration from command line arguments.

    Raises:
        UsageError: the arguments do not fit, with the parser's explanation in one line.
        SystemExit: with code 0, after --help.
    """
    out, err = io.StringIO(), io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return tyro.cli(config, prog=prog, args=list(args), config=(tyro.conf.FlagCreatePairsOff,), **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            print(out.getvalue(), end="")
            raise
        text = [re.sub(r"[╭╮╰╯│─]+", "", line).strip() for line in (err.getvalue() or out.getvalue()).splitlines()[1:]]
        reason = " ".join(line for line in text if line)
        raise UsageError(re.sub(r"For full helptext, (run|see)", "See", reason)) from None


def to_yaml(config: Any) -> str:
    """A configuration as YAML text; `from_yaml` reads it back."""
    values = dataclasses.asdict(config)
    plain = {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def from_yaml(config: type[C], path: Path) -> C:
    """Read a configuration from a YAML file, checked like command line options.

    Raises:
        UsageError: the file cannot be read, or has unknown keys or wrong values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected `option: value` lines")
    args: list[str] = []
    for key, value in values.items():
        flag = f"--{str(key).replace('_', '-')}"
        if isinstance(value, bool):
            args += [flag] if value else []
        elif value is not None:
            args += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    try:
        return parse(config, args, prog=str(path))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
