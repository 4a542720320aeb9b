"""What `megaprompt probe` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    OptionalNames,
    Whole,
    WholeOrNone,
    above_zero,
)
from megaprompt.errors import UsageError

METHODS = (
    "manual", "best-manual", "in-context", "autoprompt", "p-tuning", "best", "fine-tuning", "manual+fine-tuning",
)  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure what a frozen language model knows: score hand-written prompts, learn prompts, and score them."""

    backbone: str = "smollm2-135m"
    """The frozen model: smollm2-135m (packaged), a transformers name or directory, or a .gguf file."""
    data: str = "world"
    """world (packaged), or a directory in the layout of LAMA or BEAR."""
    out: Path = Path("runs/probe")
    """Directory of this run. It must not hold another run."""
    methods: Names = ("manual", "p-tuning")
    """What to compare: manual, best-manual (of several wordings), in-context (facts shown before the question),
    autoprompt (a search for words), p-tuning, best (of all of these but autoprompt, and more learned prompts),
    fine-tuning (of the whole model, on the subject alone), manual+fine-tuning (of the whole model, on the manual
    prompt). Choices are made on dev. The majority object is always reported beside them."""
    wordings: Path | None = None
    """More wordings for best-manual: a .jsonl file with relation and template, or a directory of P36.jsonl and
    others. Without it, those that came with the data."""
    candidates: WholeOrNone = None
    """How many ways of learning 'best' tries for each relation, the paper's among them. If not given: four, or as many
    as fit into memory."""
    discrete: OptionalNames = ()
    """Discrete prompts to score as well: NAME=PATH,.. where PATH is a .jsonl file with relation and template, or a
    directory of P36.jsonl and others. Of several for a relation, the best on train and all together are scored."""
    relations: OptionalNames = ()
    """Wikidata ids such as P36,P30. All relations of the data if not given."""
    answers: Literal["token", "candidates"] | None = None
    """'token': the object is one token of the vocabulary, and facts with other objects are left out. 'candidates': the
    most likely of a relation's answers, which may have any length. If not given: candidates where the data says what
    is to choose from, as BEAR does."""
    vocab: str = "auto"
    """Allowed answers: a file with one word a line, 'none' for all tokens, or 'auto': the data's own file if it has
    one, else the words that are objects anywhere in it."""
    limit_facts: WholeOrNone = None
    """Use at most this many facts per relation and split: the first after a shuffle that depends on --data-seed."""
    data_seed: Whole = 0
    """For --limit-facts. Runs with another --seed keep the same facts."""
    learn_by: Literal["answer", "candidates"] = "candidates"
    """With --answers candidates, what training makes more likely: the right 'answer' by itself, or the right one among
    the 'candidates' (among 16 of them)."""
    bos: Literal["auto", "always"] = "auto"
    """With --answers candidates, the beginning-of-text token of causal models: 'auto' as the tokenizer sets it, and
    before sentences that start with the answer; 'always' before every sentence, as LM Pub Quiz does."""
    template: str | None = None
    """Template of the learned prompts, and of those that AutoPrompt searches. If not given, that of the paper: for
    causal models <3>[X]<3>[Y], for masked ones <3>[X]<3>[Y]<3>; for AutoPrompt [X]<5>[Y], and a full stop for masked
    ones."""
    encoder: Encoder = "lstm"
    """Prompt encoder: lstm (the paper's), mlp, or none (the vectors themselves are trained)."""
    init: Literal["manual"] | None = None
    """With --encoder none, 'manual' starts with the embeddings of the relation's manual prompt, each of whose tokens
    becomes a pseudo token in its place (OptiPrompt); instead of --template."""
    recipe: Literal["fast", "paper"] = "fast"
    """Preset of the six options that follow. 'paper' has the settings of the paper's code and is much slower."""
    learning_rate: NumberOrNone = None
    """Adam's learning rate."""
    weight_decay: NumberOrNone = None
    """Adam's weight decay."""
    batch_size: WholeOrNone = None
    """Facts per relation and step."""
    max_epochs: WholeOrNone = None
    """Train each relation for at most this many epochs."""
    max_steps: WholeOrNone = None
    """Train each relation for at most this many steps; the learning rate then falls linearly to zero."""
    patience: WholeOrNone = None
    """Stop a relation when dev was scored this many times without a better P@1: every 25 steps with the recipe 'fast',
    else after every epoch."""
    autoprompt_steps: Whole = 100
    """Steps of AutoPrompt's search for each relation, in each of which one token may be replaced."""
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
    backbone over the ranks. Plain PyTorch if not given."""
    relation_groups: Whole = 1
    """Divide the ranks into this many groups, each of which trains some of the relations. Does not change results."""
    row_tokens: Whole = ROW_TOKENS
    """Width of packed rows. Changes speed and memory, not results."""
    pass_tokens: Whole = PASS_TOKENS
    """Tokens that the backbone computes at once on each rank. Changes speed and memory, not results."""
    resume: Flag = False
    """Continue the interrupted run in the directory --out, with the options that it was started with."""
    check: Flag = False
    """Only see whether the run could start: versions, options, backbone, data, disk, memory. No weights are loaded, and
    nothing is written."""

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

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UsageError(f"--methods {method}: unknown; choose from {', '.join(METHODS)}")
        above_zero(
            self, "limit_facts", "relation_groups", "row_tokens", "pass_tokens", "autoprompt_steps", "candidates"
        )
        above_zero(self, "learning_rate", "batch_size", "max_epochs", "max_steps", "patience", "fine_tuning_rate")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UsageError(f"--weight-decay {self.weight_decay}: give 0 or more")
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
