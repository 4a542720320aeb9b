"""A run: ask a backbone in several ways, and write everything down. One call does the whole job.

from megaprompt.config import ProbeConfig
from megaprompt.run.job import probe
results = probe(ProbeConfig(relations=("P36", "P30"), out=Path("runs/two")))
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megaprompt import __version__
from megaprompt.backbone import Backbone, dtype_of, is_causal, load_backbone
from megaprompt.config import AUTO, PASS_TOKENS, ProbeConfig, RunConfig, SuperGlueConfig
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import release
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.methods.method import Method
from megaprompt.prompting.packing import PassSize
from megaprompt.resources.plan import bytes_of_pass
from megaprompt.run.checkpoints import Parts
from megaprompt.run.context import RunContext
from megaprompt.run.directory import SCHEMA, RunDirectory
from megaprompt.run.environment import environment
from megaprompt.run.fitting import on_nodes, settled
from megaprompt.run.material import Facts, ReadMaterial, SuperGlue
from megaprompt.run.origin import check_same_files, command_line, digest_of_examples, digests, seeds
from megaprompt.run.progress import ProgressFile
from megaprompt.tasks.lama.questions import AskFor
from megaprompt.tasks.task import SPLITS, Task

logger = logging.getLogger(__name__)


def probe(config: ProbeConfig, world: World | None = None, backbone: Backbone | None = None) -> dict[str, Any]:
    """Run or resume a probe; returns what is in results.json.

    Args:
        world: the processes that share the work, if they have found each other already.
        backbone: if it is there already; `config` then only names it.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: something in the data, on the disk or in training went wrong.
    """
    return _run(config, lambda: Facts(config), world, backbone)


def superglue(config: SuperGlueConfig, world: World | None = None) -> dict[str, Any]:
    """Run or resume SuperGLUE's tasks; returns what is in results.json.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: something in the data, on the disk or in training went wrong.
    """
    return _run(config, lambda: SuperGlue(config), world)


def _run(
    config: RunConfig, read: ReadMaterial, world: World | None, backbone: Backbone | None = None
) -> dict[str, Any]:
    if world is None:
        with joined_world(force=config.deepspeed is not None) as world:
            return _run(config, read, world, backbone)
    status = ProgressFile(config.out, world.is_main)
    with status.ending():
        return _run_on(config, read, world, status, backbone)


def _run_on(
    config: RunConfig, read: ReadMaterial, world: World, status: ProgressFile, given: Backbone | None
) -> dict[str, Any]:
    material = read()
    run = RunDirectory.open(config) if world.is_main else RunDirectory(config.out)
    results = world.gather(run.read_results() if config.resume else {})[0]
    if results.get("complete"):
        logger.info("%s is complete; nothing to resume", run.path)
        return results
    if results and results.get("schema") != SCHEMA:
        raise MegapromptError(f"--resume: {run.path} was written by another version of megaprompt; start a new run")
    files = digests(material.files() if world.is_main else (), Path(config.data))
    if config.resume:
        status.phase("loading")
    configuration = config.deepspeed if given is None or config.deepspeed != AUTO else None
    if configuration == AUTO:
        templates = list(material.templates(is_causal(config.backbone)).values())
        configuration, line = settled(config, templates, world, results.get("deepspeed"))
        logger.info(line)
    deepspeed = read_deepspeed_config(configuration) if configuration is not None else DeepSpeedSettings()
    load = _loader(config, deepspeed, world) if given is None else lambda _: (given, None)
    backbone, _ = load(False)
    pass_tokens = config.pass_tokens or results.get("pass_tokens") or _pass_tokens(config, backbone, world)
    size = backbone.exact_size(PassSize(config.row_tokens, pass_tokens))
    tasks, methods, ask_for = material.asked_of(backbone)
    if results and world.is_main:
        check_same_files(results["data"], files, run.path)
    results = results or new_results(backbone, tasks, world, data=material.name, ask_for=ask_for)
    results["deepspeed"] = str(configuration or "none")
    results["data"].setdefault("files", files)
    results.setdefault("seeds", seeds(config))
    results.setdefault("commands", []).append(command_line())
    results["pass_tokens"] = pass_tokens  # a run that goes on packs as before, so that it rounds as before
    _check_same_backbone(results, backbone, run)

    context = RunContext(
        run=run,
        results=results,
        status=status,
        resume=config.resume,
        data_name=config.data,
        tasks=tasks,
        frozen=backbone,
        size=size,
        world=world,
        seed=config.seed,
        half_precision_scale=deepspeed.loss_scale,
        load=load,
        release=release,
    )
    del backbone  # the context lets go of it when another one is trained
    for method in methods:
        method.check(context)
    if world.is_main and not config.resume:  # everything that can be wrong from the start has been checked
        run.write_config(config)
    return run_methods(context, methods)


def run_methods(context: RunContext, methods: Sequence[Method]) -> dict[str, Any]:
    """Ask in all ways that have no results yet, and write everything down; returns what is in results.json."""
    results = context.results
    context.status.score(*next(iter(results["metrics"].items())))
    context.save(report=False)
    for method in methods:
        if any(column not in results["methods"] for column in method.columns):
            method.run(context)
    if context.world.is_main:
        context.run.log_choices(results["methods"])
    results["complete"] = True
    context.save()
    Parts(context.run.path, context.world).forget()
    context.world.barrier()
    return results


def _pass_tokens(config: RunConfig, backbone: Backbone, world: World) -> int:
    """How many tokens a pass has, if nobody says: large passes are up to three times as fast on a GPU."""
    if world.device.type != "cuda":
        return PASS_TOKENS
    free = world.free_memory()
    needed = 0
    if world.is_main:
        needed = bytes_of_pass(config.backbone, backbone.model.dtype, PassSize(config.row_tokens, PASS_TOKENS))
    most = free // 4 // world.gather(needed)[0] * PASS_TOKENS
    return next((tokens for tokens in (16384, 8192, 4096, 2048) if tokens <= most), PASS_TOKENS)


def _loader(
    config: RunConfig, deepspeed: DeepSpeedSettings, world: World
) -> Callable[[bool], tuple[Backbone, dict[str, Any] | None]]:
    """Loads the backbone frozen, or, if told so, to be trained, with the DeepSpeed configuration for that."""
    dtype = _dtype(config, deepspeed, world)

    def load(trainable: bool) -> tuple[Backbone, dict[str, Any] | None]:
        own, sharding = dtype, deepspeed.sharding
        if trainable:
            own = dtype if sharding is not None or config.dtype else torch.float32
            sharding = deepspeed.for_training(own)
        elif sharding is not None:
            sharding = on_nodes(config.backbone, sharding, own, world)
        random_weights = config.seed if config.control == "random-weights" else None
        backbone = load_backbone(config.backbone, own, world.device, sharding, trainable, random_weights)
        return backbone, sharding if trainable else None

    return load


def _dtype(config: RunConfig, deepspeed: DeepSpeedSettings, world: World) -> torch.dtype:
    """The precision in force.

    Raises:
        UsageError: options contradict each other, or weights that are trained would have no float32 copies: steps of
            5e-6 vanish in half precision.
    """
    if None not in (config.dtype, deepspeed.dtype) and getattr(torch, config.dtype or "") != deepspeed.dtype:
        raise UsageError(f"--dtype {config.dtype}: {config.deepspeed} says {deepspeed.dtype}; leave one of them out")
    half = config.dtype in ("float16", "bfloat16") or deepspeed.dtype is not None
    if config.trains_weights and half and deepspeed.sharding is None:
        raise UsageError(
            "fine-tuning in half precision needs ZeRO-3's float32 copies of the weights: give --deepspeed "
            "ds_configs/zero3_bf16.json, or --dtype float32 (the default for fine-tuning without --deepspeed)"
        )
    return deepspeed.dtype or dtype_of(config.dtype, world.device)


def _check_same_backbone(results: Mapping[str, Any], backbone: Backbone, run: RunDirectory) -> None:
    before = results["backbone"]
    if before["fingerprint"] != backbone.fingerprint:
        raise MegapromptError(
            f"--resume: the weights of {backbone.name} are not those that {run.path} was started with"
        )
    if before["dtype"] != (dtype := _name(backbone)):
        raise MegapromptError(
            f"--resume: {run.path} was started in {before['dtype']}, not in {dtype}; give --dtype {before['dtype']} or "
            f"the same --deepspeed"
        )


def _name(backbone: Backbone) -> str:
    return str(backbone.model.dtype).removeprefix("torch.")


def new_results(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    world: World,
    *,
    data: str,
    ask_for: AskFor | None = None,
) -> dict[str, Any]:
    """results.json before anything was asked.

    Args:
        data: its name.
        ask_for: how facts are answered, if they are facts.
    """
    objectives = [task.objective for task in tasks.values()]
    vocabulary = ask_for and ask_for.vocabulary
    return {
        "schema": SCHEMA,
        "complete": False,
        "megaprompt": __version__,
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "dtype": _name(backbone),
            "causal": backbone.causal,
            "hidden_size": backbone.hidden_size,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters()),
            **({} if backbone.random_weights is None else {"control": "random-weights"}),
        },
        "metrics": {name: heading for objective in objectives for name, heading in objective.metrics.items()},
        "items": objectives[0].items,
        "selects": list(objectives[0].selects),
        "few": objectives[0].few,
        "data": {
            "name": data,
            "answers": ask_for and ask_for.answers,
            "vocabulary": vocabulary and {"name": vocabulary.name, "tokens": int(vocabulary.allowed.sum())},
            "relations": {name: _describe(task) for name, task in tasks.items()},
        },
        "methods": {},
        "environment": environment(world),
        "timing": {},
    }


def _describe(task: Task) -> dict[str, Any]:
    return {
        "label": task.label,
        "type": task.type,
        "template": task.manual,
        "facts": {split: len(task.examples[split]) for split in SPLITS},
        "left_out": dict(task.left_out),
        "usable": dict(task.usable),
        "sha256": digest_of_examples(task),
        "balanced": len(set(Counter(example.answer for example in task.examples["test"]).values())) == 1,
    }
