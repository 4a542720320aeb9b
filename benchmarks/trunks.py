"""Constant text in front of the question, with and without its keys and values known, in one interleaved run.

    python benchmarks/trunks.py [--relations P36,P30,P17,P47,P37] [--demonstrations 8,16] [--rounds 5]

Each relation's questions stand behind demonstrations: training facts in the manual wording, one a line. What is timed:

evaluation  the test facts of all relations in the manual wording, one call for each relation, as in a run
training    steps of prompts <3>[X]<3>[Y] behind the demonstrations, all relations together, 8 facts each

Each is computed whole, in rows of the default width and in rows as wide as the pass, and as tails behind trunks.
Answers must be the same. Prints one JSON object: medians of the seconds, and tokens computed, with padding. A trunk is
computed once by a call that evaluates; training computes it in its first step, which is not in the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.config import PASS_TOKENS
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.engine.trainer import Trainer
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import RECIPES
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.task import Task

WAYS = {
    "whole": PassSize(trunks=False),
    "whole, wide rows": PassSize(row_tokens=PASS_TOKENS, trunks=False),
    "tails": PassSize(),
}
STEPS = 4  # of training in each round


def evaluate(backbone: Backbone, size: PassSize, questions: Sequence[Questions]) -> tuple[float, int, list[int]]:
    """Seconds, tokens, and how many facts of each relation are ranked first."""
    tokens, first = 0, []
    start = time.perf_counter()
    for each in questions:
        at = Workplace.shared(backbone, size, World(), each.objective)
        [found] = answers(at, [each], None)
        first.append(int((found["rank"] == 1).sum()))
        tokens += at.trunks.counts["tokens"] + at.trunks.counts["trunk_tokens"]
    return time.perf_counter() - start, tokens, first


def measure(backbone: Backbone, tasks: Sequence[Task], count: int, rounds: int) -> dict[str, object]:
    template = Template.parse("<3>[X]<3>[Y]")
    questions, data, lengths = [], [], {}
    for task in tasks:
        facts = task.demonstrations(task.examples["train"][:count])
        lengths[task.name] = len(task.encoder.encode(facts, True))
        questions.append(Questions(task.instances("test", task.manual_template, facts), task.objective))
        train = task.instances("train", template, facts)[count:]
        data.append(TrainingSet(task.name, task.objective, template.num_pseudo_tokens, train, train[:1]))
    trainers = {way: Trainer(backbone, data, RECIPES["fast"], size=size, world=World()) for way, size in WAYS.items()}
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, float] = {}
    for turn in range(rounds + 1):  # the first one warms up
        first = {}
        for way, size in WAYS.items():
            took, tokens[f"evaluation, {way}"], first[way] = evaluate(backbone, size, questions)
            if turn:
                seconds.setdefault(f"evaluation, {way}", []).append(took)
        if len(set(map(tuple, first.values()))) > 1:
            sys.exit(f"answers differ: {first}")
        for way, trainer in trainers.items():
            counts = trainer.at.trunks.counts
            before = counts["tokens"]
            start = time.perf_counter()
            for _ in range(STEPS):
                for learner in trainer.learners:  # every step has full batches
                    if learner.cursor + learner.recipe.batch_size > len(learner.data.train):
                        learner.epoch, learner.cursor = learner.epoch + 1, 0
                trainer.train_step()
            if turn:
                seconds.setdefault(f"training, {way}", []).append((time.perf_counter() - start) / STEPS)
                tokens[f"training, {way}"] = (counts["tokens"] - before) / STEPS
            else:
                tokens[f"training, {way}, once"] = counts["trunk_tokens"]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "tokens of the demonstrations": lengths,
        "test facts": sum(len(each.instances) for each in questions),
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "tokens": {name: round(value) for name, value in tokens.items() if value},
        "times faster": {
            f"{what} than {way}": round(
                statistics.median(
                    a / b for a, b in zip(seconds[f"{what}, {way}"], seconds[f"{what}, tails"], strict=True)
                ),
                2,
            )
            for what in ("evaluation", "training")
            for way in WAYS
            if way != "tails"
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--relations", default="P36,P30,P17,P47,P37")
    options.add_argument("--demonstrations", default="8,16")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--facts", type=int, help="at most so many test facts of each relation")
    args = options.parse_args()

    backbone = load_backbone(args.backbone)
    data = load_data("world")
    everything = load_vocabulary("none", data, backbone.tokenization)
    about = {"names": args.relations.split(","), "splits": ("train", "test"), "limit": args.facts, "seed": 0}
    tasks = lama_tasks(data, backbone, AskFor(everything), **about)
    report: dict[str, object] = {"backbone": args.backbone, "threads": torch.get_num_threads(), "rounds": args.rounds}
    for count in map(int, args.demonstrations.split(",")):
        report[f"{count} demonstrations"] = measure(backbone, list(tasks.values()), count, args.rounds)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
