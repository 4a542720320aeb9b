"""What saved prompts are good for: scoring them on facts, and asking the backbone about one subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megaprompt.backbone import Backbone, dtype_of, load_backbone
from megaprompt.config import AskConfig, EvaluateConfig
from megaprompt.console import progress
from megaprompt.distributed.launch import World
from megaprompt.engine.evaluation import metrics, predict, summarize
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Template
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.usable_facts import load_vocabulary, usable_relations


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
    prompts = load_prompts(config.prompts)
    for name in config.relations:
        if name not in prompts:
            raise UsageError(f"--relations {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    prompts = {name: prompts[name] for name in config.relations or prompts}
    data = load_data(config.data or next(iter(prompts.values())).data)
    backbone = _backbone_for(prompts, config.backbone, config.dtype)
    vocabulary = load_vocabulary(config.vocab, data, backbone)
    relations = usable_relations(
        data,
        backbone,
        vocabulary,
        names=tuple(prompts),
        splits=(config.split,),
        limit=config.limit_facts,
        seed=config.seed,
    )
    rows, size = {}, backbone.exact_size(PassSize())
    with progress("evaluate", sum(len(r.facts[config.split]) for r in relations.values())) as update:
        done = 0
        for name, usable in relations.items():
            template = Template.parse(prompts[name].template)
            examples = usable.examples(config.split, template, backbone)
            vectors = prompts[name].vectors.to(backbone.device)
            found = predict(
                backbone,
                examples.queries,
                examples.objects,
                vectors,
                allowed=vocabulary.allowed,
                world=World(device=backbone.device),
                size=size,
            )
            rows[name] = {
                "label": usable.relation.label,
                "type": usable.relation.type,
                "facts": len(examples),
                "template": template.text,
                **metrics(found.rank),
            }
            done += len(examples)
            update(done)
    about = {"split": config.split, "data": data.name, "vocabulary": vocabulary.name}
    return {**about, "relations": rows, **summarize(rows)}


def ask(config: AskConfig) -> list[tuple[str, float]]:
    """The best answers about one subject, with their probabilities among all tokens.

    Raises:
        UsageError: there is no prompt for the relation.
        MegapromptError: the prompt belongs to another backbone.
    """
    prompts = load_prompts(config.prompts)
    if config.relation is None and len(prompts) > 1:
        raise UsageError(f"--relation: choose one of {', '.join(prompts)}")
    name = config.relation or next(iter(prompts))
    if name not in prompts:
        raise UsageError(f"--relation {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    prompt = prompts[name]
    backbone = _backbone_for({name: prompt}, config.backbone, config.dtype)
    query = Template.parse(prompt.template).render(config.subject, backbone.text_encoder())
    found = predict(
        backbone,
        [query],
        [0],
        prompt.vectors.to(backbone.device),
        allowed=torch.ones(backbone.vocabulary_size, dtype=torch.bool),
        world=World(device=backbone.device),
        size=backbone.exact_size(PassSize()),
        top=config.top,
    )
    answers = [backbone.text_of(token) for token in found.top_tokens[0].tolist()]
    return list(zip(answers, found.top_log_probability[0].exp().tolist(), strict=True))
