"""Seconds until prompts reach a given score on dev: the original algorithm, PEFT, p-tuning and best, in one run.

    python benchmarks/time_to_score.py [--data world] [--relations P36,P30,P17,P37] [--backbone smollm2-135m]
                                       [--limit-facts 300] [--share 0.9] [--cut 30] [--cut-peft 10]

The score to reach is, for each relation, `--share` of what megaprompt's p-tuning ends with on dev, as P@1 among the
allowed answers. All four learn from the same facts with the same frozen model and threads:

(p-tuning) and (best): megaprompt with the default recipe, all relations together. Time counts from the start of
    learning to the end of the step after which all relations have the score, with the scoring of dev; for best also the
    choice of demonstrations before.
(original): the algorithm of "GPT Understands, Too" as in throughput.py, with the paper's recipe: learning rate 1e-5,
    weight decay 5e-4, decay 0.98 an epoch, batches of 8, dev scored after every epoch.
(peft): PEFT's PromptEncoder with the settings of its own example: 20 virtual tokens, hidden size 128, learning rate
    1e-3, batches of 32, 20 epochs.

The last two learn one relation after the other, each of which is cut off at `--cut` (`--cut-peft`) times the seconds of
p-tuning, divided by the number of relations; what they have reached by then is told. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from throughput import Original, Peft, finish
from torch import Tensor

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.distributed.world import World
from megaprompt.engine.trainer import Hooks, Trainer
from megaprompt.methods.candidates import PAPER, Candidate, candidates, rungs_of
from megaprompt.methods.untrained import Wording, choose, drawn
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import new_prompt_encoder
from megaprompt.prompting.recipe import RECIPES
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.one_token import rank_of_gold
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.task import Task

SHOWN = 8


@dataclass
class Curve:
    """Dev P@1 of one relation over the seconds of learning."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def reached(self, target: float) -> float | None:
        """After how many seconds the score was there."""
        return next((seconds for seconds, score in self.points if score >= target), None)

    @property
    def best(self) -> float:
        return max((score for _, score in self.points), default=0.0)


@dataclass
class Questions:
    """The part of the context of a run that the choice of demonstrations needs."""

    backbone: Backbone
    size: PassSize
    seed: int = 0

    def at(self, task: Task) -> Any:
        from megaprompt.engine.passes import Workplace

        return Workplace.shared(self.backbone, self.size, World(device=self.backbone.device), task.objective)


def ours(backbone: Backbone, tasks: dict[str, Task], size: PassSize, best: bool) -> tuple[dict[str, Curve], float]:
    """Curves by relation, and the seconds in all."""
    curves = {name: Curve() for name in tasks}
    recipe, start = RECIPES["fast"], time.perf_counter()
    chosen: dict[str, list[Candidate]] = {}
    for name, task in tasks.items():
        paper, shown = Candidate(PAPER, task.template("<3>[X]<3>[Y]")), ()
        if best:
            asking: Any = Questions(backbone, size)
            wordings = [
                Wording(task.manual_template, drawn(task, count, draw, 0))
                for count in (0, 4, SHOWN)
                for draw in range(3)
            ]
            first, *_ = choose(asking, task, wordings)
            curves[name].points.append((time.perf_counter() - start, first.dev["p_at_1"]))
            shown = first.wording.shown
        chosen[name] = candidates(task, paper, shown, 4 if best else 1)
    data = [
        each
        for name, those in chosen.items()
        for one in those
        for each in one.training_sets(tasks[name], recipe, with_folds=best)
    ]
    rungs = rungs_of(recipe, 4) if best else {}
    world = World(device=backbone.device)
    trainer = Trainer(backbone, data, recipe, size=size, world=world, rungs=rungs)

    def log(line: dict[str, Any]) -> None:
        if "dev_p_at_1" in line and "-fold-" not in line.get("candidate", ""):
            finish()
            curves[line["relation"]].points.append((time.perf_counter() - start, line["dev_p_at_1"]))

    trainer.train(Hooks(log=log))
    return curves, time.perf_counter() - start


def epochs(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of places in train, epoch after epoch, with an empty one at the end of each."""
    chance = random.Random(seed)
    while True:
        order = list(range(count))
        chance.shuffle(order)
        yield from (order[i : i + batch] for i in range(0, count, batch))
        yield []


def learn(
    step: Callable[[list[int]], object],
    end_epoch: Callable[[], None],
    dev: Callable[[], float],
    batches: Iterator[list[int]],
    limit: float,
) -> Curve:
    """Learn until the time is over."""
    curve, start = Curve(), time.perf_counter()
    while time.perf_counter() - start < limit:
        if batch := next(batches):
            step(batch)
            continue
        end_epoch()
        score = dev()
        finish()
        curve.points.append((time.perf_counter() - start, score))
    return curve


def right_answers(logits: Tensor, gold: list[int], allowed: Tensor) -> int:
    """How many of them are the best of the allowed tokens."""
    at = slice(0, len(allowed))
    return int((rank_of_gold(logits[:, at].float(), torch.tensor(gold, device=logits.device), allowed) == 1).sum())


def original(backbone: Backbone, task: Task, allowed: Tensor, limit: float) -> Curve:
    """The original algorithm with the paper's recipe."""
    recipe, template = RECIPES["paper"], task.template("<3>[X]<3>[Y]")
    encoder = new_prompt_encoder(6, backbone.hidden_size, "lstm", seed=0, relation=task.name).to(backbone.device)
    run = Original(backbone, template, encoder)
    run.optimizer = torch.optim.Adam(encoder.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, recipe.decay)
    train, dev = ([(one.fields["X"], one.gold) for one in task.examples[split]] for split in ("train", "dev"))

    def of(facts: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
        return [subject for subject, _ in facts], [gold for _, gold in facts]

    @torch.no_grad()
    def score() -> float:
        right = 0
        for i in range(0, len(dev), recipe.batch_size):
            subjects, gold = of(dev[i : i + recipe.batch_size])
            run(subjects, gold, train=False)
            right += right_answers(run.at_targets, gold, allowed)
        return right / len(dev)

    batches = epochs(len(train), recipe.batch_size, 0)
    return learn(lambda batch: run(*of([train[i] for i in batch]), train=True), schedule.step, score, batches, limit)


def peft(backbone: Backbone, task: Task, allowed: Tensor, limit: float) -> Curve:
    """PEFT's PromptEncoder with the recipe of its example."""
    run = Peft(backbone, num_virtual_tokens=20, encoder_hidden_size=128)
    run.optimizer = torch.optim.AdamW(run.model.prompt_encoder.parameters(), 1e-3)
    train, dev = ([(one.fields["X"], one.gold) for one in task.examples[split]] for split in ("train", "dev"))
    steps = 20 * -(-len(train) // 32)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))
    )

    def step(batch: list[int]) -> None:
        run([train[i][0] for i in batch], [train[i][1] for i in batch], train=True)
        schedule.step()

    @torch.no_grad()
    def score() -> float:
        right = 0
        for i in range(0, len(dev), 32):
            subjects, gold = [subject for subject, _ in dev[i : i + 32]], [gold for _, gold in dev[i : i + 32]]
            run(subjects, gold, train=False)
            right += right_answers(run.at_targets, gold, allowed)
        return right / len(dev)

    return learn(step, lambda: None, score, epochs(len(train), 32, 0), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="world")
    parser.add_argument("--relations", default="P36,P30,P17,P37")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--limit-facts", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--cut", type=float, default=30.0)
    parser.add_argument("--cut-peft", type=float, default=10.0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(args.backbone, torch.float32, device)
    data, size = load_data(args.data), PassSize()
    vocabulary = load_vocabulary("auto", data, backbone.tokenization)
    names = tuple(args.relations.split(","))
    about: dict[str, Any] = {"names": names, "splits": ("train", "dev", "test"), "limit": args.limit_facts, "seed": 0}
    tasks = lama_tasks(data, backbone, AskFor(vocabulary, among_allowed=True), **about)
    allowed = vocabulary.allowed.to(device)

    found, seconds = {}, {}
    for method in ("p-tuning", "best"):
        found[method], seconds[method] = ours(backbone, tasks, size, best=method == "best")
        told = {name: [(round(at, 1), round(score, 3)) for at, score in c.points] for name, c in found[method].items()}
        print(f"{method}: {seconds[method]:.1f} s {told}", file=sys.stderr, flush=True)
    target = {name: args.share * curve.best for name, curve in found["p-tuning"].items()}
    times = {method: [curves[name].reached(target[name]) for name in tasks] for method, curves in found.items()}
    ours_per_relation = max(time for time in times["p-tuning"] if time is not None) / len(tasks)
    for method, run, cut in (("original", original, args.cut), ("peft", peft, args.cut_peft)):
        found[method] = {}
        for name, task in tasks.items():
            found[method][name] = run(backbone, task, allowed, cut * ours_per_relation)
            print(f"{method} {name}: {found[method][name].points[-1:]}", file=sys.stderr, flush=True)
        times[method] = [found[method][name].reached(target[name]) for name in tasks]
    print(
        json.dumps(
            {
                "target_dev_p_at_1": target,
                "p_tuning_seconds_per_relation": ours_per_relation,
                "seconds_to_target": {m: dict(zip(tasks, t, strict=True)) for m, t in times.items()},
                "best_dev_p_at_1": {m: {n: c.best for n, c in curves.items()} for m, curves in found.items()},
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
