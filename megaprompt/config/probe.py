"""What `megaprompt probe` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cyclopts import Parameter

from megaprompt.config.options import Names, OptionalNames, Whole, WholeOrNone, above_zero
from megaprompt.config.run import RunConfig
from megaprompt.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProbeConfig(RunConfig):
    """Measure what a frozen language model knows: score hand-written prompts, learn prompts, and score them."""

    METHODS: ClassVar = (
        "manual", "best-manual", "in-context", "autoprompt", "p-tuning", "best", "fine-tuning", "manual+fine-tuning",
    )  # fmt: skip

    PARTS: ClassVar = "relations"

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
    """How many ways of learning 'best' tries for each relation: the paper's, behind demonstrations, with manual words
    as anchors, and from the fifth on all of these with a lower learning rate. If not given: four, or as many as fit
    into memory."""
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
    the 'candidates' (among 16 of them, which are drawn once for each fact)."""
    scores: Literal["all", "rank", "best"] = "rank"
    """With --answers candidates and causal models, how much of them is scored; what is told is exact. 'rank': until the
    rank of the object is known. 'all': every candidate, so that predictions have their probabilities. 'best': until
    the best one is known, for P@1 alone, by which dev then chooses too. Masked models score all."""
    bos: Literal["auto", "always"] = "auto"
    """With --answers candidates, the beginning-of-text token of causal models: 'auto' as the tokenizer sets it, and
    before sentences that start with the answer; 'always' before every sentence, as LM Pub Quiz does."""
    template: str | None = None
    """Template of the learned prompts, and of those that AutoPrompt searches. If not given, that of the paper: for
    causal models <3>[X]<3>[Y], for masked ones <3>[X]<3>[Y]<3>; for AutoPrompt [X]<5>[Y], and a full stop for masked
    ones."""
    init: Literal["manual"] | None = None
    """With --encoder none, 'manual' starts with the embeddings of the relation's manual prompt, each of whose tokens
    becomes a pseudo token in its place (OptiPrompt); instead of --template."""
    autoprompt_steps: Whole = 100
    """Steps of AutoPrompt's search for each relation, in each of which one token may be replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "limit_facts", "autoprompt_steps", "candidates")
        self.discrete_prompts()
        if self.wordings is not None and not {"best-manual", "best"} & set(self.methods):
            raise UsageError("--wordings: is for best-manual, and best; add one of them to --methods")
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
            if not (name and equals and path) or name in named or name in (*self.METHODS, "majority"):
                raise UsageError(f"--discrete {text}: give NAME=PATH, each name once and not that of another method")
            named[name] = Path(path)
        return named
