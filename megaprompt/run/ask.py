"""What saved prompts are good for: scoring them on facts, and asking the backbone about one subject."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone import Backbone, dtype_of, load_backbone
from megaprompt.config import AskConfig, EvaluateConfig
from megaprompt.console import progress
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template
from megaprompt.run.averages import summarize
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts
from megaprompt.tasks.lama.facts import Data, load_data
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.task import Instance

logger = logging.getLogger(__name__)


def _backbone_for(prompts: Mapping[str, SavedPrompt], name: str | None, dtype: str | None) -> Backbone:
    """The backbone that all of the prompts were learned on.

    Raises:
        MegapromptError: a prompt was learned on another one.
    """
    world = World(device=torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    specs = sorted({prompt.backbone for prompt in prompts.values()})
    backbone = load_backbone(name or specs[0], dtype_of(dtype, world.device), world.device)
    for prompt in prompts.values():
        if prompt.fingerprint != backbone.fingerprint:
            raise MegapromptError(
                f"{prompt.path}: learned on {prompt.backbone} (weights {prompt.fingerprint}), not on {backbone.name} "
                f"(weights {backbone.fingerprint}); give --backbone {prompt.backbone}, and the same --dtype"
            )
    return backbone


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score saved prompts; returns scores in the form of one method of results.json.

    Raises:
        UsageError: there are no such prompts, relations or facts.
        MegapromptError: a prompt belongs to another backbone.
    """
    prompts = load_prompts(config.prompts, config.method)
    for name in config.relations:
        if name not in prompts:
            raise UsageError(f"--relations {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    prompts = {name: prompts[name] for name in config.relations or prompts}
    data = load_data(config.data or next(iter(prompts.values())).data)
    backbone = _backbone_for(prompts, config.backbone, config.dtype)
    ask_for = AskFor()
    if not data.has_answer_spaces:
        ask_for = AskFor(load_vocabulary(config.vocab, data, backbone.tokenization))
    tasks = lama_tasks(
        data,
        backbone,
        ask_for,
        names=tuple(prompts),
        splits=(config.split,),
        limit=config.limit_facts,
        seed=config.data_seed,
    )
    rows, size = {}, backbone.exact_size(PassSize())
    with progress("evaluate", sum(len(task.examples[config.split]) for task in tasks.values())) as update:
        done = 0
        for name, task in tasks.items():
            template, examples = task.template(prompts[name].template), task.examples[config.split]
            at = Workplace.shared(backbone, size, World(device=backbone.device), task.objective)
            questions = Questions(task.instances(config.split, template, prompts[name].before), task.objective)
            [found] = answers(at, [questions], prompts[name].vectors.to(backbone.device))
            rows[name] = {
                "label": task.label,
                "type": task.type,
                "facts": len(examples),
                "template": template.text,
                **task.objective.measure(found, examples),
            }
            done += len(examples)
            update(done)
    about = {"split": config.split, "data": data.name, "vocabulary": ask_for.vocabulary and ask_for.vocabulary.name}
    return {**about, "relations": rows, **summarize(rows, list(OneToken.metrics))}


def ask(config: AskConfig) -> list[tuple[str, float]]:
    """The best answers about one subject, with their probabilities among the allowed ones.

    Raises:
        UsageError: there is no prompt for the relation.
        MegapromptError: the prompt belongs to another backbone.
    """
    prompts = load_prompts(config.prompts, config.method)
    if config.relation is None and len(prompts) > 1:
        raise UsageError(f"--relation: choose one of {', '.join(prompts)}")
    name = config.relation or next(iter(prompts))
    if name not in prompts:
        raise UsageError(f"--relation {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    prompt = prompts[name]
    backbone = _backbone_for({name: prompt}, config.backbone, config.dtype)
    objective = OneToken(_allowed(config.vocab, prompt, backbone), backbone.tokenization.text_of, config.top)
    template, encoder = Template.parse(prompt.template), backbone.text_encoder()
    query = template.render({"X": config.subject}, encoder, before=prompt.before)
    at = Workplace.shared(backbone, backbone.exact_size(PassSize()), World(device=backbone.device), objective)
    [found] = answers(at, [Questions([Instance((query,), 0)], objective)], prompt.vectors.to(backbone.device))
    best = [backbone.tokenization.text_of(token) for token in found["top_tokens"][0].tolist()]
    return list(zip(best, found["top_log_probability"][0].exp().tolist(), strict=True))


def _allowed(option: str, prompt: SavedPrompt, backbone: Backbone) -> Tensor:
    """Bool [vocabulary]: the answers that a prompt was learned or chosen among, where its data is still there."""
    try:
        data = load_data(prompt.data)
    except UsageError as error:
        if option == "auto":
            logger.warning("%s; answering among all tokens", error)
            option = "none"
        data = Data(prompt.data, {})
    return load_vocabulary(option, data, backbone.tokenization).allowed
