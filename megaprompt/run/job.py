"""A run: ask a backbone in several ways, and write everything down. One call does the whole job.

from megaprompt.config import ProbeConfig
from megaprompt.run.job import probe
results = probe(ProbeConfig(relations=("P36", "P30"), out=Path("runs/two")))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megaprompt.backbone import Backbone, dtype_of, is_causal, load_backbone
from megaprompt.config import AUTO, PASS_TOKENS, ProbeConfig, RunConfig, SuperGlueConfig
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import release
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.methods.method import Method
from megaprompt.methods.untrained import check_lengths
from megaprompt.prompting.packing import PassSize
from megaprompt.report.html import write_report
from megaprompt.resources.plan import bytes_of_pass
from megaprompt.run.checkpoints import forget
from megaprompt.run.context import RunContext
from megaprompt.run.directory import SCHEMA, RunDirectory
from megaprompt.run.fitting import on_nodes, settled
from megaprompt.run.interruption import stop_if_asked, stop_signals
from megaprompt.run.material import Facts, ReadMaterial, SuperGlue
from megaprompt.run.origin import (
    check_same_examples,
    check_same_files,
    command_line,
    digests,
    seeds,
)
from megaprompt.run.progress import ProgressFile, read_progress
from megaprompt.run.results_file import ResultsFile, go_on_with, new_results

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
        return _completed(results, run, world, status)
    if results and results.get("schema") != SCHEMA:
        raise MegapromptError(f"--resume: {run.path} was written by another version of megaprompt; start a new run")
    if config.resume and world.is_main:
        run.mend_log()
    files = digests(material.files() if world.is_main else (), Path(config.data))
    if config.resume:
        status.phase("loading")
    configuration = config.deepspeed if given is None or config.deepspeed != AUTO else None
    if configuration == AUTO:
        templates = list(material.templates(is_causal(config.backbone)).values())
        configuration, line = settled(config, templates, world, results.get("deepspeed"), material.whole_answers)
        logger.info(line)
    deepspeed = read_deepspeed_config(configuration) if configuration is not None else DeepSpeedSettings()
    load = _loader(config, deepspeed, world) if given is None else lambda _: (given, None)
    backbone, _ = load(False)
    pass_tokens = config.pass_tokens or results.get("pass_tokens")  # a run goes on as before, so that it rounds so
    pass_tokens = pass_tokens or _pass_tokens(config, backbone, world, material.whole_answers)
    size = backbone.exact_size(PassSize(config.row_tokens, pass_tokens))
    tasks, methods, splits, ask_for = material.asked_of(backbone)
    if results and world.is_main:
        check_same_files(results["data"], files, run.path)
        check_same_examples(results["data"]["relations"], tasks, run.path)
    if results:
        go_on_with(results, backbone, world, run.path)
    else:
        results = new_results(backbone, tasks, world, data=material.name, ask_for=ask_for)
    results |= {"deepspeed": str(configuration or "none"), "pass_tokens": pass_tokens, "seeds": seeds(config)}
    results["data"].setdefault("files", files)
    results.setdefault("commands", []).append(command_line())
    context = RunContext(
        file=ResultsFile(run, results, world),
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
    check_lengths(context, splits)
    if world.is_main and not config.resume:  # everything that can be wrong from the start has been checked
        run.write_config(config)
    return run_methods(context, methods)


def _completed(results: dict[str, Any], run: RunDirectory, world: World, status: ProgressFile) -> dict[str, Any]:
    """A run with nothing left to do, but maybe the report, if it ended while that was written."""
    told = world.is_main and (run.path / "progress.json").exists()
    if told and read_progress(run.path)["state"] != "complete":
        status.phase("report")
        write_report(run.path)
    forget(run.path, world)
    logger.info("%s is complete; nothing to resume", run.path)
    return results


def run_methods(context: RunContext, methods: Sequence[Method]) -> dict[str, Any]:
    """Ask in all ways that have no results yet, and write everything down; returns what is in results.json."""
    results = context.results
    score, heading = next(iter(results["metrics"].items()))
    context.status.score(score, heading, results["items"])
    if not context.resume:  # job scripts see by its time whether anything was done since they started
        context.file.save(report=False)
    with stop_signals() as should_stop:
        for method in methods:
            if all(column in results["methods"] for column in method.columns):
                continue
            stop_if_asked(context.world, should_stop, f"before {method.columns[0]}")
            method.run(context)
        if context.world.is_main:
            context.run.log_choices(results["methods"])
        results["complete"] = True
        context.file.save()
    forget(context.run.path, context.world)
    context.world.barrier()
    return results


def _pass_tokens(config: RunConfig, backbone: Backbone, world: World, whole_answers: bool) -> int:
    """How many tokens a pass has, if nobody says: large passes are up to three times as fast on a GPU."""
    if world.device.type != "cuda":
        return PASS_TOKENS
    free = world.free_memory()
    needed = 0
    if world.is_main:
        size = PassSize(config.row_tokens, PASS_TOKENS)
        needed = bytes_of_pass(config.backbone, backbone.model.dtype, size, whole_answers)
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
