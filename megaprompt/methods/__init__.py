"""Ways to ask: one file each, one interface (`methods.method`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megaprompt.config import ProbeConfig, RunConfig, SuperGlueConfig
from megaprompt.methods.autoprompt import AutoPrompt, Search
from megaprompt.methods.best_manual import BestManual
from megaprompt.methods.discrete import Discrete, DiscretePrompt
from megaprompt.methods.fine_tuning import FineTuning
from megaprompt.methods.in_context import InContext
from megaprompt.methods.majority import Majority
from megaprompt.methods.manual import Manual
from megaprompt.methods.method import Method
from megaprompt.methods.p_tuning import UNTRAINED, PTuning
from megaprompt.methods.wordings import Wordings
from megaprompt.prompting.recipe import RECIPES, chosen
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
    methods = _shared(config)
    if most > 1:
        methods["manual"] = Wordings(most)
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
    order = ("manual", "best-manual", "in-context", "p-tuning", *discrete, "autoprompt")
    order += ("fine-tuning", "manual+fine-tuning")
    return [Majority(), *(methods[name] for name in order if name in wanted)]


def superglue_methods(config: SuperGlueConfig) -> list[Method]:
    """The methods that were asked for, in the order in which they run."""
    return [Majority(), *(method for name, method in _shared(config).items() if name in config.methods)]


def _shared(config: RunConfig) -> dict[str, Method]:
    """The methods that every kind of question has, by name."""
    recipe = chosen(RECIPES[config.recipe], config.recipe_options())
    tuning_recipe = chosen(RECIPES["fine-tuning"], config.fine_tuning_options())
    return {
        "manual": Manual(),
        "in-context": InContext(),
        "p-tuning": PTuning(recipe, config.encoder, groups=config.relation_groups),
        "fine-tuning": FineTuning(tuning_recipe, manual=False),
        "manual+fine-tuning": FineTuning(tuning_recipe, manual=True),
    }
