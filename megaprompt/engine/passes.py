"""Passes: questions of any kinds through the backbone, forward for answers, and backward for gradients.

A *pass* is one packed micro-batch per rank. It takes questions of many tasks; each task's objective makes of its part
of the outputs what it needs, and neither backbone nor packing know which kinds of questions there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megaprompt.backbone import Backbone
from megaprompt.distributed.world import World
from megaprompt.engine.groups import Groups, first_targets
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.parts import Asked, PackedPass, Part
from megaprompt.engine.schedule import my_passes, padded
from megaprompt.engine.trunks import SHARE, Trunks, cut_instances, may_be_cut
from megaprompt.prompting.packing import PassSize, moved, split_into_passes
from megaprompt.prompting.trunks import Trunk
from megaprompt.tasks.objective import Answers, Objective
from megaprompt.tasks.task import Instance

AfterPass = Callable[[int, int], None]
"""Called by all ranks after each pass that answers questions, with its number and how many there will be."""


def go_on(done: int, total: int) -> None:
    """After a pass: nothing else."""


@dataclass(frozen=True)
class Workplace:
    """Where passes are computed: the backbone, how much of it at once, and by whom.

    Args:
        world: the ranks that share questions.
        everyone: all ranks that hold the backbone together; they make the same number of passes.
        reads: what is read at targets, the same for all questions of these ranks.
        trunks: keys and values of constant text, and an account of what was computed.
    """

    backbone: Backbone
    size: PassSize
    world: World
    everyone: World
    reads: Literal["logits", "hidden"] = "logits"
    trunks: Trunks = field(default_factory=Trunks, repr=False)
    after_pass: AfterPass = field(default=go_on, repr=False)

    @classmethod
    def shared(
        cls, backbone: Backbone, size: PassSize, world: World, objective: Objective, after_pass: AfterPass = go_on
    ) -> Workplace:
        """Where all ranks share all questions of an objective."""
        return cls(backbone, size, world, world, objective.reads, after_pass=after_pass)


class Questions(NamedTuple):
    """Instances of one task, and how their answers are scored."""

    instances: Sequence[Instance]
    objective: Objective
    head: nn.Module | None = None


def with_trunks(at: Workplace, data: Sequence[TrainingSet], trunk_bytes: int | None) -> list[TrainingSet]:
    """What is learned from, with the trunks of its queries known for as long as it lasts (see `trunks`).

    Args:
        trunk_bytes: memory of each rank for them; a sixteenth of what the rank has if None.
    """
    if not may_be_cut(at.backbone, at.size):
        return list(data)
    budget = at.everyone.memory() // SHARE if trunk_bytes is None else trunk_bytes
    return at.trunks.lasting_in(data, budget // at.backbone.known_bytes)


def _flat(questions: Sequence[Questions]) -> list[Asked]:
    return [Asked(instance, each.objective, each.head) for each in questions for instance in each.instances]


def _cut_once(at: Workplace, asked: list[Asked]) -> list[Asked]:
    """The same, with queries cut where it pays for this call alone."""
    if not may_be_cut(at.backbone, at.size):
        return asked
    instances = cut_instances([each.instance for each in asked], row_tokens=at.size.row_tokens)
    return [each._replace(instance=instance) for each, instance in zip(asked, instances, strict=True)]


def _computed(
    at: Workplace,
    asked: Sequence[Asked],
    passes: Iterable[list[int]],
    prompts: Tensor | None,
    keep: Mapping[int, Trunk] | None = None,
) -> Iterator[tuple[Tensor, list[Part]]]:
    """What the backbone gives at the targets of each pass [N, D], and the parts of the pass.

    Args:
        keep: trunks that end at the first target of what is asked, by its index: to be kept when they are computed.
    """
    cut = any(query.cuts for each in asked for query in each.instance.queries)
    cut_anywhere = bool(at.everyone.max_(torch.tensor(int(cut)), "schedule"))
    ahead = (PackedPass.of(at.backbone, asked, indices, at.size.row_tokens) for indices in passes)
    current, collect = next(ahead, None), keep is not None
    while current is not None:
        known = at.trunks.of(current.batch, at.backbone, at.everyone, collect) if cut_anywhere or collect else None
        values = at.backbone(current.batch, prompts, at.reads, known)
        after = next(ahead, None)  # packed while a GPU computes this one
        if keep is not None and known is not None:
            order = {i: asked[i].instance for part in current.parts for i in part.indices}
            at.trunks.keep(current.on_host, known, first_targets(order, keep))
        at.trunks.counts["tokens"] += current.batch.token_ids.numel()
        yield values, current.parts
        current = after


def backward_passes(
    at: Workplace,
    prompts: Tensor | None,
    questions: Sequence[Questions],
    weights: Tensor,
    backward: Callable[[Tensor, bool], None],
) -> Tensor:
    """The losses [I] of all instances, after running `backward` on their weighted sum, pass by pass.

    Args:
        prompts: prompt matrix that the queries' pseudo tokens index.
        weights: [I] float64.
        backward: gets the weighted loss of each pass of this rank, and whether it is the last one.
    """
    asked = _flat(questions)
    losses = torch.zeros(len(asked), dtype=torch.float64)
    passes = padded(my_passes([each.instance.queries for each in asked], at.world, at.size), at.everyone)
    found: list[tuple[list[int], Tensor]] = []
    for number, (values, parts) in enumerate(_computed(at, asked, passes, prompts), start=1):
        total = None if parts else values.sum()  # of nothing, but it goes backward with the others
        for part in parts:
            loss = part.objective.loss(part.outputs(values), part.gold, part.head)
            found.append((part.indices, loss.detach()))
            weighted = (loss * moved(weights[part.indices].to(loss.dtype), loss.device)).sum()
            total = weighted if total is None else total + weighted
        assert total is not None
        backward(total, number == len(passes))
    for indices, loss in found:  # which waits for a GPU
        losses[indices] = loss.double().cpu()
    return at.world.sum_(losses, "losses")


@torch.no_grad()
def answers(at: Workplace, questions: Sequence[Questions], prompts: Tensor | None) -> list[Answers]:
    """What the backbone answers to the instances of each task; the ranks share the work, and all get all answers.

    Args:
        prompts: prompt matrix that the queries' pseudo tokens index.
    """
    asking = [each.objective.rounds(each.instances) for each in questions]
    open_ = {task: next(rounds) for task, rounds in enumerate(asking)}
    found: dict[int, Answers] = {}
    groups = Groups(at.trunks, _tokens_to_keep(at, questions))
    try:
        while True:
            asked = {task: questions[task]._replace(instances=instances) for task, instances in open_.items()}
            for task, read in zip(list(open_), _read(at, asked, prompts, groups), strict=True):
                try:
                    open_[task] = asking[task].send(read)
                except StopIteration as end:
                    found[task] = end.value
                    del open_[task]
            if not at.everyone.max_(torch.tensor(len(open_)), "schedule"):  # other ranks may have more rounds
                return [found[task] for task in range(len(questions))]
    finally:
        groups.forget()


def _tokens_to_keep(at: Workplace, questions: Sequence[Questions]) -> int:
    """How many tokens' keys and values may be kept between rounds; all ranks must call it."""
    goes_on = may_be_cut(at.backbone, at.size) and any(each.objective.goes_on for each in questions)
    if not at.everyone.max_(torch.tensor(int(goes_on)), "schedule"):
        return 0
    return at.everyone.memory() // SHARE // at.backbone.known_bytes


def _read(at: Workplace, questions: Mapping[int, Questions], prompts: Tensor | None, groups: Groups) -> list[Answers]:
    """One round of `answers`."""
    place = [(task, i) for task, each in questions.items() for i in range(len(each.instances))]
    asked = _flat(list(questions.values()))
    names = [(task, one.instance.group or i) for (task, i), one in zip(place, asked, strict=True)]
    asked = [one._replace(instance=groups.going_on(name, one.instance)) for name, one in zip(names, asked, strict=True)]
    asked = _cut_once(at, asked)
    found = {task: each.objective.blank(len(each.instances)) for task, each in questions.items()}
    ranks = groups.ranks(names, [each.instance for each in asked], at.world.size)
    mine = my_passes([each.instance.queries for each in asked], at.world, at.size, ranks)
    own = sorted(i for indices in mine for i in indices)
    keep = groups.to_keep({i: (names[i], asked[i].instance) for i in own if asked[i].objective.goes_on})
    passes = padded(mine, at.everyone)
    for number, (values, parts) in enumerate(_computed(at, asked, passes, prompts, keep), start=1):
        for part in parts:
            rows_of: dict[int, list[int]] = {}
            for row, i in enumerate(part.indices):
                rows_of.setdefault(place[i][0], []).append(row)
            for name, read in part.objective.read(part.outputs(values), part.gold, part.head).items():
                for task, rows in rows_of.items():
                    found[task][name][[place[part.indices[row]][1] for row in rows]] = read[rows]
        at.after_pass(number, len(passes))
    return [_of_all_ranks(each, at.world) for each in found.values()]


def _of_all_ranks(part: Answers, world: World) -> Answers:
    return {name: world.sum_(values, "predictions") for name, values in part.items()}


@torch.no_grad()
def joint_answers(
    at: Workplace, wordings: Sequence[Sequence[Instance]], weights: Sequence[float], objective: Objective
) -> Answers:
    """Answers by several wordings of the same instances together: by the weighted mean of their log-probabilities.

    Args:
        wordings: for each wording, all instances.
        weights: of the wordings. (LPAQA, arXiv 1911.12543, equation 4.)
    """
    count = len(wordings[0])
    found: list[tuple[list[int], Answers]] = []
    # The scores of all instances of a part are in memory, 64 MB. Each rank has all wordings of its instances, which are
    # packed together: where they begin alike, mostly with the subject, that is computed once.
    at_once = max(1, (1 << 24) // at.backbone.vocabulary_size)
    share = range(at.world.rank, count, at.world.size)
    for start in range(0, len(range(0, count, at.world.size)), at_once):  # as often on all ranks
        mine = share[start : start + at_once]
        asked = _cut_once(at, _flat([Questions([wording[i] for i in mine], objective) for wording in wordings]))
        passes = padded(split_into_passes([each.instance.queries for each in asked], at.size), at.everyone)
        together: Tensor | None = None
        for values, parts in _computed(at, asked, passes, None):
            for part in parts:
                scores = objective.scores(part.outputs(values), part.head)
                if together is None:
                    together = torch.zeros(len(mine), scores.shape[1], dtype=scores.dtype, device=scores.device)
                weight = torch.tensor(
                    [weights[i // len(mine)] for i in part.indices], dtype=scores.dtype, device=scores.device
                )
                instance = torch.tensor([i % len(mine) for i in part.indices], dtype=torch.int64, device=scores.device)
                together.index_add_(0, instance, scores.log_softmax(1) * weight[:, None])
        if together is not None:
            gold = torch.tensor([wordings[0][i].gold for i in mine], dtype=torch.int64, device=together.device)
            found.append((list(mine), objective.answer(together, gold)))
    everywhere = [one for rank in at.world.gather(found) for one in rank]
    order = torch.tensor([i for places, _ in everywhere for i in places]).argsort()
    return {name: torch.cat([answer[name] for _, answer in everywhere])[order] for name in everywhere[0][1]}
