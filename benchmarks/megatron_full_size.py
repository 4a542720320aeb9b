"""Megatron 11B at its true size, on one machine without a GPU: convert the parts, and take one step of P-tuning.

    python benchmarks/megatron_full_size.py [--layers 72] [--directory /some/large/disk] [--keep]

Nobody needs to have the checkpoint: 8 parts with its shapes in float16 are filled with random numbers, as fairseq would
have written them. They are converted (peak memory is measured against the size of one part). Then one P-tuning step is
taken on a few packed facts, with weights that are mapped from the file: each layer is read, cast to float32, used and
let go, in the forward pass and again in the backward pass. So the step needs memory for one layer, not for the model.

The loss of a slice, the first two layers alone, is computed in both ways, streamed and plainly, and compared.

Prints one JSON object. Needs twice the size of the model on the disk (46 GB for 72 layers), and says so first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

from megaprompt.backbone import Backbone
from megaprompt.backbone.megatron import FairseqMegatronConfig, FairseqMegatronForCausalLM
from megaprompt.prompting.packing import pack
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.query import Query

PARTS, WIDTH, FFN, HEADS, ROWS, WORDS = 8, 3072, 18432, 32, 51200, 51196


def write_checkpoint(path: Path, layers: int) -> None:
    """Random parts with the shapes of Megatron 11B, one at a time."""
    path.mkdir(parents=True)
    options = argparse.Namespace(
        decoder_layers=layers, decoder_embed_dim=WIDTH, decoder_ffn_embed_dim=FFN, decoder_attention_heads=HEADS,
        decoder_normalize_before=True, decoder_learned_pos=False, share_decoder_input_output_embed=True,
        activation_fn="gelu", max_target_positions=1024,
    )  # fmt: skip
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    at = 0

    def random(*shape: int) -> Tensor:  # a window into the noise: quick, and no two tensors alike
        nonlocal at
        size = torch.Size(shape).numel()
        at = (at + 7919) % len(noise)
        times = -(-(size + at) // len(noise))
        return noise.repeat(times)[at : at + size].view(shape).clone()

    for part in range(PARTS):
        shared = torch.Generator().manual_seed(1)  # replicated tensors are the same in all parts

        def replicated(one: float, shared: torch.Generator = shared) -> Tensor:
            return (one + 0.02 * torch.randn(WIDTH, generator=shared)).half()

        model = {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
        model["decoder.embed_tokens.weight"] = random(ROWS // PARTS, WIDTH)
        for i in range(layers):
            name = f"decoder.layers.{i}."
            for projection in "qkv":
                model[f"{name}self_attn.{projection}_proj.weight"] = random(WIDTH // PARTS, WIDTH)
                model[f"{name}self_attn.{projection}_proj.bias"] = random(WIDTH // PARTS)
            model[f"{name}self_attn.out_proj.weight"] = random(WIDTH, WIDTH // PARTS)
            model[f"{name}fc1.weight"], model[f"{name}fc1.bias"] = random(FFN // PARTS, WIDTH), random(FFN // PARTS)
            model[f"{name}fc2.weight"] = random(WIDTH, FFN // PARTS)
            model[f"{name}self_attn.out_proj.bias"], model[f"{name}fc2.bias"] = replicated(0), replicated(0)
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                model[f"{name}{norm}.weight"], model[f"{name}{norm}.bias"] = replicated(1), replicated(0)
        model["decoder.layer_norm.weight"], model["decoder.layer_norm.bias"] = replicated(1), replicated(0)
        torch.save({"args": options, "model": model}, path / f"model-model_part-{part}.pt")
        del model
        gc.collect()
    (path / "dict.txt").write_text("".join(f"{i} {WORDS - i}\n" for i in range(WORDS - 4)))


class Streamed(nn.Module):
    """A module whose float16 weights are mapped from a file, and float32 only while it computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def _run(self, x: Tensor, *rest: Any) -> Tensor:
        weights = {name: parameter.float() for name, parameter in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, weights, (x, *rest))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return checkpoint(self._run, x, *rest, use_reentrant=False) if x.requires_grad else self._run(x, *rest)


class StreamedEmbedding(nn.Embedding):
    """Rows are cast when they are looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


def open_streamed(path: Path, layers: int | None = None) -> Backbone:
    """The converted model with its weights mapped from the file; only the first layers if a number is given."""
    config = FairseqMegatronConfig.from_pretrained(path)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        model = FairseqMegatronForCausalLM(config)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        wanted = model.state_dict().keys() - {"lm_head.weight"}
        weights = {name: file.get_tensor(name) for name in wanted}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    embedding = StreamedEmbedding(config.vocab_size, config.hidden_size, _weight=model.model.embed_tokens.weight)
    backbone = Backbone(model, _no_tokenizer(config.vocab_size), name="megatron-11b")
    model.model.embed_tokens = embedding
    model.model.layers = nn.ModuleList(Streamed(layer) for layer in model.model.layers)
    model.model.layer_norm = Streamed(model.model.layer_norm)
    rows_of_head = model.lm_head.weight.split(1 << 13)
    # Replacing only `forward` keeps the hook that selects the targets.
    model.lm_head.forward = lambda hidden: torch.cat([hidden @ rows.float().T for rows in rows_of_head], dim=1)
    return backbone


def _no_tokenizer(words: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(words)})))


QUERIES = [Query((-1, -2, -3, 100 + i, 900 + 7 * i, -4, -5, -6), (7,)) for i in range(8)]
OBJECTS = [2000 + 11 * i for i in range(8)]


def step(backbone: Backbone) -> tuple[float, float, float]:
    """One step for one relation with a batch of 8: loss, norm of the prompts' gradient, seconds."""
    torch.manual_seed(0)
    encoder = PromptEncoder(6, backbone.hidden_size)
    encoder.start_near(backbone.embedding_statistics)
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-5)
    start = time.perf_counter()
    prompts = encoder()
    prompts.retain_grad()
    batch = pack(QUERIES, 256)
    logits = backbone(batch, prompts)[batch.target_of_query]
    loss = cross_entropy(logits.float(), torch.tensor(OBJECTS))
    loss.backward()
    optimizer.step()
    assert prompts.grad is not None
    return loss.item(), prompts.grad.norm().item(), time.perf_counter() - start


def plain_slice(path: Path, layers: int) -> tuple[float, float]:
    """Loss and gradient norm of the first layers, as an ordinary float32 model computes them."""
    config = FairseqMegatronConfig.from_pretrained(path)
    config.num_hidden_layers = layers
    model = FairseqMegatronForCausalLM(config)
    with safe_open(path / "model.safetensors", framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
    backbone = Backbone(model, _no_tokenizer(config.vocab_size), name="slice")
    return step(backbone)[:2]


class Peak:
    """Peak of anonymous memory (what a process cannot give back), bytes read, and seconds of a block, by sampling."""

    anonymous = read = 0
    seconds = 0.0


@contextmanager
def measured() -> Iterator[Peak]:
    import threading

    process, peak, stop = psutil.Process(), Peak(), threading.Event()

    def anonymous() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    def sample() -> None:
        while not stop.wait(0.02):
            peak.anonymous = max(peak.anonymous, anonymous())

    base, read, start = anonymous(), process.io_counters().read_bytes, time.perf_counter()
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.seconds = time.perf_counter() - start
        peak.read = process.io_counters().read_bytes - read
        peak.anonymous -= base


CONVERT = """
import resource, sys, time
from pathlib import Path
from megaprompt.backbone.fairseq_bridge import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]), tokenizer=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=72)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="leave the converted model there")
    options = parser.parse_args()
    size = 2 * (ROWS * WIDTH + options.layers * (4 * WIDTH * WIDTH + 2 * WIDTH * FFN))
    free = shutil.disk_usage(options.directory).free
    if free < 2.05 * size:
        sys.exit(f"{options.directory} needs {2.05 * size / 1e9:.0f} GB, {free / 1e9:.0f} are free; give --directory")
    work = Path(tempfile.mkdtemp(prefix="megatron-", dir=options.directory))
    result: dict[str, Any] = {"layers": options.layers, "cores": os.cpu_count()}
    result["memory of the machine, GB"] = round(psutil.virtual_memory().total / 1e9, 1)
    try:
        start = time.perf_counter()
        write_checkpoint(work / "parts", options.layers)
        part = max(path.stat().st_size for path in (work / "parts").glob("*.pt"))
        result["checkpoint"] = {
            "parts": PARTS,
            "GB": round(PARTS * part / 1e9, 2),
            "seconds": time.perf_counter() - start,
        }
        command = [sys.executable, "-c", CONVERT, str(work / "parts"), str(work / "model")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        result["conversion"] = {"peak memory / one part": float(output[0]) / part, "seconds": float(output[1])}
        shutil.rmtree(work / "parts")

        expected = plain_slice(work / "model", 2)
        got = step(open_streamed(work / "model", 2))
        result["slice of 2 layers"] = {"plain loss": expected[0], "streamed loss": got[0]}
        result["slice of 2 layers"]["relative difference of the gradients' norm"] = abs(got[1] / expected[1] - 1)
        gc.collect()
        with measured() as peak:
            backbone = open_streamed(work / "model")
            loss, gradient, seconds = step(backbone)
        result["step"] = {
            "parameters": sum(p.numel() for p in backbone.model.parameters()),
            "loss": loss,
            "norm of the prompts' gradient": gradient,
            "seconds": seconds,
            "seconds with opening": peak.seconds,
            "peak anonymous memory, GB": peak.anonymous / 1e9,
            "read from disk, GB": peak.read / 1e9,
        }
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
