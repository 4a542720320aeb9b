"""Ways to ask: one file each, one interface (`methods.method`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megaprompt.config import ProbeConfig
from megaprompt.methods.autoprompt import AutoPrompt, Search
from megaprompt.methods.discrete import Discrete, DiscretePrompt
from megaprompt.methods.fine_tuning import FineTuning
from megaprompt.methods.majority import Majority
from megaprompt.methods.manual import Manual
from megaprompt.methods.method import Method
from megaprompt.methods.p_tuning import PTuning
from megaprompt.prompting.recipe import RECIPES, chosen

Prompts = Mapping[str, Sequence[DiscretePrompt]]


def chosen_methods(config: ProbeConfig, tasks: Iterable[str], discrete: Mapping[str, Prompts]) -> list[Method]:
    """The methods that were asked for, in the order in which they run.

    Args:
        tasks: names of those that are asked.
        discrete: prompts from files, by the name of the method.
    """
    tasks = list(tasks)
    recipe = chosen(RECIPES[config.recipe], config.recipe_options())
    tuning_recipe = chosen(RECIPES["fine-tuning"], config.fine_tuning_options())
    methods: dict[str, Method] = {
        "manual": Manual(),
        "p-tuning": PTuning(recipe, config.encoder, config.template, config.init == "manual", config.relation_groups),
    }
    for name, prompts in discrete.items():
        methods[name] = Discrete(name, {task: prompts.get(task, ()) for task in tasks})
    methods["autoprompt"] = AutoPrompt(Search(config.autoprompt_steps), config.template)
    methods["fine-tuning"] = FineTuning(tuning_recipe, manual=False)
    methods["manual+fine-tuning"] = FineTuning(tuning_recipe, manual=True)
    wanted = {*config.methods, *discrete}
    return [Majority(), *(method for name, method in methods.items() if name in wanted)]
