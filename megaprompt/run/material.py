"""What a command asks, as it stands in files: all in which one command differs from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import Tokenization
from megaprompt.config import ProbeConfig, RunConfig, SuperGlueConfig
from megaprompt.methods import Prompts, chosen_methods, superglue_methods
from megaprompt.methods.discrete import prompt_files, read_discrete_prompts
from megaprompt.methods.method import Method
from megaprompt.prompting.recipe import RECIPES
from megaprompt.prompting.template import Template, default_template
from megaprompt.tasks.lama.facts import load_data, read_vocabulary
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.superglue.patterns import read_patterns
from megaprompt.tasks.superglue.reading import read_superglue
from megaprompt.tasks.superglue.tasks import superglue_tasks
from megaprompt.tasks.task import SPLITS, Split, Task


class Asked(NamedTuple):
    """What can be asked of one backbone, and in which ways."""

    tasks: dict[str, Task]
    methods: list[Method]
    splits: Sequence[Split]  # in which tasks must have examples
    ask_for: AskFor | None = None  # how facts are answered, if they are facts


class Material(Protocol):
    """Read before the backbone is loaded, so that mistakes are told at once."""

    @property
    def name(self) -> str:
        """Of the data, as reports show it."""

    def files(self) -> Sequence[Path]:
        """That were read, each once."""

    def tasks(self) -> Sequence[str]:
        """The names of the tasks that will be asked, as far as they are known without a backbone."""

    def describe(self) -> str:
        """A line for `--check`."""

    def templates(self, causal: bool) -> Mapping[str, Template]:
        """With which prompts are learned, by task."""

    @property
    def whole_answers(self) -> bool:
        """Whether answers of any length are ranked."""

    def asked_of(self, backbone: Backbone) -> Asked:
        """Make tasks and methods.

        Raises:
            MegapromptError: there is nothing that can be asked of this backbone.
        """


ReadMaterial = Callable[[], Material]


class Facts:
    """Of `megaprompt probe`.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: a file is malformed.
    """

    def __init__(self, config: ProbeConfig) -> None:
        if config.template is not None:
            Template.parse(config.template)  # wrong ones are told at once
        self.config, self.data = config, load_data(config.data)
        self.relations = self.data.select(config.relations)
        self.discrete = {name: read_discrete_prompts(path) for name, path in config.discrete_prompts().items()}
        self.wordings = {} if config.wordings is None else read_discrete_prompts(config.wordings, "wordings")
        if config.vocab not in ("auto", "none"):
            read_vocabulary(Path(config.vocab))

    @property
    def name(self) -> str:
        return self.data.name

    def files(self) -> list[Path]:
        config, vocabulary = self.config, self.data.vocabulary
        chosen = Path(config.vocab) if config.vocab not in ("auto", "none") else vocabulary
        given = [*config.discrete_prompts().values(), *filter(None, [config.wordings])]
        options = [path for option in given for path in prompt_files(option)]
        used = [chosen] if chosen is not None and config.vocab != "none" else []
        return list(dict.fromkeys([*self.data.files, *used, *options]))

    def tasks(self) -> list[str]:
        return [relation.id for relation in self.relations]

    def describe(self) -> str:
        counts = (f"{sum(len(r.facts[split]) for r in self.relations)} {split}" for split in SPLITS)
        return f"{self.name}, {len(self.relations)} relation(s), {', '.join(counts)} facts"

    def templates(self, causal: bool) -> dict[str, Template]:
        return dict.fromkeys(self.tasks(), Template.parse(self.config.template or default_template(causal)))

    @property
    def whole_answers(self) -> bool:
        asked = self.config.answers
        return self.data.whole_answers if asked is None else asked == "candidates"

    def asked_of(self, backbone: Backbone) -> Asked:
        config = self.config
        ask_for = self._ask_for(backbone.tokenization)
        tasks = lama_tasks(
            self.data,
            backbone,
            ask_for,
            names=config.relations,
            splits=(splits := _splits(config, self.discrete)),
            limit=config.limit_facts,
            seed=config.data_seed,
        )
        return Asked(tasks, chosen_methods(config, tasks, self.discrete, self.wordings), splits, ask_for)

    def _ask_for(self, tokenization: Tokenization) -> AskFor:
        """Tokens or whole answers: as --answers says, else whole ones where the data has answers to choose from."""
        config = self.config
        vocabulary = None if self.whole_answers else load_vocabulary(config.vocab, self.data, tokenization)
        among_allowed, begin = RECIPES[config.recipe].among_allowed, config.bos == "always"
        return AskFor(vocabulary, among_allowed, config.learn_by, begin, config.scores)


def _splits(config: RunConfig, discrete: Mapping[str, Prompts]) -> tuple[Split, ...]:
    """In which a task must have examples."""
    if set(config.methods) - {"manual"}:
        return SPLITS
    return ("train", "test") if discrete else ("test",)


class SuperGlue:
    """Of `megaprompt superglue`.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: a file is malformed.
    """

    def __init__(self, config: SuperGlueConfig) -> None:
        self.config = config
        self.patterns = read_patterns(config.patterns)
        self.data = read_superglue(
            Path(config.data),
            config.setting,
            config.tasks,
            select_on=config.select_on,
            limit=config.limit_examples,
            seed=config.data_seed,
        )

    @property
    def name(self) -> str:
        chosen = ", chosen on the validation set" * (self.config.select_on == "validation")
        return f"SuperGLUE ({self.config.setting}{chosen})"

    def files(self) -> list[Path]:
        return [*(path for data in self.data.values() for path in data.files), *filter(None, [self.config.patterns])]

    def tasks(self) -> list[str]:
        return list(self.data)

    def describe(self) -> str:
        counts = (f"{sum(len(data.examples[split]) for data in self.data.values())} {split}" for split in SPLITS)
        return f"{self.name} from {self.config.data}, {len(self.data)} task(s), {', '.join(counts)} examples"

    def templates(self, causal: bool) -> dict[str, Template]:
        return {name: self.patterns[name].learned.template(causal) for name in self.data}

    @property
    def whole_answers(self) -> bool:
        return False  # but of COPA and WSC, which have few

    def asked_of(self, backbone: Backbone) -> Asked:
        tasks = superglue_tasks(
            self.data, self.patterns, backbone, bool({"best-manual", "pet"} & set(self.config.methods))
        )
        return Asked(tasks, superglue_methods(self.config), _splits(self.config, {}))
