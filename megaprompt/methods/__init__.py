"""Ways to ask: one file each, one interface (`methods.method`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megaprompt.config import ProbeConfig, SuperGlueConfig
from megaprompt.methods.autoprompt import AutoPrompt, Search
from megaprompt.methods.best_manual import BestManual
from megaprompt.methods.discrete import Discrete, DiscretePrompt
from megaprompt.methods.fine_tuning import FineTuning
from megaprompt.methods.in_context import InContext
from megaprompt.methods.majority import Majority
from megaprompt.methods.manual import Manual
from megaprompt.methods.method import Method
from megaprompt.methods.p_tuning import UNTRAINED, PTuning
from megaprompt.methods.patterns import BestPattern, Pet
from megaprompt.methods.wordings import Wordings
from megaprompt.prompting.recipe import RECIPES, Tuning, chosen, chosen_tuning
from megaprompt.tasks.superglue.recipes import BATCH_SIZES, LEARNING_RATES, paper_tuning
from megaprompt.tasks.task import Task

Prompts = Mapping[str, Sequence[DiscretePrompt]]


def chosen_methods(
    config: ProbeConfig, tasks: Mapping[str, Task], discrete: Mapping[str, Prompts], wordings: Prompts
) -> list[Method]:
    """The methods that were asked for, in the order in which they run; `best` also needs those that it chooses from.

    Where answers are chosen among candidates and the data has several wordings, as BEAR does, `manual` is each of them,
    and comes with `best-manual` if there is a dev.

    Args:
        tasks: those that are asked, by name.
        discrete: prompts from files, by the name of the method.
        wordings: more wordings for best-manual.
    """
    wanted = {*config.methods, *discrete}
    candidates = all(task.examples["test"][0].candidates for task in tasks.values())
    most = max(len(task.wordings) for task in tasks.values()) if candidates else 1
    if most > 1 and "manual" in wanted and all(task.examples["dev"] for task in tasks.values()):
        wanted.add("best-manual")
    if "best" in wanted:
        wanted |= {*UNTRAINED, "p-tuning"}
    methods: dict[str, Method] = {"manual": Manual(), "in-context": InContext()}
    if most > 1:
        both = {"manual", "best-manual"} <= wanted and not wordings
        methods["manual"] = Wordings(most, best=both)
        wanted -= {"best-manual"} if both else set()
    recipe = chosen(RECIPES[config.recipe], config.recipe_options())
    methods["best-manual"] = BestManual({name: [one.text for one in prompts] for name, prompts in wordings.items()})
    methods["p-tuning"] = PTuning(
        recipe,
        config.encoder,
        config.template,
        config.init == "manual",
        config.relation_groups,
        "best" in wanted,
        config.candidates,
    )
    for name, prompts in discrete.items():
        methods[name] = Discrete(name, {task: prompts.get(task, ()) for task in tasks})
    methods["autoprompt"] = AutoPrompt(Search(config.autoprompt_steps), config.template)
    tuning = chosen(RECIPES["fine-tuning"], config.fine_tuning_options())
    for name in ("fine-tuning", "manual+fine-tuning"):
        methods[name] = FineTuning(name, lambda task: {"": Tuning(tuning, tuning)})
    order = ("manual", "best-manual", "in-context", "p-tuning", *discrete, "autoprompt")
    order += ("fine-tuning", "manual+fine-tuning")
    return [Majority(), *(methods[name] for name in order if name in wanted)]


def superglue_methods(config: SuperGlueConfig) -> list[Method]:
    """The methods that were asked for, in the order in which they run."""
    recipe = chosen(RECIPES[config.recipe], config.recipe_options())
    methods: dict[str, Method] = {
        "manual": Manual(),
        "best-manual": BestPattern(),
        "in-context": InContext(),
        "p-tuning": PTuning(recipe, config.encoder, groups=config.relation_groups),
    }
    for name in ("fine-tuning", "manual+fine-tuning", "p-tuning+fine-tuning"):
        methods[name] = FineTuning(name, lambda task: _tunings(config, task), config.encoder)
    methods["pet"] = Pet(FineTuning("pet", lambda task: _tunings(config, task)))
    return [Majority(), *(method for name, method in methods.items() if name in config.columns)]


def _tunings(config: SuperGlueConfig, task: str) -> dict[str, Tuning]:
    """With which recipes a task is learned where the model is tuned, by what tells them apart."""
    paper, both = paper_tuning(task, config.setting), {"grouped": config.grouped}
    weights, prompts = ({**options, **both} for options in (config.fine_tuning_options(), config.recipe_options()))
    if not config.search:
        return {"": chosen_tuning(paper, weights, prompts)}
    return {
        f"learning rate {rate:g}, batches of {batch}": chosen_tuning(
            paper, {**weights, "learning_rate": rate, "batch_size": batch}, {**prompts, "batch_size": batch}
        )
        for rate in LEARNING_RATES
        for batch in BATCH_SIZES
    }
