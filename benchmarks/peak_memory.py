"""Peak memory of learning one relation's prompt: megaprompt against the original algorithm and PEFT.

    python benchmarks/peak_memory.py [--backbone smollm2-135m] [--facts 8,32]

The same frozen backbone, facts and precision; each learner in a process of its own, three optimizer steps. What is
measured is what the process's own memory grows to after the backbone has been loaded: activations, logits, encoder,
Adam. The learners are those of throughput.py. Prints one JSON object, with the peak memory in MB and its ratio to
megaprompt's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is measured is the memory of the host
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from throughput import Original, Peft  # the benchmark beside this one

from megaprompt.backbone import load_backbone
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Trainer
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.recipe import RECIPES, Recipe
from megaprompt.prompting.template import Template
from megaprompt.resources.measured_case import PeakMemory
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary

LEARNERS = ("original", "peft", "megaprompt")
STEPS = 3


def grown(learner: str, spec: str, facts: int) -> int:
    """Bytes that this process's memory grows by at most while one relation is learned."""
    backbone = load_backbone(spec)
    for parameter in backbone.parameters():  # out of mapped files, into memory
        parameter.data = parameter.data.clone()
    data = load_data("world")
    everything = load_vocabulary("none", data, backbone.tokenization)
    task = lama_tasks(data, backbone, AskFor(everything), names=["P17"], splits=("train",), limit=facts, seed=0)["P17"]
    examples = task.examples["train"]
    if len(examples) < facts:
        sys.exit(f"there are only {len(examples)} facts")
    template = Template.parse("<3>[X]<3>[Y]")
    subjects, objects = [example.fields["X"] for example in examples], [example.gold for example in examples]
    start = PeakMemory.now()
    with PeakMemory(None, Path(os.devnull)) as memory:
        if learner == "megaprompt":
            train = task.instances("train", template)
            learned_from = TrainingSet("P17", task.objective, template.num_pseudo_tokens, train, train[:1])
            recipe = Recipe(RECIPES["fast"].learning_rate, 0.0, 1.0, batch_size=facts, max_epochs=STEPS, patience=STEPS)
            trainer = Trainer(backbone, [learned_from], recipe, size=PassSize(), world=World())
            for _ in range(STEPS):
                trainer.learners[0].cursor = 0
                trainer.train_step()
        else:
            encoder = PromptEncoder(template.num_pseudo_tokens, backbone.hidden_size, "lstm")
            run = Original(backbone, template, encoder) if learner == "original" else Peft(backbone)
            for _ in range(STEPS):
                run(subjects, objects, train=True)
    return memory.peak - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--facts", default="8,32", help="per optimizer step")
    options.add_argument("--learner", choices=LEARNERS, help=argparse.SUPPRESS)
    args = options.parse_args()
    counts = [int(count) for count in args.facts.split(",")]
    if args.learner:
        print(grown(args.learner, args.backbone, counts[0]))
        return
    report: dict[str, object] = {"backbone": args.backbone, "torch": torch.__version__, "MB": {}, "ratio": {}}
    for count in counts:
        sizes = {}
        for learner in LEARNERS:
            command = [
                sys.executable,
                __file__,
                "--backbone",
                args.backbone,
                "--facts",
                str(count),
                "--learner",
                learner,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sizes[learner] = int(done.stdout.split()[-1])
        report["MB"][count] = {learner: round(size / 1e6) for learner, size in sizes.items()}  # type: ignore[index]
        report["ratio"][count] = {  # type: ignore[index]
            learner: round(size / sizes["megaprompt"], 2) for learner, size in sizes.items()
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
