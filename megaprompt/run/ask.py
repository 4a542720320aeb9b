"""What saved prompts are good for: scoring them on facts, and asking the backbone about one subject."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprompt.backbone import Backbone, dtype_of, load_backbone
from megaprompt.config import AskConfig, EvaluateConfig, ProbeConfig, from_yaml
from megaprompt.console import progress
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.run.averages import summarize
from megaprompt.run.directory import RunDirectory
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts, methods_with_prompts
from megaprompt.tasks.lama.continuations import continuations, ends
from megaprompt.tasks.lama.facts import Data, load_data
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.lama.whole_answers import WholeAnswers
from megaprompt.tasks.objective import Answers, Objective
from megaprompt.tasks.task import Instance, Split, Task

logger = logging.getLogger(__name__)


def backbone_for(prompts: Sequence[SavedPrompt], name: str | None, dtype: str | None) -> Backbone:
    """The backbone that all of the prompts were learned on.

    Raises:
        MegapromptError: a prompt was learned on another one.
    """
    world = World(device=torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    spec, seed = min((prompt.backbone, prompt.random_weights) for prompt in prompts)
    random_weights = int(seed) if seed else None
    precision = dtype_of(dtype, world.device)
    backbone = load_backbone(name or spec, precision, world.device, random_weights=random_weights)
    for prompt in prompts:
        if prompt.fingerprint != backbone.fingerprint:
            raise MegapromptError(
                f"{prompt.path}: learned on {prompt.backbone} (weights {prompt.fingerprint}), not on {backbone.name} "
                f"(weights {backbone.fingerprint}); give --backbone {prompt.backbone}, and the same --dtype"
            )
    return backbone


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score saved prompts of one method; returns scores in the form of one method of results.json.

    Raises:
        UsageError: there are no such prompts, relations or facts.
        MegapromptError: a prompt belongs to another backbone.
    """
    method = config.method or methods_with_prompts(config.prompts)[0]
    found = _evaluate(config, [method])
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
    found = _evaluate(config, methods_with_prompts(config.prompts))
    name = found["data"] if config.split == "test" else f"{found['data']}, {config.split}"
    RunDirectory(config.prompts).write_evaluation(name, found)
    return found


def _evaluate(config: EvaluateConfig, methods: Sequence[str]) -> dict[str, Any]:
    prompts = {method: load_prompts(config.prompts, method) for method in methods}
    names = list(dict.fromkeys(name for of_method in prompts.values() for name in of_method))
    for name in config.relations:
        if name not in names:
            raise UsageError(f"--relations {name}: no prompt in {config.prompts}, which has {', '.join(names)}")
    every = [prompt for of_method in prompts.values() for prompt in of_method.values()]
    must_be_of_facts(every)
    data = load_data(config.data or every[0].data)
    names = list(config.relations) or _in_both(names, data)
    backbone = backbone_for(every, config.backbone, config.dtype)
    ask_for = AskFor()
    if not data.has_answer_spaces:
        ask_for = AskFor(load_vocabulary(*_vocabulary_of(config, data), backbone.tokenization))
    tasks = lama_tasks(
        data,
        backbone,
        ask_for,
        names=tuple(names),
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


def must_be_of_facts(prompts: Iterable[SavedPrompt]) -> None:
    """See that prompts ask for facts.

    Raises:
        UsageError: they were learned on another kind of question, such as SuperGLUE's tasks.
    """
    for prompt in prompts:
        if "[X]" not in prompt.template:
            raise UsageError(
                f"--prompts: {prompt.path} asks about texts of {prompt.data}, not for facts; its run has scores in "
                "report.html and answers in predictions/; for other texts run megaprompt superglue with another --data"
            )


def _vocabulary_of(config: EvaluateConfig, data: Data) -> tuple[str, Data]:
    """The option, and the data that it is about: for a run's report the same answers compete as in the run."""
    if config.report and config.vocab == "auto":
        run = from_yaml(ProbeConfig, config.prompts / "config.yaml")
        return run.vocab, load_data(run.data)
    return config.vocab, data


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
    template, examples = task.template(prompt.template), task.examples[split]
    at = Workplace.shared(backbone, size, World(device=backbone.device), task.objective)
    questions = Questions(task.instances(split, template, prompt.before), task.objective)
    [found] = answers(at, [questions], prompt.vectors.to(backbone.device))
    most = max(Counter(example.gold for example in examples).values()) / len(examples)
    about = {"label": task.label, "type": task.type, "facts": len(examples), "template": template.text}
    return {**about, "most_frequent": most, **task.objective.measure(found, examples)}


def ask(config: AskConfig) -> list[tuple[str, float]]:
    """The best answers about one subject, with their probabilities: among the allowed tokens or the candidates, or of
    being written.

    Raises:
        UsageError: there is no prompt for the relation, or the data of candidates is not there.
        MegapromptError: the prompt belongs to another backbone.
    """
    prompts = load_prompts(config.prompts, config.method)
    if config.relation is None and len(prompts) > 1:
        raise UsageError(f"--relation: choose one of {', '.join(prompts)}")
    name = config.relation or next(iter(prompts))
    if name not in prompts:
        raise UsageError(f"--relation {name}: no prompt in {config.prompts}, which has {', '.join(prompts)}")
    prompt = prompts[name]
    must_be_of_facts([prompt])
    backbone = backbone_for([prompt], config.backbone, config.dtype)
    kind = config.answers or _answers_of(config.prompts, prompt)
    return {"token": _tokens, "candidates": _candidates, "text": _continuations}[kind](config, prompt, backbone)


def _answers_of(directory: Path, prompt: SavedPrompt) -> str:
    """What kind of answers a prompt was learned or chosen for: its run says so, or its data."""
    if (directory / "config.yaml").is_file():
        run = from_yaml(ProbeConfig, directory / "config.yaml")
        if run.answers is not None:
            return run.answers
    try:
        return "candidates" if load_data(prompt.data).has_answer_spaces else "token"
    except UsageError:  # the data is there no more
        return "token"


def _tokens(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> list[tuple[str, float]]:
    """The best allowed tokens."""
    objective = OneToken(allowed_answers(config.vocab, prompt, backbone), backbone.tokenization.text_of, config.top)
    instance = Instance((_query(config, prompt, backbone),), 0)
    found = _asked(instance, objective, prompt, backbone)
    best = [backbone.tokenization.text_of(token) for token in found["top_tokens"][0].tolist()]
    return list(zip(best, found["top_log_probability"][0].exp().tolist(), strict=True))


def _candidates(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> list[tuple[str, float]]:
    """The best of the relation's answers, which may have any length."""
    ask_for = AskFor(needs="all")
    if (config.prompts / "config.yaml").is_file():
        run = from_yaml(ProbeConfig, config.prompts / "config.yaml")
        ask_for = AskFor(begin=run.bos == "always", needs="all")
    tasks = lama_tasks(
        load_data(prompt.data), backbone, ask_for, names=(prompt.relation,), splits=("test",), limit=None, seed=0
    )
    task = tasks[prompt.relation]
    example = task.examples["test"][0]._replace(fields={"X": config.subject}, gold=0)
    objective = WholeAnswers(needs="all", top=config.top)
    instance = task.instance(example, task.template(prompt.template), prompt.before)
    found = _asked(instance, objective, prompt, backbone)
    texts = [example.candidates[place] for place in found["top"][0].tolist() if place >= 0]
    return list(zip(texts, found["top_log_probability"][0].exp().tolist(), strict=False))


def _continuations(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> list[tuple[str, float]]:
    """What the model writes on its own."""
    if not backbone.causal:
        raise UsageError("--answers text: a masked model does not write; give --answers candidates or token")
    size, vectors = backbone.exact_size(PassSize()), prompt.vectors.to(backbone.device)

    @torch.no_grad()
    def log_probabilities(queries: Sequence[Query]) -> Tensor:
        batch = pack(queries, size.row_tokens).to(backbone.device)
        return backbone(batch, vectors)[batch.target_of_query].float().log_softmax(1)

    tokenization = backbone.tokenization
    decode, query = tokenization.tokenizer.decode, _query(config, prompt, backbone)
    return continuations(query, log_probabilities, ends(tokenization), lambda ids: str(decode(list(ids))), config.top)


def _query(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> Query:
    """That asks for the answer."""
    template = Template.parse(prompt.template)
    return template.render({"X": config.subject}, backbone.text_encoder(), before=prompt.before)


def _asked(instance: Instance, objective: Objective, prompt: SavedPrompt, backbone: Backbone) -> Answers:
    at = Workplace.shared(backbone, backbone.exact_size(PassSize()), World(device=backbone.device), objective)
    [found] = answers(at, [Questions([instance], objective)], prompt.vectors.to(backbone.device))
    return found


def allowed_answers(option: str, prompt: SavedPrompt, backbone: Backbone) -> Tensor:
    """Bool [vocabulary]: the answers that a prompt was learned or chosen among, where its data is still there."""
    try:
        data = load_data(prompt.data)
    except UsageError as error:
        if option == "auto":
            logger.warning("%s; answering among all tokens", error)
            option = "none"
        data = Data(prompt.data, {})
    return load_vocabulary(option, data, backbone.tokenization).allowed
