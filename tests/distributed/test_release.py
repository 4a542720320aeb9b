"""Backbones that were sharded can be let go of: several are loaded one after the other, and none stays in memory."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megaprompt.distributed.zero3 import release
from tests.distributed.test_distributed import ZERO3, run_script

pytestmark = pytest.mark.slow

ONE_AFTER_THE_OTHER = """
import gc, json, sys, weakref, torch
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.zero3 import release, shard
from megaprompt.prompting.packing import pack
from megaprompt.prompting.query import Query
from megaprompt.resources.measured_case import PeakMemory

directory, config, trained = sys.argv[1:]
settings = read_deepspeed_config(Path(config))
references, memory = [], []

def step():
    backbone = load_backbone(
        directory, deepspeed=settings.for_training(torch.float32), trainable=trained == "trained"
    )
    batch = pack([Query((1, 2, 3), (2,)), Query((1, 2, 4), (2,))], 64)
    if trained == "trained":
        engine = shard(backbone, settings.for_training(torch.float32), torch.optim.Adam(backbone.parameters(), 1e-3))
        engine.backward(backbone(batch).logsumexp(1).sum(), scale_wrt_gas=False)
        engine.step()
    else:
        prompts = torch.zeros(1, backbone.hidden_size, requires_grad=True)
        backbone(batch, prompts).logsumexp(1).sum().backward()
    references.extend([weakref.ref(backbone), weakref.ref(backbone.engine), weakref.ref(next(backbone.parameters()))])
    release(backbone)
    return sum(p.ds_numel * p.element_size() for p in backbone.parameters())

with joined_world(force=True):
    for _ in range(4):
        size = step()
        gc.collect()
        memory.append(PeakMemory.now())
print(f"alive {sum(reference() is not None for reference in references)}")
print(f"grown {(memory[-1] - memory[0]) / size:.3f}")
"""


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A model of 50 MB: growth by one of them would be seen."""
    path = tmp_path_factory.mktemp("backbone")
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=512, vocab_size=len(tokenizer), n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_a_released_backbone_is_freed(directory, tmp_path, kind):
    output = run_script(ONE_AFTER_THE_OTHER, tmp_path, 1, directory, ZERO3[1], kind)
    assert "alive 0" in output
    assert float(re.search(r"grown (-?\d+\.\d{3})", output)[1]) < 0.5  # by three models in all


def test_a_backbone_that_is_not_sharded_is_left_alone(make_backbone):
    backbone = make_backbone()
    release(backbone)
    assert torch.isfinite(backbone(torch.tensor([1, 2, 3]))).all()
