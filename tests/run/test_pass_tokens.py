"""How many tokens a pass has where nobody says."""

import json

import pytest
import torch

from megaprompt.config import ProbeConfig
from megaprompt.distributed.world import World
from megaprompt.prompting.packing import PassSize
from megaprompt.resources.plan import bytes_of_pass
from megaprompt.run.job import _pass_tokens, probe


@pytest.mark.parametrize(("passes", "tokens"), [(1, 1024), (4 * 2.5, 2048), (4 * 9, 8192), (4000, 16384)])
def test_a_gpu_gets_passes_as_large_as_fit_into_a_quarter(
    backbone_directory, make_backbone, monkeypatch, passes, tokens
):
    config, backbone = ProbeConfig(backbone=str(backbone_directory)), make_backbone("llama", torch.float32)
    free = int(passes * bytes_of_pass(config.backbone, torch.float32, PassSize(256, 1024), False)) + 1
    monkeypatch.setattr(World, "free_memory", lambda _: free)
    assert _pass_tokens(config, backbone, World(device=torch.device("cuda")), False) == tokens
    assert _pass_tokens(config, backbone, World(), False) == 1024


def test_a_run_that_goes_on_keeps_them(backbone_directory, data_directory, tmp_path):
    config = {"backbone": str(backbone_directory), "data": str(data_directory), "methods": ("manual",)}
    probe(ProbeConfig(**config, out=tmp_path / "run"))
    path = tmp_path / "run" / "results.json"
    assert json.loads(path.read_text())["pass_tokens"] == 1024
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False, "pass_tokens": 512}))
    assert probe(ProbeConfig(**config, out=tmp_path / "run", resume=True))["pass_tokens"] == 512
