"""AutoPrompt (Shin et al., arXiv 2010.15980, section 2.2): a search for words where P-tuning learns vectors.

The pseudo tokens of the template are places for tokens of the vocabulary. In each step one place is chosen. A token e
there would change the loss, to first order, by (vector of e - vector of the present token) . gradient (HotFlip, arXiv
1712.06751); the tokens that promise most are tried on other facts, and the best one stays if it beats the present one.

As in the paper's fact retrieval (section 5.1), tokens that begin with a capital, which are mostly names, and those that
are objects of training facts are no candidates: the prompt shall ask, not answer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.tokenization import WORD
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes
from megaprompt.engine.trainer import Hooks, Interrupted
from megaprompt.errors import MegapromptError
from megaprompt.methods.method import Context, Scored, ShouldStop
from megaprompt.prompting.template import Place, Template
from megaprompt.seeds import seed_of
from megaprompt.tasks.task import Instance, Task


@dataclass(frozen=True)
class Search:
    """How long and how widely to search."""

    steps: int = 100
    candidates: int = 10  # tokens that are tried in a step
    batch_size: int = 32  # examples for the gradient, and as many others to try candidates on
    steps_per_dev: int = 10  # after so many steps the tokens are scored on dev


@dataclass(frozen=True)
class AutoPrompt:
    """Search for the words of each task, and score the best on test.

    Args:
        template: its pseudo tokens are the places for words; the paper's if None.
    """

    search: Search
    template: str | None = None

    columns = ("autoprompt",)

    def check(self, context: Context) -> None:
        for task in context.tasks.values():
            task.must_be_answerable("autoprompt")
            self._template(task, context)

    def _template(self, task: Task, context: Context) -> Template:
        """The paper's template for fact retrieval has five tokens to find."""
        end = task.end if context.backbone.causal else " ."
        return task.template(self.template or f"{' '.join(task.places)}<5>[Y]{end}")

    def run(self, context: Context) -> None:
        def score(task: Task, should_stop: ShouldStop) -> dict[str, Scored]:
            template = self._template(task, context)
            train, dev = task.training_instances(template), task.instances("dev", template)
            data = TrainingSet(task.name, task.objective, template.num_pseudo_tokens, train, dev)
            given = {text for example in task.examples["train"] for text in (example.answer, *example.candidates)}
            words = sorted(token for text in given for token in task.encoder.encode(f" {text}", False))
            at = context.at(task)
            with context.train_one("autoprompt", task, should_stop) as hooks:
                found = search(at, data, self.search, answers_of_train=words, seed=context.seed, hooks=hooks)
            test = filled(task.instances("test", template), found.tokens)
            row = context.row(task, template, found.dev, tokens=found.tokens, steps=found.step)
            row["template"] = text_of(template, found.tokens, context.backbone)
            context.save_template("autoprompt", task, row["template"])
            return {"autoprompt": Scored(row, answers(at, [Questions(test, task.objective)], None)[0])}

        context.each_task(self.columns, score, own_progress=True)


# ---------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Found:
    """The tokens that were best on dev."""

    tokens: list[int]
    dev: dict[str, float]  # scores on dev
    step: int  # after which they were found


def filled(instances: Sequence[Instance], tokens: Sequence[int]) -> list[Instance]:
    """The same instances with tokens in the places of the pseudo tokens."""
    return [
        each._replace(
            queries=tuple(
                query._replace(tokens=tuple(t if t >= 0 else tokens[-1 - t] for t in query.tokens))
                for query in each.queries
            )
        )
        for each in instances
    ]


def text_of(template: Template, tokens: Sequence[int], backbone: Backbone) -> str:
    """The prompt for people to read, and for `--discrete`; read again, it may be split differently."""
    text, start = "", 0
    tokenization = backbone.tokenization
    [word] = tokenization.encode([WORD], is_start=True)
    for piece in template.pieces:
        if isinstance(piece, int):  # behind a word, to see whether the first token goes on with it
            both = str(tokenization.tokenizer.decode([*word, *tokens[start : start + piece]]))
            text += both.removeprefix(WORD)
            start += piece
        else:
            text += f" {piece}" if isinstance(piece, Place) or not piece[0].isspace() else piece
    return " ".join(text.split())


def candidates_of(backbone: Backbone, answers_of_train: Iterable[int]) -> Tensor:
    """Bool [vocabulary] on the CPU: the tokens that may be put into a prompt."""
    tokenizer = backbone.tokenization.tokenizer
    texts = tokenizer.batch_decode([[token] for token in range(backbone.vocabulary_size)])
    words = [text.strip() for text in texts]
    # Broken characters are parts of letters, which no text could hold; brackets would be taken for [X] and [Y].
    good = torch.tensor([bool(w) and not w[0].isupper() and not set(w) & set("\ufffd[]<>") for w in words])
    good[list(answers_of_train)] = False
    good[[token for token in tokenizer.all_special_ids if token < len(good)]] = False
    return good


def _batches(data: TrainingSet, size: int, seed: int) -> Iterator[list[Instance]]:
    """Training instances without end, in an order that is a function of seed, task and epoch."""
    epoch = 0
    while True:
        order = list(range(len(data.train)))
        random.Random(seed_of(seed, data.task, "autoprompt", epoch)).shuffle(order)
        for start in range(0, len(order), size):
            yield [data.train[i] for i in order[start : start + size]]
        epoch += 1


def _places(data: TrainingSet, seed: int) -> Iterator[int]:
    """Which pseudo token comes next: all of them in a random order, then again."""
    chance = random.Random(seed_of(seed, data.task, "places"))
    while True:
        yield from chance.sample(range(data.num_pseudo_tokens), data.num_pseudo_tokens)


def promising(at: Workplace, questions: Questions, tokens: Sequence[int], place: int) -> Tensor:
    """How much each token [vocabulary], put into a place, would lower the mean loss, to first order and up to a
    constant: minus the product of its vector with the gradient at the place."""
    vectors = at.backbone.embeddings(tokens).to(at.backbone.device).requires_grad_()
    count = len(questions.instances)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    backward_passes(at, vectors, [questions], weights, lambda loss, last: loss.backward())
    assert vectors.grad is not None  # even of a rank without questions: zeros, from its empty passes
    return -at.backbone.embedding_products(at.world.sum_(vectors.grad, "gradients")[place])


@torch.no_grad()
def losses(at: Workplace, wordings: Sequence[Questions]) -> Tensor:
    """The mean loss [wordings] of several wordings of the same questions, which are packed together."""
    count = sum(len(wording.instances) for wording in wordings)
    found = backward_passes(at, None, wordings, torch.ones(count, dtype=torch.float64), lambda loss, last: None)
    return found.view(len(wordings), -1).mean(1)


def search(
    at: Workplace,
    data: TrainingSet,
    settings: Search,
    *,
    answers_of_train: Iterable[int],
    seed: int,
    hooks: Hooks,
) -> Found:
    """Search for the tokens of one task. All ranks call it together, and share the questions of every batch.

    Args:
        data: the pseudo tokens of its queries are the places.
        answers_of_train: tokens that may not be put into the prompt.

    Raises:
        MegapromptError: there are no places for tokens, or no tokens for them.
        Interrupted: `hooks.should_stop` said so on some rank.
    """
    if not data.num_pseudo_tokens:
        raise MegapromptError(f"relation {data.task}: AutoPrompt needs pseudo tokens in --template")
    candidates = candidates_of(at.backbone, answers_of_train)
    if not candidates.any():
        raise MegapromptError(f"{at.backbone.name} has no token that AutoPrompt could put into a prompt")
    mask = at.backbone.text_encoder().mask
    the = at.backbone.tokenization.encode([" the"], is_start=False)[0][0] if mask is None else mask
    tokens = [the] * data.num_pseudo_tokens
    batches, places = _batches(data, settings.batch_size, seed), _places(data, seed)
    best: Found | None = None
    tested: list[int] = []
    for step in range(1, settings.steps + 1):
        place = next(places)
        gains = promising(at, Questions(next(batches), data.objective), tokens, place).cpu()
        gains = gains.masked_fill(~candidates, -torch.inf)
        tried = gains.topk(min(settings.candidates, int(candidates.sum()))).indices.tolist()
        choices = [tokens] + [[*tokens[:place], token, *tokens[place + 1 :]] for token in tried]
        batch = next(batches)
        loss = losses(at, [Questions(filled(batch, choice), data.objective) for choice in choices])
        tokens = choices[int(loss.argmin())]
        if (step % settings.steps_per_dev == 0 or step == settings.steps) and tokens != tested:
            tested = tokens
            found = _scored(at, data, tokens, step)
            selects = data.objective.selects
            better = best is None or [found.dev[n] for n in selects] > [best.dev[n] for n in selects]
            best = found if better else best
            about = {
                "time": time.time(),
                "relation": data.task,
                "step": step,
                "loss": loss.min().item(),
                "best": better,
            }
            hooks.log({**about, **{f"dev_{name}": found.dev[name] for name in selects}, "tokens": tokens})
        hooks.progress(step, settings.steps, step)
        if at.world.max_(torch.tensor(int(hooks.should_stop())), "schedule"):
            raise Interrupted(f"interrupted; continue with --resume, which searches {data.task} from its start")
    assert best is not None
    return best


def _scored(at: Workplace, data: TrainingSet, tokens: list[int], step: int) -> Found:
    [found] = answers(at, [Questions(filled(data.dev, tokens), data.objective)], None)
    return Found(tokens, data.objective.measure(found, data.dev), step)
