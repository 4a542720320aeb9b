"""AutoPrompt (Shin et al., arXiv 2010.15980, section 2.2): a search for words where P-tuning learns vectors.

The pseudo tokens of the template are places for tokens of the vocabulary. In each step one place is chosen. A token e
there would change the loss, to first order, by (vector of e - vector of the present token) . gradient (HotFlip, arXiv
1712.06751); the tokens that promise most are tried on other facts, and the best one stays if it beats the present one.

As in the paper's fact retrieval (section 5.1), tokens that begin with a capital, which are mostly names, and those that
are objects of training facts are no candidates: the prompt shall ask, not answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import WORD
from megaprompt.distributed.launch import World
from megaprompt.engine.evaluation import metrics, predict
from megaprompt.engine.training import Hooks, Interrupted, backward_passes
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.template import Query, Template
from megaprompt.seeds import seed_of
from megaprompt.tasks.task import Examples, Task


@dataclass(frozen=True)
class Search:
    """How long and how widely to search."""

    steps: int = 100
    candidates: int = 10  # tokens that are tried in a step
    batch_size: int = 32  # facts for the gradient, and as many others to try candidates on
    steps_per_dev: int = 10  # after so many steps the tokens are scored on dev


@dataclass(frozen=True)
class Found:
    """The tokens that were best on dev."""

    tokens: list[int]
    dev: dict[str, float]  # scores on dev
    step: int  # after which they were found


def default_template(causal: bool) -> Template:
    """The paper's template for fact retrieval, with five tokens to find."""
    return Template.parse("[X]<5>[Y]" if causal else "[X]<5>[Y] .")


def filled(examples: Examples, tokens: Sequence[int]) -> Examples:
    """The same queries with tokens in the places of the pseudo tokens."""
    queries = [q._replace(tokens=tuple(t if t >= 0 else tokens[-1 - t] for t in q.tokens)) for q in examples.queries]
    return Examples(queries, examples.objects)


def text_of(template: Template, tokens: Sequence[int], backbone: Backbone) -> str:
    """The prompt for people to read, and for `--discrete`; read again, it may be split differently."""
    text, start = "", 0
    [word] = backbone.encode([WORD], is_start=True)
    for piece in template.pieces:
        if isinstance(piece, int):  # behind a word, to see whether the first token goes on with it
            both = str(backbone.tokenizer.decode([*word, *tokens[start : start + piece]]))
            text += both.removeprefix(WORD)
            start += piece
        else:
            text += piece if piece[0].isspace() else f" {piece}"
    return " ".join(text.split())


def candidates_of(backbone: Backbone, objects: Iterable[int]) -> Tensor:
    """Bool [vocabulary] on the CPU: the tokens that may be put into a prompt."""
    texts = backbone.tokenizer.batch_decode([[token] for token in range(backbone.vocabulary_size)])
    words = [text.strip() for text in texts]
    # Broken characters are parts of letters, which no text could hold; brackets would be taken for [X] and [Y].
    good = torch.tensor([bool(w) and not w[0].isupper() and not set(w) & set("\ufffd[]<>") for w in words])
    good[list(objects)] = False
    good[[token for token in backbone.tokenizer.all_special_ids if token < len(good)]] = False
    return good


def _batches(task: Task, size: int, seed: int) -> Iterator[Examples]:
    """Training facts without end, in an order that is a function of seed, relation and epoch."""
    epoch = 0
    while True:
        order = list(range(len(task.train)))
        random.Random(seed_of(seed, task.relation, "autoprompt", epoch)).shuffle(order)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield Examples([task.train.queries[i] for i in part], [task.train.objects[i] for i in part])
        epoch += 1


def _places(task: Task, seed: int) -> Iterator[int]:
    """Which pseudo token comes next: all of them in a random order, then again."""
    chance = random.Random(seed_of(seed, task.relation, "places"))
    while True:
        yield from chance.sample(range(task.num_pseudo_tokens), task.num_pseudo_tokens)


def promising(
    backbone: Backbone, examples: Examples, tokens: Sequence[int], place: int, *, world: World, size: PassSize
) -> Tensor:
    """How much each token [vocabulary], put into a place, would lower the mean loss, to first order and up to a
    constant: minus the product of its vector with the gradient at the place."""
    vectors = backbone.embeddings(tokens).to(backbone.device).requires_grad_()
    backward_passes(
        backbone,
        vectors,
        examples.queries,
        examples.objects,
        torch.full((len(examples),), 1 / len(examples), dtype=torch.float64),
        lambda loss, last: loss.backward(),
        world=world,
        everyone=world,
        size=size,
    )
    assert vectors.grad is not None  # even of a rank without facts: zeros, from its empty passes
    return -backbone.embedding_products(world.sum_(vectors.grad, "gradients")[place])


def search(
    backbone: Backbone,
    task: Task,
    settings: Search,
    *,
    allowed: Tensor,
    seed: int,
    size: PassSize,
    world: World,
    hooks: Hooks,
) -> Found:
    """Search for the tokens of one relation. All ranks call it together, and share the facts of every batch.

    Args:
        task: the pseudo tokens of its queries are the places.
        allowed: bool [vocabulary], the tokens that count as answers on dev.

    Raises:
        MegapromptError: there are no facts to search with, or no places.
        Interrupted: `hooks.should_stop` said so on some rank.
    """
    if not len(task.train) or not len(task.dev) or not task.num_pseudo_tokens:
        raise MegapromptError(f"relation {task.relation}: AutoPrompt needs facts in train and dev, and pseudo tokens")
    candidates = candidates_of(backbone, task.train.objects)
    if not candidates.any():
        raise MegapromptError(f"{backbone.name} has no token that AutoPrompt could put into a prompt")
    mask = backbone.text_encoder().mask
    tokens = [backbone.encode([" the"], is_start=False)[0][0] if mask is None else mask] * task.num_pseudo_tokens
    batches, places = _batches(task, settings.batch_size, seed), _places(task, seed)
    best: Found | None = None
    tested: list[int] = []
    for step in range(1, settings.steps + 1):
        place = next(places)
        gains = promising(backbone, next(batches), tokens, place, world=world, size=size).cpu()
        gains = gains.masked_fill(~candidates, -torch.inf)
        tried = gains.topk(min(settings.candidates, int(candidates.sum()))).indices.tolist()
        choices = [tokens] + [[*tokens[:place], token, *tokens[place + 1 :]] for token in tried]
        facts = next(batches)
        loss = losses(backbone, [filled(facts, choice) for choice in choices], allowed, world=world, size=size)
        tokens = choices[int(loss.argmin())]
        if (step % settings.steps_per_dev == 0 or step == settings.steps) and tokens != tested:
            tested = tokens
            dev = filled(task.dev, tokens)
            rank = predict(backbone, dev.queries, dev.objects, None, allowed=allowed, world=world, size=size).rank
            scores = metrics(rank)
            better = best is None or (scores["p_at_1"], scores["mrr"]) > (best.dev["p_at_1"], best.dev["mrr"])
            if better:
                best = Found(tokens, scores, step)
            about = {"relation": task.relation, "step": step, "loss": loss.min().item(), "best": better}
            hooks.log({**about, **{f"dev_{name}": scores[name] for name in ("p_at_1", "mrr")}, "tokens": tokens})
        hooks.progress(step, settings.steps, step)
        if world.max_(torch.tensor(int(hooks.should_stop())), "schedule"):
            raise Interrupted(f"interrupted; continue with --resume, which searches {task.relation} from its start")
    assert best is not None
    return best


def losses(
    backbone: Backbone, wordings: Sequence[Examples], allowed: Tensor, *, world: World, size: PassSize
) -> Tensor:
    """The mean loss [wordings] of several wordings of the same facts, which are packed together."""
    queries: list[Query] = [query for wording in wordings for query in wording.queries]
    objects = [token for wording in wordings for token in wording.objects]
    found = predict(backbone, queries, objects, None, allowed=allowed, world=world, size=size)
    return -found.log_probability.view(len(wordings), -1).mean(1)
