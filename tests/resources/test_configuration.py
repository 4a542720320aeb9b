"""DeepSpeed configurations made for a model: their sizes by hand, and the plan of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, GPT2Config, GPT2LMHeadModel

from megaprompt.cli import main
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.resources.configuration import Sizes
from megaprompt.resources.gathering import gathering
from megaprompt.resources.layers import layers_of
from tests.resources.test_memory import CHAIN, ZERO

ROOT = Path(__file__).parents[2]
SHAPE = GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=600, n_positions=64, bos_token_id=0, eos_token_id=0)
LAYER = 12 * 32 * 32  # 3 + 1 + 4 + 4 squares


def test_sizes_by_hand():
    assert Sizes.of(GPT2LMHeadModel(SHAPE)) == Sizes("GPT2Block", LAYER, 600 * 32, 600 * 32, 4 * 32)


def test_a_layer_that_serves_all_is_no_row_of_layers():
    config = AlbertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=100, embedding_size=16
    )
    model = AlbertForMaskedLM(config)
    assert layers_of(model) == []
    assert Sizes.of(model).layer_class == ""


def test_a_leaf_is_gathered_at_once():
    """The second and third module are one layer: 650 elements, into a buffer and copied out of it."""
    profile = replace(CHAIN, layer_class="Layer", layers=(-1, 0, 0))
    found = gathering(profile, ZERO | {"leaf_module": {"classes": ["Layer"]}}, ranks=2, gloo=False)
    assert found.live == (100, 1300, 1300, 1300, 1300, 100)
    assert found.total == 2 * 750
    assert gathering(profile, ZERO, ranks=2, gloo=False) == gathering(CHAIN, ZERO, ranks=2, gloo=False)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Plans a model and writes a configuration; gives its section zero_optimization."""
    monkeypatch.chdir(ROOT)
    SHAPE.save_pretrained(tmp_path / "shape")

    def write(*options: str) -> dict:
        file = tmp_path / "made.json"
        assert main(["plan", str(tmp_path / "shape"), "--write-config", str(file), *options]) == 0
        assert read_deepspeed_config(file).sharding is not None
        return json.loads(file.read_text())["zero_optimization"]

    return write


@pytest.mark.slow
def test_what_is_written_fits_the_model(written, capsys):
    zero = written()  # whole copies fit: made of zero3
    assert zero["leaf_module"] == {"classes": ["GPT2Block"]}
    assert zero["stage3_prefetch_bucket_size"] == zero["stage3_max_reuse_distance"] == 600 * 32
    assert zero["stage3_max_live_parameters"] == LAYER + 2 * 600 * 32
    assert zero["stage3_param_persistence_threshold"] == 4 * 32
    assert "offload_param" not in zero
    assert "made.json" in capsys.readouterr().out
    assert written("--deepspeed", "zero3_cpu_offload")["offload_param"]["device"] == "cpu"


def test_nvme_keeps_its_rules(written):
    zero = written("--deepspeed", "zero3_nvme_offload", "--gpus", "2")
    assert zero["offload_param"]["buffer_size"] == 300 * 32
    assert (zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (0, 0)
    assert "leaf_module" not in zero


def test_what_does_not_shard_is_refused(tmp_path, capsys):
    (tmp_path / "whole.json").write_text("{}")
    SHAPE.save_pretrained(tmp_path / "shape")
    command = [
        "plan",
        tmp_path / "shape",
        "--deepspeed",
        tmp_path / "whole.json",
        "--write-config",
        tmp_path / "x.json",
    ]
    assert main([*map(str, command)]) == 2
    assert "does not shard" in capsys.readouterr().err
