"""What a run needs in memory, per rank: measured, by taking steps for real. Weights are random, at their true shapes.

Each case runs in processes of its own (`python -m megaprompt.resources.measure CASE RESULT`, under a launcher). They
watch their own memory and end where a limit is passed: running out of memory is a result, not an accident.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from megaprompt.backbone import Backbone
from megaprompt.backbone.packed import PackedModel, language_model
from megaprompt.backbone.sharded import new_sharded
from megaprompt.config import MemoryConfig
from megaprompt.console import progress
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.operators import build_operators
from megaprompt.distributed.world import World
from megaprompt.distributed.zero3 import shard
from megaprompt.engine.fine_tuning import FineTuner
from megaprompt.engine.training import Trainer
from megaprompt.errors import MegapromptError, UsageError, first_line
from megaprompt.files import write_file
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import EncoderKind
from megaprompt.prompting.recipe import Recipe
from megaprompt.resources.plan import RUNTIME, legend, stacked
from megaprompt.resources.predict import Job, Method, Profile, Workload, predict, profile, shape_of
from megaprompt.tasks.task import Examples, Task

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


def _model(case: Case, settings: DeepSpeedSettings, world: World) -> PackedModel:
    dtype, trainable = getattr(torch, case.dtype), case.method == "fine-tuning"
    config = shape_of(case.backbone)
    if settings.sharding is None:
        model = language_model(config).from_config(config, dtype=dtype).to(world.device)
        return PackedModel(model, trainable)
    model = PackedModel(new_sharded(config, dtype, settings.sharding), trainable)
    if not trainable:
        shard(model, settings.sharding)
    return model


class _Steps:
    """A few steps of training that fill a pass on every rank, and what the tensors take meanwhile."""

    def __init__(self, case: Case, model: PackedModel, settings: DeepSpeedSettings, world: World) -> None:
        work = case.workload()
        relations = case.relations if case.method == "p-tuning" else 1
        each = -(-len(work.full_pass()) * world.size // relations)
        facts = Examples(work.queries(each), [1] * each)
        recipe = Recipe(1e-6, 0.0, 1.0, batch_size=each, max_epochs=_STEPS, patience=_STEPS)
        backbone = cast(Backbone, model)  # without a tokenizer, which nothing here needs
        self.model = model
        self.tuner: Trainer | FineTuner
        if case.method == "p-tuning":
            tasks = [Task(f"P{i}", 6, facts, facts) for i in range(relations)]
            self.tuner = Trainer(backbone, tasks, recipe, encoder=case.encoder, size=work.size, world=world)
            self.courses: list[Any] = [*self.tuner.learners]
            self.encoders = [p for learner in self.tuner.learners for p in learner.encoder.parameters()]
            self.optimizers = [learner.optimizer for learner in self.tuner.learners]
        else:
            deepspeed = settings.for_training(getattr(torch, case.dtype))
            task = Task("P0", 0, facts, facts)
            self.tuner = FineTuner(backbone, task, recipe, size=work.size, world=world, deepspeed=deepspeed)
            self.courses, self.encoders = [self.tuner.course], []
            self.optimizers = [getattr(self.tuner.optimizer, "optimizer", self.tuner.optimizer)]
        self.gradients: dict[str, int] = {}
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._see_gradients())

    def _see_gradients(self) -> None:
        zero = getattr(self.tuner, "optimizer", None)
        flat = [getattr(zero, "grad_partitions_flat_buffer", None)]
        flat += [p.grad for p in getattr(zero, "fp32_partitioned_groups_flat", [])]
        for name, tensors in (
            ("gradients", [*(p.grad for p in self.model.parameters()), *flat]),
            ("encoders", [p.grad for p in self.encoders]),
        ):
            self.gradients[name] = max(self.gradients.get(name, 0), _bytes(tensors))

    def step(self) -> None:
        """One optimizer step."""
        for course in self.courses:
            course.cursor = 0  # an epoch has one batch
        self.tuner.train_step()

    def categories(self) -> dict[str, int]:
        """Bytes of what stays between the steps, and of the gradients."""
        parameters = [getattr(p, "ds_tensor", p) for p in self.model.parameters()]
        parameters += [p for p in self.model.parameters() if getattr(p, "ds_persist", False)]
        state = [value for optimizer in self.optimizers for kept in optimizer.state.values() for value in kept.values()]
        tensors = [value for value in state if isinstance(value, Tensor)]
        masters = list(getattr(getattr(self.tuner, "optimizer", None), "fp32_partitioned_groups_flat", []))
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
        steps = _Steps(case, _model(case, settings, world), settings, world)
        for _ in range(_STEPS):
            steps.step()
        found = steps.categories()
    peak = torch.cuda.max_memory_allocated(world.device) if cuda else memory.peak
    runtime = 0 if cuda else start
    rest = peak - runtime - sum(found.values())
    return {"runtime": runtime, **found, "rest": rest, "peak": peak, "seconds": time.monotonic() - began}


# ------------------------------------------------------------------------------------------------ one case, one process


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


# ------------------------------------------------------------------------------------------------------- all the cases


def measure_all(config: MemoryConfig) -> list[dict[str, Any]]:
    """Run every case that is not in memory.json yet; writes memory.json, memory.md and memory.png after each.

    Raises:
        UsageError: there is no such backbone or configuration.
        MegapromptError: a case failed for another reason than memory.
    """
    done = {
        row["key"]: row
        for path in sorted([config.out / "memory.json", *(config.out.glob("*/memory.json") if config.collect else ())])
        if path.exists()
        for row in json.loads(path.read_text(encoding="utf-8"))
    }
    if config.collect:
        if not done:
            raise UsageError(f"--collect: no memory.json in {config.out} or the directories in it")
        _write(config.out, list(done.values()), list(done.values()))
        return list(done.values())
    gpus = torch.cuda.device_count()
    profiles: dict[Any, Profile] = {}
    rows: list[dict[str, Any]] = []
    cases = list(itertools.product(config.backbones, config.deepspeed, config.ranks, config.methods))
    with progress("memory", len(cases), unit="cases") as update:
        for number, (backbone, deepspeed, ranks, method) in enumerate(cases):
            settings = DeepSpeedSettings() if deepspeed == "none" else read_deepspeed_config(Path(deepspeed))
            dtype = settings.dtype or getattr(torch, config.dtype)
            per_node = -(-int(ranks) // int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
            limit = None
            if not gpus:
                free = config.memory_limit * 1e9 if config.memory_limit else 0.9 * psutil.virtual_memory().available
                limit = int(free / per_node)
            case = Case(
                backbone,
                cast(Method, method),
                None if deepspeed == "none" else deepspeed,
                int(ranks),
                str(dtype).removeprefix("torch."),
                config.relations,
                row_tokens=config.row_tokens,
                pass_tokens=config.pass_tokens,
                limit=limit,
            )
            key = " ".join(str(value) for name, value in dataclasses.asdict(case).items() if name != "limit")
            if key not in done:
                work = case.workload()
                if (backbone, dtype, work) not in profiles:
                    profiles[backbone, dtype, work] = profile(shape_of(backbone), dtype, work)
                zero = settings.sharding["zero_optimization"] if settings.sharding else None
                job = Job(case.method, dtype, zero, case.ranks, case.relations, case.encoder, on_cpu=not gpus)
                need = predict(profiles[backbone, dtype, work], job)
                device = Counter(need.device) + (Counter() if gpus else Counter(need.host))
                predicted = dict(device) | {"runtime": RUNTIME["device" if gpus else "host"]}
                done[key] = {"key": key, **dataclasses.asdict(case), "predicted": predicted, **_run(case, config)}
            rows.append(done[key])
            _write(config.out, list(done.values()), rows)
            update(number + 1)
    return rows


def _write(out: Path, done: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> None:
    write_file(out / "memory.json", json.dumps(done, indent=1).encode())
    write_file(out / "memory.md", markdown(shown).encode())
    buffer = io.BytesIO()
    chart(shown).savefig(buffer, format="png", dpi=150)
    write_file(out / "memory.png", buffer.getvalue())


def _run(case: Case, config: MemoryConfig) -> dict[str, Any]:
    """Start the ranks of a case; returns what each of them measured, or that memory ran out."""
    scratch = (config.out / "case").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    about, result, log = scratch / "case.json", scratch / "result.json", scratch / "log.txt"
    out_of_memory = Path(f"{result}.out-of-memory")
    for old in (result, out_of_memory):
        old.unlink(missing_ok=True)
    about.write_text(json.dumps(dataclasses.asdict(case)))
    command = [sys.executable, "-m", "megaprompt.resources.measure", str(about), str(result)]
    threads = max(1, len(os.sched_getaffinity(0)) // case.ranks)
    if "SLURM_JOB_ID" in os.environ:
        command = ["srun", f"--ntasks={case.ranks}", "--kill-on-bad-exit=1", *command]
    elif case.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            code = process.wait(config.case_seconds)
        except subprocess.TimeoutExpired as error:
            raise MegapromptError(
                f"{case}: not done after {config.case_seconds} s; give more --case-seconds"
            ) from error
        finally:
            if process.poll() is None:  # also when we are interrupted
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if out_of_memory.exists() or code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return {"out_of_memory": json.loads(out_of_memory.read_text()) if out_of_memory.exists() else {}}
    if not result.exists():
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise MegapromptError(f"a case failed: {' '.join(command)} ({' '.join(last)}; see {log})")
    return {"measured": json.loads(result.read_text())}


def _peak(row: dict[str, Any]) -> dict[str, float] | None:
    """What the rank with the highest peak measured; None if memory ran out."""
    return max(row["measured"], key=lambda rank: rank["peak"]) if "measured" in row else None


def _cells(row: dict[str, Any]) -> list[str]:
    predicted, measured = sum(row["predicted"].values()), _peak(row)
    cells = [Path(row["backbone"]).name, row["method"], Path(row["deepspeed"] or "none").stem, str(row["ranks"])]
    cells += [f"{predicted / 1e9:.2f}"]
    if measured is None:
        return [*cells, "out of memory", "", "", "", "", ""]
    kept = [f"{measured[name] / 1e9:.2f}" for name in ("parameters", "gradients", "optimizer", "encoders")]
    return [*cells, f"{measured['peak'] / 1e9:.2f}", f"{100 * (predicted / measured['peak'] - 1):+.0f} %", *kept]


_COLUMNS = (
    "backbone", "method", "configuration", "ranks", "predicted", "measured", "off by", "parameters", "gradients",
    "optimizer", "encoders",
)  # fmt: skip
_TITLE = "Peak memory of a rank in GB, and what it holds between the steps (measured)"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Predicted beside measured, for a terminal."""
    result = Table(title=_TITLE, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in _COLUMNS:
        result.add_column(column, justify="left" if column in _COLUMNS[:3] else "right", no_wrap=True)
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as text."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return f"{_TITLE}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def chart(rows: Sequence[dict[str, Any]]) -> Figure:
    """For every configuration and number of ranks: P-tuning beside fine-tuning, predicted beside measured."""
    panels = list(dict.fromkeys((row["deepspeed"], row["ranks"]) for row in rows))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lanes = [
        (backbone, method, kind) for backbone in backbones for method in methods for kind in ("predicted", "measured")
    ]
    figure = Figure(figsize=(6.5 * across, 1.2 + down * (0.8 + 0.2 * len(lanes))), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    used: set[str] = set()
    widest = max(sum(row["predicted"].values()) for row in rows) / 1e9
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        for row in rows:
            if (row["deepspeed"], row["ranks"]) != panel:
                continue
            for kind in ("predicted", "measured"):
                place = lanes.index((row["backbone"], row["method"], kind))
                if kind == "predicted":
                    sizes = row["predicted"]
                elif (measured := _peak(row)) is None:
                    limit = (row["limit"] or 0) / 1e9
                    axes.text(limit, place, " out of memory", va="center", fontsize=7, color="#D55E00")
                    axes.barh(place, limit, 0.8, color="none", edgecolor="#D55E00", hatch="////", linewidth=0.6)
                    continue
                else:
                    sizes = {n: v for n, v in measured.items() if n not in ("peak", "seconds", "rest")}
                    sizes = {**sizes, "activations": measured["rest"]}  # and all else that comes and goes
                stacked(axes, place, sizes, 0.8)
                used |= {name for name, size in sizes.items() if size}
                axes.text(
                    sum(sizes.values()) / 1e9, place, f" {sum(sizes.values()) / 1e9:.1f}", va="center", fontsize=7
                )
        name = Path(panel[0]).stem if panel[0] else "PyTorch alone"
        axes.set_title(f"{name}, {panel[1]} rank(s): GB of a rank", fontsize=9)
        axes.set_yticks(range(len(lanes)), [" ".join(lane) for lane in lanes], fontsize=7)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * widest)
        for line in range(2 * len(methods), len(lanes), 2 * len(methods)):
            axes.axhline(line - 0.5, color="#cccccc", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, used)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
