"""The search among whole answers on several ranks: groups stay with the rank that keeps their keys and values."""

import pytest

from tests.distributed.test_distributed import CONFIGS, run_script
from tests.tasks.bear_data import write_bear

pytestmark = pytest.mark.slow

SEARCHED = """
import sys, torch
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.prompting.packing import PassSize
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks

directory, data, config = sys.argv[1], load_data(sys.argv[2]), sys.argv[3]
sharded = config != "none"

def ask(backbone, world, needs):
    [task] = lama_tasks(
        data, backbone, AskFor(needs=needs), names=("P36",), splits=("test",), limit=None, seed=0
    ).values()
    at = Workplace.shared(backbone, PassSize(256, 1024), world, task.objective)
    template = task.template("<1>[X]'s capital: [Y].")
    torch.manual_seed(0)
    prompts = torch.randn(1, backbone.hidden_size)
    [found] = answers(at, [Questions(task.instances("test", template), task.objective)], prompts)
    assert not at.trunks.known and not at.trunks.lasting
    assert not at.trunks.counts["trunk_tokens"], "what is kept is never computed again"
    return found

with joined_world(force=True) as world:
    expected = ask(load_backbone(directory), World(), "all")
    settings = read_deepspeed_config(Path(config)).sharding if sharded else None
    backbone = load_backbone(directory, deepspeed=settings)
    for needs in ("rank", "best"):
        found = ask(backbone, world, needs)
        assert torch.equal(found["rank"] == 1, expected["rank"] == 1)
        assert torch.equal(found["top"][:, 0], expected["top"][:, 0])
        assert needs == "best" or torch.equal(found["rank"], expected["rank"])
sys.stdout.write(f"rank {world.rank} of {world.size} fine\\n")
"""


@pytest.mark.parametrize("config", ["none", CONFIGS / "zero3.json"], ids=["plain", "zero3"])
def test_the_same_answers_on_two_ranks(backbone_directory, tmp_path, config):
    data = write_bear(tmp_path / "bear")
    assert run_script(SEARCHED, tmp_path, 2, backbone_directory, data, config).count("fine") == 2
