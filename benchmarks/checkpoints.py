"""What a checkpoint costs: how long training waits for one, how fast it is written, and what memory it takes meanwhile.

    python benchmarks/checkpoints.py [--hidden-size 3072] [--relations 3] [--out DIRECTORY] [--in-one]

Prompt encoders with Adam's state, at the true size (1.6 GB each for 3072, that of Megatron 11B), are written twice: at
once, as before the end of a job, and while a thread takes small steps. --in-one writes each state through a buffer in
memory, as versions before did. What is written is deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megaprompt.distributed.world import World
from megaprompt.files import write_file
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.run.checkpoint_writer import CheckpointWriter


def state_of(hidden_size: int) -> dict[str, Any]:
    """What a learner has to go on from, with numbers that are not measured."""
    with torch.device("meta"):
        encoder = PromptEncoder(6, hidden_size)
    weights = {name: torch.ones(p.shape) for name, p in encoder.named_parameters()}
    averages = {
        i: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)} for i, p in enumerate(weights.values())
    }
    return {"encoder": weights, "optimizer": {"state": averages}}


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def step() -> float:
    """Seconds of some computing."""
    start = time.monotonic()
    matrix = torch.ones(700, 700)
    for _ in range(5):
        matrix @ matrix
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=3072)
    parser.add_argument("--relations", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--in-one", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    states = {f"P{i}": state_of(options.hidden_size) for i in range(options.relations)}
    size = sum(t.nbytes for state in states.values() for t in state["encoder"].values()) * 3
    held, found = peak(), {"gigabytes": size / 1e9}
    alone = statistics.median(step() for _ in range(50))

    def said(way: str, seconds: float, stall: float, **more: float) -> None:
        line = {"way": way, **found, "seconds": seconds, "gigabytes_per_second": size / 1e9 / seconds}
        line |= {"training_waits": stall, "memory_beside_the_state": peak() - held, **more}
        print(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in line.items()}), flush=True)

    with tempfile.TemporaryDirectory(dir=options.out) as out:
        if options.in_one:
            start = time.monotonic()
            for name, state in states.items():
                buffer = io.BytesIO()
                torch.save(state, buffer)
                write_file(Path(out) / f"{name}.pt", buffer.getvalue())
                hashlib.sha256(buffer.getvalue()).hexdigest()
            said("in one", seconds := time.monotonic() - start, seconds)
            return
        with CheckpointWriter(Path(out), World()) as writer:
            start = time.monotonic()
            writer.save(1, states, {}, complete=True)
            said("at once", seconds := time.monotonic() - start, seconds)
            start = time.monotonic()
            writer.save(2, states, {})
            stall, steps = time.monotonic() - start, []
            while writer.is_writing:
                steps.append(step())
            writer.finish()
            slower = statistics.median(steps) / alone if steps else 1.0
            said("meanwhile", time.monotonic() - start, stall, steps_take_times=slower)


if __name__ == "__main__":
    main()
