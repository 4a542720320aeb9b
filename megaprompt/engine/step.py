"""One optimizer step of several tasks through one backbone.

The loss of a task is the mean over its batch; the loss of a step is their sum, and since no prompt occurs in another
task's queries, each task gets exactly the gradient that it would get alone.

The backbone never sees the prompt encoders, only their output, a matrix of a few vectors. Its gradient is all that
passes and ranks add up; each rank then runs it through its own replica of the encoders. So what is communicated is
[pseudo tokens, hidden size] however large the encoders are. All replicas use the vectors of the first, whose encoders
are those that are saved: were a kernel not deterministic, the others would be no part of the results.

A task whose loss is not a number any more is retired, and the others go on. In a packed row it makes its neighbours'
losses infinite or undefined as well, so such a step is computed again with each task in passes of its own: what is
still wrong then is wrong by itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaprompt.distributed.loss_scale import NO_SCALING
from megaprompt.engine.learner import Learner
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes
from megaprompt.engine.weights import Weights
from megaprompt.tasks.task import Instance

logger = logging.getLogger(__name__)


def numbered_from(instances: Sequence[Instance], offset: int) -> list[Instance]:
    """The same instances with their pseudo tokens numbered from `offset`."""
    if not offset:
        return list(instances)
    return [
        each._replace(
            queries=tuple(
                query._replace(tokens=tuple(t if t >= 0 else t - offset for t in query.tokens))
                for query in each.queries
            )
        )
        for each in instances
    ]


class _Batch(NamedTuple):
    """What one task contributes to a step."""

    learner: Learner
    instances: list[Instance]  # the pseudo tokens of their queries index the joint prompt matrix
    rows: slice  # of the joint prompt matrix

    def questions(self) -> Questions:
        return Questions(self.instances, self.learner.data.objective, self.learner.head)

    def weights(self) -> Tensor:
        """[batch] float64: what the loss of each instance counts."""
        each = self.learner.loss_scale.scale / len(self.instances)
        return torch.full((len(self.instances),), each, dtype=torch.float64)


def next_batches(learners: Sequence[Learner]) -> list[_Batch]:
    """The next batch of every learner, as they stand in one pass."""
    batches, offset = [], 0
    for learner in learners:
        instances = [learner.data.train[i] for i in learner.next_batch()]
        rows = slice(offset, offset + learner.data.num_pseudo_tokens)
        batches.append(_Batch(learner, numbered_from(instances, offset), rows))
        offset = rows.stop
    return batches


def train_step(
    at: Workplace, learners: Sequence[Learner], weights: Weights | None, number: int
) -> list[dict[str, Any]]:
    """One step for every learner; all ranks call it, some maybe without learners.

    Args:
        weights: the backbone's own, if they are trained too.
        number: of the step, from 1.

    Returns:
        Log lines of tasks that had to be retired.
    """
    batches = next_batches(learners)
    encoders = [learner.encoder for learner in learners if learner.encoder is not None]
    outputs = torch.cat([encoder() for encoder in encoders]) if encoders else None
    prompts = None
    if outputs is not None:
        prompts = at.world.same_(outputs.detach().clone(), "prompts").requires_grad_()
    elif weights is None:  # nothing to train here, but this rank's part of the backbone is still needed
        prompts = torch.zeros(1, at.backbone.embedding_size, device=at.backbone.device, requires_grad=True)
    with nullcontext() if weights is None else weights.learning(*_seed(learners[0])):
        losses = _losses(at, batches, prompts, weights)
    gradient = torch.zeros(0)
    if outputs is not None:
        assert prompts is not None
        assert prompts.grad is not None  # even of a rank without instances: zeros, from its empty passes
        gradient = at.world.sum_(prompts.grad, "gradients")
    overflows, lines = [], []
    for batch, loss in zip(batches, losses, strict=True):
        overflow = _unscale(at, batch, gradient, weights)
        wrong = not math.isfinite(loss.mean().item())
        if wrong:
            about = {"time": time.time(), "step": number}
            lines.append({**about, **batch.learner.retire(f"the loss is {loss.mean().item()}")})
        if wrong or overflow:
            gradient[batch.rows] = 0
        overflows.append(overflow)
    if outputs is not None:
        outputs.backward(gradient)
    for batch, loss, overflow in zip(batches, losses, overflows, strict=True):
        if batch.learner.active:
            _end_step(batch.learner, loss, overflow, weights, number)
    return lines


def _seed(learner: Learner) -> tuple[object, ...]:
    """What all that is random in a step follows from."""
    return learner.seed, learner.data.task, learner.step


def _losses(at: Workplace, batches: Sequence[_Batch], prompts: Tensor | None, weights: Weights | None) -> list[Tensor]:
    """The losses of each batch, with gradients of `prompts`, heads and weights; wrong ones are so by themselves."""
    losses = _passes(at, batches, prompts, weights)
    wrong = any(not loss.isfinite().all() for loss in losses)
    wrong_anywhere, most = at.everyone.max_(torch.tensor([int(wrong), len(batches)]), "schedule").tolist()
    if not wrong_anywhere or most < 2:
        return losses
    for tensor in [prompts, *(p for batch in batches for p in batch.learner.parameters)]:
        if tensor is not None:
            tensor.grad = None
    alone = []
    for i in range(most):  # as many times on all ranks
        alone += _passes(at, batches[i : i + 1], prompts, weights)
    return alone


def _passes(at: Workplace, batches: Sequence[_Batch], prompts: Tensor | None, weights: Weights | None) -> list[Tensor]:
    counts = torch.cat([batch.weights() for batch in batches]) if batches else torch.zeros(0)
    backward = weights.backward if weights is not None else lambda loss, last: loss.backward()
    losses = backward_passes(at, prompts, [batch.questions() for batch in batches], counts, backward)
    return list(losses.split([len(batch.instances) for batch in batches])) if batches else []


def _unscale(at: Workplace, batch: _Batch, gradient: Tensor, weights: Weights | None) -> bool:
    """Take the loss scale out of the gradients of one task; whether they overflowed."""
    scale = batch.learner.loss_scale.scale * (1.0 if weights is None else weights.scale)
    learner, parts = batch.learner, [gradient[batch.rows]]
    for parameter in learner.head.parameters() if learner.head is not None else ():
        if parameter.grad is None:  # this rank had no instances of the batch
            parameter.grad = torch.zeros_like(parameter)
        parts.append(at.world.sum_(parameter.grad, "gradients"))
    for part in parts:
        part.div_(scale)
    return learner.loss_scale != NO_SCALING and not all(part.isfinite().all() for part in parts)


def _end_step(learner: Learner, loss: Tensor, overflow: bool, weights: Weights | None, number: int) -> None:
    if weights is not None:
        learner.end_step(loss, weights.step(learner.rate(weights.recipe), learner.parameters))
        return
    learner.end_step(loss, overflow)
    if overflow:
        about = (learner.data.name, number, learner.loss_scale.scale)
        logger.info("%s: skipped step %d, gradients overflowed; the loss scale is now %g", *about)


@torch.no_grad()
def score_dev(
    at: Workplace, learners: Sequence[Learner], keep: Callable[[Learner], Any], step: int
) -> list[dict[str, Any]]:
    """Score tasks on dev; returns their log lines.

    Args:
        keep: what is wanted of a learner that is the best so far.
    """
    questions, vectors, offset = [], [], 0
    for learner in learners:
        dev = numbered_from(learner.data.dev, offset)
        questions.append(Questions(dev, learner.data.objective, learner.head))
        offset += learner.data.num_pseudo_tokens
        if learner.encoder is not None:
            vectors.append(learner.encoder())
    prompts = at.world.same_(torch.cat(vectors), "prompts") if vectors else None
    found = answers(at, questions, prompts)
    lines = []
    for learner, one in zip(learners, found, strict=True):
        scores = learner.data.objective.measure(one, learner.data.dev)
        line = learner.take_dev(scores, lambda learner=learner: keep(learner))  # type: ignore[misc]
        lines.append({"time": time.time(), "step": step, **line})
    return lines
