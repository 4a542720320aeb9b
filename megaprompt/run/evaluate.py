"""Scoring saved prompts on facts: those of a run, and the adapters of PEFT."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megaprompt.backbone import Backbone
from megaprompt.config import EvaluateConfig
from megaprompt.console import progress
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.errors import UsageError
from megaprompt.prompting.packing import PassSize
from megaprompt.run.adapters import are_adapters, load_adapters
from megaprompt.run.ask import answers_of, backbone_for, must_be_of_facts, run_of
from megaprompt.run.averages import summarize
from megaprompt.run.directory import RunDirectory
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts, methods_with_prompts
from megaprompt.tasks.lama.facts import Data, load_data
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.task import Split, Task

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score saved prompts of one method; returns scores in the form of one method of results.json.

    Raises:
        UsageError: there are no such prompts, relations or facts.
        MegapromptError: a prompt belongs to another backbone.
    """
    data = None
    if are_adapters(config.prompts):
        method, data = "PEFT", _data_of_adapters(config)
        prompts = load_adapters(config.prompts, data, config.relations, config.template)
    elif config.template is not None:
        raise UsageError("--template: is for adapters of PEFT; prompts of megaprompt have their own")
    else:
        method = config.method or methods_with_prompts(config.prompts)[0]
        prompts = load_prompts(config.prompts, method)
    found = _evaluate(config, {method: prompts}, data)
    return found | found.pop("methods")[method]


def evaluate_all(config: EvaluateConfig) -> dict[str, Any]:
    """Score the prompts of all methods of a run, and keep the scores there, for its report.

    Returns:
        Scores with `methods` in the form of results.json.

    Raises:
        UsageError: as `evaluate`, or the prompts are not those of a run.
        MegapromptError: as `evaluate`.
    """
    if not (config.prompts / "results.json").is_file():
        raise UsageError(f"--report: {config.prompts} is not the directory of a run; give one, or --out")
    methods = methods_with_prompts(config.prompts)
    found = _evaluate(config, {method: load_prompts(config.prompts, method) for method in methods})
    name = found["data"] if config.split == "test" else f"{found['data']}, {config.split}"
    RunDirectory(config.prompts).write_evaluation(name, found)
    return found


def _data_of_adapters(config: EvaluateConfig) -> Data:
    if config.data is None:
        raise UsageError(f"--prompts {config.prompts}: is of PEFT, which does not tell the data; give --data")
    return load_data(config.data)


def _evaluate(
    config: EvaluateConfig, prompts: Mapping[str, Mapping[str, SavedPrompt]], data: Data | None = None
) -> dict[str, Any]:
    """Scores by method of prompts by method and relation; on their own data if no other is read or named."""
    names = list(dict.fromkeys(name for of_method in prompts.values() for name in of_method))
    for name in config.relations:
        if name not in names:
            raise UsageError(f"--relations {name}: no prompt in {config.prompts}, which has {', '.join(names)}")
    every = [prompt for of_method in prompts.values() for prompt in of_method.values()]
    must_be_of_facts(every)
    data = data or load_data(config.data or every[0].data)
    asked = data.select(list(config.relations) or _in_both(names, data))
    backbone = backbone_for(every, config.backbone, config.dtype)
    ask_for = _ask_for(config, every[0], data, backbone)
    tasks = lama_tasks(
        replace(data, relations={relation.id: relation for relation in asked}),
        backbone,
        ask_for,
        names=config.relations,
        splits=(config.split,),
        limit=config.limit_facts,
        seed=config.data_seed,
    )
    size, total = backbone.exact_size(PassSize()), sum(len(task.examples[config.split]) for task in tasks.values())
    scores = {}
    for method, of_method in prompts.items():
        rows, done = {}, 0
        with progress(f"evaluate {method}", total) as update:
            for name, task in tasks.items():
                if name in of_method:
                    rows[name] = _scored(of_method[name], task, config.split, backbone, size)
                done += len(task.examples[config.split])
                update(done)
        scores[method] = {"relations": rows, **summarize(rows, list(OneToken.metrics))}
    among = ask_for.vocabulary and ask_for.vocabulary.name
    return {"split": config.split, "data": data.name, "vocabulary": among, "methods": scores}


def _ask_for(config: EvaluateConfig, prompt: SavedPrompt, data: Data, backbone: Backbone) -> AskFor:
    """How facts are answered: as in the run of the prompts, with its vocabulary if none is given and the facts are its
    own, or for its report; else as the data ask."""
    run = run_of(config.prompts)
    kind = "candidates" if data.whole_answers else "token"
    if run is not None:
        kind = answers_of(config.prompts, prompt)
    if kind == "candidates":
        return AskFor(begin=run is not None and run.bos == "always")
    vocabulary, of = config.vocab, data
    if vocabulary == "auto" and run is not None and (config.report or (config.data or run.data) == run.data):
        vocabulary, of = run.vocab, load_data(run.data)
    return AskFor(load_vocabulary(vocabulary, of, backbone.tokenization))


def _in_both(names: Sequence[str], data: Data) -> list[str]:
    """The relations of which there are prompts and facts.

    Raises:
        UsageError: there are none.
    """
    both = [name for name in names if name in data.relations]
    if not both:
        raise UsageError(f"--data {data.name}: has none of the relations of the prompts, {', '.join(names)}")
    if missing := [name for name in names if name not in both]:
        logger.warning("left out, since %s has no facts of them: %s", data.name, ", ".join(missing))
    return both


def _scored(prompt: SavedPrompt, task: Task, split: Split, backbone: Backbone, size: PassSize) -> dict[str, Any]:
    """A row of results.json, with the share of the most frequent answer: what always giving it would score."""
    task = replace(task, encoder=prompt.encoder_of(task.encoder))
    template, examples = task.template(prompt.template), task.examples[split]
    at = Workplace.shared(backbone, size, World(device=backbone.device), task.objective)
    questions = Questions(task.instances(split, template, prompt.before), task.objective)
    [found] = answers(at, [questions], prompt.vectors.to(backbone.device))
    most = max(Counter(example.gold for example in examples).values()) / len(examples)
    about = {"label": task.label, "type": task.type, "facts": len(examples), "template": template.text}
    return {**about, "most_frequent": most, **task.objective.measure(found, examples)}
