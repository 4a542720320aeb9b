"""Asking the backbone about one subject, with a saved prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megaprompt.backbone import Backbone, dtype_of, load_backbone
from megaprompt.config import AskConfig, ProbeConfig, from_yaml
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts
from megaprompt.tasks.lama.continuations import LONGEST, continuations, ends
from megaprompt.tasks.lama.facts import Data, load_data
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.lama.whole_answers import WholeAnswers
from megaprompt.tasks.objective import Answers, Objective
from megaprompt.tasks.task import Instance

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
        if prompt.vectors.shape[1] != backbone.embedding_size:
            raise MegapromptError(
                f"{prompt.path}: has vectors of {prompt.vectors.shape[1]} numbers, where {backbone.name} has "
                f"{backbone.embedding_size}; give the --backbone that they were learned on"
            )
        if prompt.fingerprint not in ("", backbone.fingerprint):
            raise MegapromptError(
                f"{prompt.path}: learned on {prompt.backbone} (weights {prompt.fingerprint}), not on {backbone.name} "
                f"(weights {backbone.fingerprint}); give --backbone {prompt.backbone}, and the same --dtype"
            )
    return backbone


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
    kind = config.answers or answers_of(config.prompts, prompt)
    return {"token": _tokens, "candidates": _candidates, "text": _continuations}[kind](config, prompt, backbone)


def run_of(directory: Path) -> ProbeConfig | None:
    """The options of the run whose prompts are in a directory; None if it is not that of a run."""
    path = directory / "config.yaml"
    return from_yaml(ProbeConfig, path) if path.is_file() else None


def answers_of(directory: Path, prompt: SavedPrompt) -> str:
    """What kind of answers a prompt was learned or chosen for, token or candidates: its run says so, or its data."""
    run = run_of(directory)
    if run is not None and run.answers is not None:
        return run.answers
    try:
        return "candidates" if load_data(prompt.data).whole_answers else "token"
    except UsageError:  # the data is there no more
        return "token"


def _tokens(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> list[tuple[str, float]]:
    """The best allowed tokens."""
    objective = OneToken(
        allowed_answers(config.prompts, config.vocab, prompt, backbone), backbone.tokenization.text_of, config.top
    )
    instance = Instance((_query(config, prompt, backbone),), 0)
    found = _asked(instance, objective, prompt, backbone)
    best = [backbone.tokenization.text_of(token) for token in found["top_tokens"][0].tolist()]
    return list(zip(best, found["top_log_probability"][0].exp().tolist(), strict=True))


def _candidates(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> list[tuple[str, float]]:
    """The best of the relation's answers, which may have any length."""
    run = run_of(config.prompts)
    ask_for = AskFor(begin=run is not None and run.bos == "always", needs="all")
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
    query, most = _query(config, prompt, backbone), backbone.max_positions
    if most is not None and len(query.tokens) + LONGEST > most:
        raise UsageError(
            f"{config.subject[:20]!r} ...: the question has {len(query.tokens)} tokens, of the {most} that "
            f"{backbone.name} can be given {LONGEST} are for the answer; ask for something shorter"
        )
    size, vectors = backbone.exact_size(PassSize()), prompt.vectors.to(backbone.device)

    @torch.no_grad()
    def log_probabilities(queries: Sequence[Query]) -> Tensor:
        batch = pack(queries, size.row_tokens).to(backbone.device)
        return backbone(batch, vectors)[batch.target_of_query].float().log_softmax(1)

    tokenization = backbone.tokenization
    decode = tokenization.tokenizer.decode
    return continuations(query, log_probabilities, ends(tokenization), lambda ids: str(decode(list(ids))), config.top)


def _query(config: AskConfig, prompt: SavedPrompt, backbone: Backbone) -> Query:
    """That asks for the answer."""
    template = Template.parse(prompt.template)
    return template.render({"X": config.subject}, backbone.text_encoder(), before=prompt.before)


def _asked(instance: Instance, objective: Objective, prompt: SavedPrompt, backbone: Backbone) -> Answers:
    at = Workplace.shared(backbone, backbone.exact_size(PassSize()), World(device=backbone.device), objective)
    [found] = answers(at, [Questions([instance], objective)], prompt.vectors.to(backbone.device))
    return found


def allowed_answers(directory: Path, option: str, prompt: SavedPrompt, backbone: Backbone) -> Tensor:
    """Bool [vocabulary]: the answers that a prompt was learned or chosen among, where its data is still there."""
    run = run_of(directory)
    if option == "auto" and run is not None:
        option = run.vocab
    try:
        data = load_data(prompt.data)
    except UsageError as error:
        if option == "auto":
            logger.warning("%s; answering among all tokens", error)
            option = "none"
        data = Data(prompt.data, {})
    return load_vocabulary(option, data, backbone.tokenization).allowed
