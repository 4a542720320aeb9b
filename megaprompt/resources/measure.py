"""`megaprompt memory`: measure many cases, each in processes of its own, beside what is predicted."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from megaprompt.config import MemoryConfig
from megaprompt.console import progress
from megaprompt.distributed.deepspeed_config import DeepSpeedSettings, read_deepspeed_config
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.files import write_file
from megaprompt.resources.bars import legend, stacked
from megaprompt.resources.measured_case import Case
from megaprompt.resources.plan import RUNTIME, USABLE, profile_of
from megaprompt.resources.predict import Job, predict
from megaprompt.resources.profile import Method


def measure_all(config: MemoryConfig) -> list[dict[str, Any]]:
    """Run every case that is not in memory.json yet; writes memory.json, memory.md and memory.png after each.

    Raises:
        UsageError: there is no such backbone or configuration.
        MegapromptError: a case failed for another reason than memory.
    """
    done: dict[str, dict[str, Any]] = {}
    for path in sorted([config.out / "memory.json", *(config.out.glob("*/memory.json") if config.collect else ())]):
        for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
            if "not_tried" not in row or row["key"] not in done:
                done[row["key"]] = row
    if config.collect:
        if not done:
            raise UsageError(f"--collect: no memory.json in {config.out} or the directories in it")
        _write(config.out, list(done.values()), list(done.values()))
        return list(done.values())
    rows: list[dict[str, Any]] = []
    cases = list(itertools.product(config.backbones, config.deepspeed, config.ranks, config.methods))
    with progress("memory", len(cases), unit="cases") as update:
        for number, (backbone, deepspeed, ranks, method) in enumerate(cases):
            settings = DeepSpeedSettings() if deepspeed == "none" else read_deepspeed_config(Path(deepspeed))
            dtype = settings.dtype or getattr(torch, config.dtype)
            case = Case(
                backbone,
                cast(Method, method),
                None if deepspeed == "none" else deepspeed,
                int(ranks),
                str(dtype).removeprefix("torch."),
                config.relations,
                row_tokens=config.row_tokens,
                pass_tokens=config.pass_tokens,
                limit=_limit(config, int(ranks)),
            )
            key = " ".join(str(value) for name, value in dataclasses.asdict(case).items() if name != "limit")
            if key not in done or "not_tried" in done[key]:  # there may be more memory this time
                predicted = _predicted(case, dtype, settings)
                found = _cannot_be_tried(case, sum(predicted.values())) or _run(case, config)
                done[key] = {"key": key, **dataclasses.asdict(case), "predicted": predicted, **found}
            rows.append(done[key])
            _write(config.out, list(done.values()), rows)
            update(number + 1)
    return rows


def _limit(config: MemoryConfig, ranks: int) -> int | None:
    """Bytes that each rank may take; on GPUs, what is there."""
    if torch.cuda.device_count():
        return None
    free = config.memory_limit * 1e9 if config.memory_limit else 0.9 * psutil.virtual_memory().available
    return int(free / -(-ranks // int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))))


def _cannot_be_tried(case: Case, predicted: float) -> dict[str, Any] | None:
    """Why a case is only predicted here, and what memory there is for a rank; None if it can be measured.

    Close to the limit only measuring tells; at twice of it minutes would be spent on what is known.
    """
    gpus = torch.cuda.device_count()
    available = case.limit or torch.cuda.get_device_properties(0).total_memory
    most = int(os.environ.get("SLURM_NTASKS", gpus or case.ranks))
    if case.ranks > most:
        return {"not_tried": f"there are {most} ranks", "available": available}
    if predicted > 2 * available:
        return {"not_tried": "more than twice what there is", "available": available}
    return None


def _predicted(case: Case, dtype: torch.dtype, settings: DeepSpeedSettings) -> dict[str, float]:
    """Bytes by category, where the measured ones are: on the GPU, or in the memory of the host."""
    gpus = torch.cuda.device_count()
    zero = settings.sharding["zero_optimization"] if settings.sharding else None
    job = Job(case.method, dtype, zero, case.ranks, case.relations, case.encoder, on_cpu=not gpus)
    need = predict(profile_of(case.backbone, dtype, case.workload()), job)
    device = Counter(need.device) + (Counter() if gpus else Counter(need.host))
    return dict(device) | {"runtime": RUNTIME["device" if gpus else "host"]}


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
    command = [sys.executable, "-m", "megaprompt.resources.measured_case", str(about), str(result)]
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


def _verdict(row: dict[str, Any]) -> str:
    """What is said of a case that has no measured peak."""
    if "not_tried" not in row:
        return "out of memory"
    fits = sum(row["predicted"].values()) <= USABLE * row["available"]
    return f"not tried; plan: {'fits' if fits else 'out of memory at'} {row['available'] / 1e9:.1f}"


def _cells(row: dict[str, Any]) -> list[str]:
    predicted, measured = sum(row["predicted"].values()), _peak(row)
    cells = [Path(row["backbone"]).name, row["method"], Path(row["deepspeed"] or "none").stem, str(row["ranks"])]
    cells += [f"{predicted / 1e9:.2f}"]
    if measured is None:
        return [*cells, _verdict(row), "", "", "", "", ""]
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
        result.add_row(*map(Text, _cells(row)))
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
                    limit = min(row.get("available", row["limit"]) or 0, sum(row["predicted"].values())) / 1e9
                    axes.text(limit, place, f" {_verdict(row)}", va="center", fontsize=7, color="#D55E00")
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
