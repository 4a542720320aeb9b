"""What a step costs with many relations in it against one, where the weights are gathered or streamed for every pass.

    python benchmarks/relations_together.py [--deepspeed zero3_cpu_offload] [--backbone gpt2-medium] [--relations 41]
                                            [--facts 8] [--pass-tokens 4096] [--steps 3]
    torchrun --standalone --nproc-per-node 2 benchmarks/relations_together.py --deepspeed zero3 ...

Random weights at their true shape, <3>[X]<3>[Y] with subjects of three tokens, a batch of --facts of each relation.
Steps with one relation and with all of them alternate. "in turn" is what all would take one after the other. Prints one
JSON object: seconds (medians over steps), the tokens that a rank computes, padding included, and the passes that it
takes, each of which gathers or streams the weights twice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import cast

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from throughput import timed  # the benchmark beside this one

from megaprompt.backbone import Backbone
from megaprompt.backbone.packed import PackedModel
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.operators import build_operators
from megaprompt.distributed.world import World
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Trainer
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Recipe
from megaprompt.resources.measured_case import Case, random_model
from megaprompt.resources.profile import Workload
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.task import Instance


def steps_of(model: PackedModel, relations: int, facts: int, size: PassSize, world: World) -> Trainer:
    """Training that never ends, all relations in one group."""
    work = Workload("p-tuning", relations, size)
    vocabulary = torch.ones(model.model.config.get_text_config().vocab_size, dtype=torch.bool)
    objective = OneToken(vocabulary, str)
    instances = [Instance((query,), 1) for query in work.queries(facts)]
    sets = [TrainingSet(f"P{i}", objective, 6, instances, instances) for i in range(relations)]
    recipe = Recipe(1e-6, 0.0, 1.0, batch_size=facts, max_epochs=1000, patience=1000)
    return Trainer(cast(Backbone, model), sets, recipe, encoder="mlp", size=size, world=world)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="gpt2-medium")
    options.add_argument("--deepspeed", default="zero3_cpu_offload", help="a configuration, or none")
    options.add_argument("--relations", type=int, default=41)
    options.add_argument("--facts", type=int, default=8)
    options.add_argument("--pass-tokens", type=int, default=4096)
    options.add_argument("--steps", type=int, default=3)
    args = options.parse_args()
    settings = DeepSpeedSettings() if args.deepspeed == "none" else read_deepspeed_config(Path(args.deepspeed))
    with joined_world(force=settings.sharding is not None) as world:
        if settings.sharding is not None:
            build_operators(settings.sharding)
        dtype = settings.dtype or torch.float32
        case = Case(args.backbone, "p-tuning", args.deepspeed, world.size, str(dtype).removeprefix("torch."))
        model = random_model(case, settings, world)
        tokens: list[int] = []
        model.model.register_forward_pre_hook(
            lambda _, given, named: tokens.append(next(iter((*given, *named.values()))).shape[:2].numel()),
            with_kwargs=True,
        )
        size = PassSize(row_tokens=256, pass_tokens=args.pass_tokens)
        trainers = {n: steps_of(model, n, args.facts, size, world) for n in (1, args.relations)}
        seconds: dict[int, list[float]] = {n: [] for n in trainers}
        passes: dict[int, list[int]] = {}
        for _ in range(args.steps + 1):
            for n, trainer in trainers.items():
                for learner in trainer.learners:
                    learner.cursor = 0  # an epoch has one batch
                tokens.clear()
                seconds[n].append(timed(trainer.train_step))
                passes[n] = list(tokens)
        each = {n: statistics.median(times[1:]) for n, times in seconds.items()}  # the first has no traces and states
        found = {
            "backbone": args.backbone,
            "deepspeed": args.deepspeed,
            "ranks": world.size,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
            "relations": args.relations,
            "seconds": {str(n): round(s, 3) for n, s in each.items()},
            "tokens of a rank": {str(n): sum(counts) for n, counts in passes.items()},
            "passes of a rank": {str(n): len(counts) for n, counts in passes.items()},
            "together over one": round(each[args.relations] / each[1], 2),
            "in turn over together": round(args.relations * each[1] / each[args.relations], 2),
        }
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
