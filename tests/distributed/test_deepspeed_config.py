"""DeepSpeed configurations: those that we ship are valid, and mistakes get an answer that helps."""

import json
from pathlib import Path

import pytest
import torch

from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "ds_configs"
NVME = {"device": "nvme", "nvme_path": "/x"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    settings = read_deepspeed_config(path)
    assert settings.sharding["zero_optimization"]["stage"] == 3
    expected = {"zero3_bf16": torch.bfloat16, "zero3_fp16": torch.float16}.get(path.stem)
    assert settings.dtype == expected
    assert path.name in (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 2}}, "stage is 2; set it to 3"),
        ({"zero_optimization": {"stage": 3, "offload_parm": {}}}, "zero_optimization.offload_parm: Extra inputs"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}, "offload_param.device"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path is missing"),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "set stage3_max_reuse_distance to 0"),
        ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, "offload_param needs"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"fp16": {"enabled": True, "power": 1}}, "fp16.power: Extra inputs"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}, "remove optimizer"),
        ([], "expected a JSON object"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path, config, answer):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError) as caught:
        read_deepspeed_config(path)
    assert answer in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stage_0_is_plain_replication(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "fp16": {"enabled": True, "loss_scale": 8}}))
    settings = read_deepspeed_config(path)
    assert settings.sharding is None
    assert settings.dtype == torch.float16
    assert (settings.loss_scale.scale, settings.loss_scale.dynamic) == (8, False)
