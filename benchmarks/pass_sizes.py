"""How large passes should be: steps of P-tuning and answers, at true shapes with random weights, for several sizes.

    python benchmarks/pass_sizes.py [--backbones gpt2-medium,gpt2-xl] [--pass-tokens 1024,4096,16384]
                                    [--dtype bfloat16] [--relations 1] [--steps 3] [--seconds 300]

It runs on the GPU if there is one; the weights are made there, so that megatron-11b needs 22 GB on the device and
nothing on the host. Each case fills one pass with facts, and prints a line of JSON as soon as it is done: seconds of a
step and of answering the same facts (medians), of that packing on the host, tokens per second, shares of a large matrix
product's rate and of a large copy's, and on a GPU the peak of memory in a step, predicted from the shape and measured.
What does not fit is said so. After --seconds no new case begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from throughput import copy_rate, matmul_rate, timed, tokens_of  # the benchmark beside this one

from megaprompt.distributed.deepspeed_config import DeepSpeedSettings
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, answers
from megaprompt.engine.step import numbered_from
from megaprompt.prompting.packing import pack
from megaprompt.resources.measured_case import Case, Steps, random_model
from megaprompt.resources.predict import Job, Need, predict
from megaprompt.resources.profile import Profile, profile, shape_of


def predicted(case: Case) -> tuple[Need, Profile]:
    """What a step of the case needs; in a process of its own, while the device is busy."""
    torch.set_num_threads(1)
    dtype = getattr(torch, case.dtype)
    found = profile(shape_of(case.backbone), dtype, case.workload())
    return predict(found, Job(case.method, dtype, relations=case.relations, encoder=case.encoder)), found


def measured(case: Case, model, world: World, steps: int) -> dict[str, float]:
    """Seconds of a step, of answering, and of packing, the tokens of the pass, and the peak of memory in the steps."""
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = Steps(case, model, DeepSpeedSettings(), world)
    run.step()
    run.step()  # from the second on there is Adam's state
    seconds = [timed(run.step) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    learners = run.trainer.learners
    batches = [numbered_from(one.data.train, 6 * i) for i, one in enumerate(learners)]
    questions = [Questions(batch, one.data.objective) for batch, one in zip(batches, learners, strict=True)]
    with torch.no_grad():
        prompts = torch.cat([one.encoder() for one in learners])
    answering = [timed(lambda: answers(run.trainer.at, questions, prompts)) for _ in range(steps + 1)]
    queries = [instance.queries[0] for batch in batches for instance in batch]
    start = time.perf_counter()
    batch = pack(queries, run.trainer.at.size.row_tokens)
    packing = time.perf_counter() - start
    return {
        "facts": len(queries),
        "tokens": int(tokens_of(batch).sum()),
        "step": statistics.median(seconds),
        "answers": statistics.median(answering[1:]),
        "packing": packing,
        "peak": peak,
    }


def line(case: Case, found: dict[str, float], need: Future, peak: float, bandwidth: float, weights: int) -> dict:
    """The results of a case, rounded."""
    predicted_need, shape = need.result()
    step, answering = found["step"], found["answers"]
    forward = shape.flops / 2  # frozen weights: as many backward
    return {
        "backbone": case.backbone,
        "pass tokens": case.pass_tokens,
        "relations": case.relations,
        "facts": found["facts"],
        "tokens": found["tokens"],
        "seconds": {name: round(found[name], 4) for name in ("step", "answers", "packing")},
        "tokens per second": {name: round(found["tokens"] / found[name]) for name in ("step", "answers")},
        "facts per second": {name: round(found["facts"] / found[name]) for name in ("step", "answers")},
        "share of matrix product": {
            "step": round(shape.flops / step / peak, 3),
            "answers": round(forward / answering / peak, 3),
        },
        "share of copy": {
            "step": round(2 * weights / step / bandwidth, 3),
            "answers": round(weights / answering / bandwidth, 3),
        },
        "GB": {"predicted": round(predicted_need.total("device") / 1e9, 3), "measured": round(found["peak"] / 1e9, 3)},
        "GB by category": {name: round(size / 1e9, 3) for name, size in predicted_need.device.items()},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbones", default="gpt2-medium,gpt2-xl")
    options.add_argument("--pass-tokens", default="1024,4096,16384")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--relations", type=int, default=1)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--seconds", type=float, default=300)
    args = options.parse_args()
    start = time.monotonic()
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, args.dtype)
    cases = [
        Case(name, "p-tuning", None, 1, args.dtype, args.relations, pass_tokens=tokens)
        for name in args.backbones.split(",")
        for tokens in map(int, args.pass_tokens.split(","))
    ]
    workers = max(1, min(len(cases), len(os.sched_getaffinity(0)) - 1, 6))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        needs = [pool.submit(predicted, case) for case in cases]
        peak, bandwidth = matmul_rate(dtype, world.device), copy_rate(world.device)
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        about = {"device": device, "dtype": args.dtype, "torch": torch.__version__}
        print(json.dumps({**about, "matrix product TFLOP/s": peak / 1e12, "copy GB/s": bandwidth / 1e9}), flush=True)
        model, name = None, ""
        for case, need in zip(cases, needs, strict=True):
            if time.monotonic() - start > args.seconds:
                print(json.dumps({"backbone": case.backbone, "pass tokens": case.pass_tokens, "not begun": "no time"}))
                need.cancel()
                continue
            if name != case.backbone:
                model = None
                gc.collect()
                made = time.perf_counter()
                model, name = random_model(case, DeepSpeedSettings(), world), case.backbone
                weights = sum(parameter.nbytes for parameter in model.parameters())
                print(json.dumps({"backbone": name, "seconds to make": round(time.perf_counter() - made, 1)}))
            try:
                found = measured(case, model, world, args.steps)
            except torch.OutOfMemoryError as error:
                about = {"predicted GB": need.result()[0].total("device") / 1e9, "out of memory": str(error)[:120]}
                print(json.dumps({"backbone": name, "pass tokens": case.pass_tokens, **about}), flush=True)
                continue
            finally:
                gc.collect()
                if world.device.type == "cuda":
                    torch.cuda.empty_cache()
            print(json.dumps(line(case, found, need, peak, bandwidth, weights)), flush=True)


if __name__ == "__main__":
    main()
