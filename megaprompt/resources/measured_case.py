"""One case of `megaprompt memory`: what a run needs in memory on each rank, measured by taking steps for real.

Weights are random, at their true shapes. A case runs in processes of its own, under a launcher (`python -m
megaprompt.resources.measured_case CASE RESULT`). They watch their own memory and end where a limit is passed: running
out of memory is a result, not an accident.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.packed import PackedModel, language_model
from megaprompt.backbone.sharded import new_sharded
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.operators import build_operators
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import shard
from megaprompt.engine.learner import TrainingSet
from megaprompt.engine.trainer import Trainer
from megaprompt.engine.weights import Weights
from megaprompt.errors import first_line
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.prompting.recipe import Recipe
from megaprompt.resources.profile import Method, Workload, shape_of
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.task import Instance

_STEPS = 2  # from the second on there is Adam's state, and DeepSpeed knows the order of the modules
OUT_OF_MEMORY = 9  # exit code of a rank


@dataclass(frozen=True)
class Case:
    """What to measure."""

    backbone: str
    method: Method
    deepspeed: str | None
    ranks: int
    dtype: str = "float32"
    relations: int = 1
    encoder: EncoderKind = "lstm"
    row_tokens: int = 256
    pass_tokens: int = 256
    limit: int | None = None  # bytes, of each rank

    def workload(self) -> Workload:
        size = PassSize(self.row_tokens, self.pass_tokens)
        return Workload.of(shape_of(self.backbone), self.method, self.relations, size)


class PeakMemory:
    """The peak of this process's own memory, in a thread that looks every two milliseconds; ends it over the limit.

    Its own memory is what is resident and not a file's: pages of mapped weight files can be dropped at any time.
    """

    def __init__(self, limit: int | None, out_of_memory: Path) -> None:
        self.limit, self.out_of_memory = limit, out_of_memory
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        """Bytes at this moment."""
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            now = self.now()
            self.peak = max(self.peak, now)
            if self.limit is not None and now > self.limit:
                self.out_of_memory.write_text(json.dumps({"bytes": now}))
                os._exit(OUT_OF_MEMORY)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the distinct storages of these tensors."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def random_model(case: Case, settings: DeepSpeedSettings, world: World) -> PackedModel:
    """The backbone of a case with random weights, on the device of this rank."""
    dtype, trainable = getattr(torch, case.dtype), case.method == "fine-tuning"
    config = shape_of(case.backbone)
    if settings.sharding is None:
        with world.device:  # random weights of billions take minutes on the host
            model = language_model(config).from_config(config, dtype=dtype)
        return PackedModel(model, trainable)
    model = PackedModel(new_sharded(config, dtype, settings.sharding), trainable)
    if not trainable:
        shard(model, settings.sharding)
    return model


class Steps:
    """A few steps of training that fill a pass on every rank, and what the tensors take meanwhile."""

    def __init__(self, case: Case, model: PackedModel, settings: DeepSpeedSettings, world: World) -> None:
        work = case.workload()
        relations = case.relations if case.method == "p-tuning" else 1
        each = -(-len(work.full_pass()) * world.size // relations)
        everything = torch.ones(model.model.config.get_text_config().vocab_size, dtype=torch.bool)
        objective, facts = OneToken(everything, str), [Instance((query,), 1) for query in work.queries(each)]
        recipe = Recipe(1e-6, 0.0, 1.0, batch_size=each, max_epochs=_STEPS, patience=_STEPS)
        backbone = cast(Backbone, model)  # without a tokenizer, which nothing here needs
        self.model = model
        self.weights: Weights | None = None
        if case.method == "fine-tuning":
            self.weights = Weights(backbone, recipe, world, settings.for_training(getattr(torch, case.dtype)))
        pseudo_tokens = 6 if self.weights is None else 0
        self.trainer = Trainer(
            backbone,
            [TrainingSet(f"P{i}", objective, pseudo_tokens, facts, facts) for i in range(relations)],
            recipe,
            encoder=case.encoder,
            size=work.size,
            world=world,
            weights=self.weights,
        )
        self.encoders = [p for learner in self.trainer.learners for p in learner.parameters]
        self.optimizers = [learner.optimizer for learner in self.trainer.learners if learner.optimizer is not None]
        if self.weights is not None:
            self.optimizers.append(getattr(self.weights.optimizer, "optimizer", self.weights.optimizer))
        self.gradients: dict[str, int] = {}
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._see_gradients())

    def _see_gradients(self) -> None:
        zero = self.weights.optimizer if self.weights is not None else None
        flat = [getattr(zero, "grad_partitions_flat_buffer", None)]
        flat += [p.grad for p in getattr(zero, "fp32_partitioned_groups_flat", [])]
        for name, tensors in (
            ("gradients", [*(p.grad for p in self.model.parameters()), *flat]),
            ("encoders", [p.grad for p in self.encoders]),
        ):
            self.gradients[name] = max(self.gradients.get(name, 0), _bytes(tensors))

    def step(self) -> None:
        """One optimizer step."""
        for learner in self.trainer.learners:
            learner.cursor = 0  # an epoch has one batch
        self.trainer.train_step()

    def categories(self) -> dict[str, int]:
        """Bytes of what stays between the steps, and of the gradients."""
        parameters = [getattr(p, "ds_tensor", p) for p in self.model.parameters()]
        parameters += [p for p in self.model.parameters() if getattr(p, "ds_persist", False)]
        state = [value for optimizer in self.optimizers for kept in optimizer.state.values() for value in kept.values()]
        tensors = [value for value in state if isinstance(value, Tensor)]
        masters = list(getattr(getattr(self.weights, "optimizer", None), "fp32_partitioned_groups_flat", []))
        known = {p.untyped_storage().data_ptr() for p in parameters}
        apart = [t for t in masters if t.untyped_storage().data_ptr() not in known]
        encoders = bool(self.encoders)
        return {
            "parameters": _bytes(parameters),
            "gradients": self.gradients.get("gradients", 0),
            "optimizer": 0 if encoders else _bytes([*tensors, *apart]),
            "encoders": _bytes([*self.encoders, *tensors]) + self.gradients["encoders"] if encoders else 0,
        }


def measure(case: Case, world: World, out_of_memory: Path) -> dict[str, Any]:
    """Take steps, and say what this rank needed."""
    settings = read_deepspeed_config(Path(case.deepspeed)) if case.deepspeed else DeepSpeedSettings()
    if settings.sharding is not None:
        build_operators(settings.sharding)
    cuda = world.device.type == "cuda"
    start = PeakMemory.now()
    began = time.monotonic()
    with PeakMemory(case.limit, out_of_memory) as memory:
        steps = Steps(case, random_model(case, settings, world), settings, world)
        for _ in range(_STEPS):
            steps.step()
        found = steps.categories()
    peak = torch.cuda.max_memory_allocated(world.device) if cuda else memory.peak
    runtime = 0 if cuda else start
    rest = peak - runtime - sum(found.values())
    return {"runtime": runtime, **found, "rest": rest, "peak": peak, "seconds": time.monotonic() - began}


def main(case_file: str, result_file: str) -> None:
    case = Case(**json.loads(Path(case_file).read_text()))
    out_of_memory = Path(f"{result_file}.out-of-memory")
    with joined_world(force=case.deepspeed is not None) as world:
        try:
            found = measure(case, world, out_of_memory)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) and "allocate" not in str(error):
                raise
            out_of_memory.write_text(json.dumps({"error": first_line(error)}))
            os._exit(OUT_OF_MEMORY)  # the other ranks wait in vain; the launcher ends them
        ranks = world.gather(found)
        if world.is_main:
            Path(result_file).write_text(json.dumps(ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
