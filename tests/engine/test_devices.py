"""Devices, without a GPU: passes on tensors without data that claim to be on one, in a process of its own.

PyTorch's FakeTensorMode follows the device of every tensor and raises where two meet that differ. A build without CUDA
cannot copy to a GPU or index there even without data, so that is done here; and it aborts in a forward with gradients,
so there are none. An index on the CPU into a tensor on the GPU raises as well: on a real one it would wait for a copy.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PASSES = """
import sys, torch
from torch._C._nn import _parse_to
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import BertConfig, GPT2Config, LlamaConfig

from megaprompt.backbone.megatron import FairseqMegatronConfig
from megaprompt.backbone.packed import PackedModel, language_model
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers, backward_passes, joint_answers
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.query import Query
from megaprompt.tasks.lama.one_token import OneToken
from megaprompt.tasks.task import Instance

GPU, TOP, WORDS = torch.device("cuda"), 3, 60


def blank(tensor, device, dtype=None):
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)


class WithoutBuild(TorchFunctionMode):
    '''What a build without CUDA cannot do even without data: copies, and some operations, which are done aside.'''

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu:
            return blank(args[0], "cpu")
        if func is torch.Tensor.to:
            like = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else None
            device, dtype, *_ = (like.device, like.dtype) if like is not None else _parse_to(*args[1:], **kwargs)
            if device is not None and device.type != args[0].device.type:
                return blank(args[0], device, dtype)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked" not in str(error):
                raise
        places = {one.device.type for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        if places != {"cuda"}:
            raise RuntimeError(f"{func}: found at least two devices, {places}")
        aside = tree_map_only(torch.Tensor, lambda one: blank(one, "cpu"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda one: blank(one, GPU), func(*aside[0], **aside[1]))


def moved(module):
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(blank(tensor, GPU), requires_grad=False)
        for name, tensor in part._buffers.items():
            part._buffers[name] = None if tensor is None else blank(tensor, GPU)
    return module


class Words(OneToken):
    '''The number of allowed answers is nothing that tensors without data could tell.'''

    def blank(self, instances):
        whole, real = torch.zeros(instances, dtype=torch.int64), torch.zeros(instances, dtype=torch.float64)
        return {"rank": whole, "log_probability": real, "top_tokens": whole[:, None].repeat(1, TOP),
                "top_log_probability": real[:, None].repeat(1, TOP)}


small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": WORDS}
SHAPES = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=WORDS, n_positions=64),
    "llama": LlamaConfig(**small, num_key_value_heads=1, intermediate_size=32),
    "bert": BertConfig(**small, intermediate_size=32),
    "megatron": FairseqMegatronConfig(**small, intermediate_size=32, max_position_embeddings=64),
}
kind, wrong = sys.argv[1], sys.argv[2]
with FakeTensorMode(allow_non_fake_inputs=True), WithoutBuild(), torch.no_grad():
    model = moved(PackedModel(language_model(SHAPES[kind]).from_config(SHAPES[kind])))
    prompts = moved(PromptEncoder(6, model.hidden_size, "mlp"))()
    assert prompts.device.type == model.device.type == "cuda"
    objective = Words(torch.ones(WORDS, dtype=torch.bool), str, TOP)
    mask = () if model.causal else (9,)
    target = 7 if model.causal else 8

    def asked(first):
        tokens = [(-1, -2, -3, *([11 + i] * (1 + i % 3)), -4, -5, -6, *mask) for i in range(7)]
        return [Instance((Query(t, (len(t) - 1,), bidirectional=not model.causal),), 2) for t in tokens]

    for size in (PassSize(24, 48), PassSize(None, 48)):
        at = Workplace(model, size, World(device=GPU), World(device=GPU))
        questions = [Questions(asked(0), objective), Questions(asked(1), objective)]
        found = answers(at, questions, prompts.cpu() if wrong == "prompts" else prompts)
        assert all(one.device.type == "cpu" for each in found for one in each.values())
        # Losses without gradients, as AutoPrompt tries its candidates.
        losses = backward_passes(at, prompts, questions, torch.ones(14, dtype=torch.float64), lambda loss, last: None)
        assert losses.device.type == "cpu"
        plain = [[one._replace(queries=(one.queries[0]._replace(
            tokens=tuple(max(t, 1) for t in one.queries[0].tokens)),)) for one in asked(0)]] * 2
        model.vocabulary_size = WORDS
        joint_answers(at, plain, [0.5, 0.5], objective)
print("fine")
"""


def passes(kind: str, wrong: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PASSES, kind, wrong], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "megatron"])
def test_all_tensors_of_a_pass_are_on_its_device(kind):
    finished = passes(kind)
    assert "fine" in finished.stdout, finished.stderr


@pytest.mark.slow
def test_a_tensor_on_another_device_is_found():
    assert "found at least two devices" in passes("gpt2", "prompts").stderr
