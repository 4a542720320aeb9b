"""Trunks on several ranks: each computes those that it lacks in passes that all ranks make, sharded or not."""

import pytest

from tests.distributed.test_distributed import CONFIGS, run_script

pytestmark = pytest.mark.slow

TRAINED = """
import sys, torch
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.world import World
from megaprompt.engine.passes import Questions, Workplace, answers
from megaprompt.engine.trainer import Hooks
from megaprompt.prompting.packing import PassSize
from tests.conftest import PAIRS
from tests.engine.test_trunks import behind, demonstrations, objective_of, trainer_for

directory, config, groups = sys.argv[1], sys.argv[2], int(sys.argv[3])
sharded = config != "none"
dtype, tolerance = (torch.float32, 1e-3) if sharded else (torch.float64, 1e-9)

def asked(at):
    objective = objective_of(at.backbone)
    parts = [behind(at.backbone, "The capital of [X] is [Y]", PAIRS[r], demonstrations(r, 3)) for r in ("P36", "P30")]
    found = answers(at, [Questions(part, objective) for part in parts], None)
    return torch.cat([one["log_probability"] for one in found]), at.trunks.counts["trunk_tokens"]

with joined_world(force=True) as world:
    plain = load_backbone(directory, dtype)
    sizes = [PassSize(40, 80), PassSize(40, 80, trunks=False)]
    alone = trainer_for(plain, sizes[1]).train(Hooks())
    settings = read_deepspeed_config(Path(config)).sharding if sharded else None
    backbone = load_backbone(directory, dtype, deepspeed=settings)
    assert backbone.exact_size(sizes[0]) == sizes[0]
    trainer = trainer_for(backbone, sizes[0], world=world, groups=groups)
    if world.rank == 1:  # it has computed one already: ranks lack different numbers
        trunk = next(iter(trainer.at.trunks.lasting))
        other = trainer_for(plain, sizes[0], groups=1)
        other.train_step()
        trainer.at.trunks.known[trunk] = other.at.trunks.known[trunk]
    found = trainer.train(Hooks())
    assert trainer.at.trunks.counts["known_tokens"], trainer.at.trunks.counts
    for name, one in alone.items():
        torch.testing.assert_close(found[name].kept.vectors, one.kept.vectors, rtol=tolerance, atol=tolerance)
    [expected, none], [got, some] = (
        asked(Workplace(b, s, w, w)) for b, s, w in ((plain, sizes[1], World()), (backbone, sizes[0], world))
    )
    assert sum(world.gather(some)) > none == 0  # a rank may have questions without
    torch.testing.assert_close(got, expected, rtol=tolerance / 10, atol=tolerance / 10)
sys.stdout.write(f"rank {world.rank} of {world.size} fine\\n")
"""


@pytest.mark.parametrize(
    ("config", "groups"),
    [("none", 1), ("none", 2), (CONFIGS / "zero3.json", 1), (CONFIGS / "zero3.json", 2)],
    ids=["plain", "plain, groups", "zero3", "zero3, groups"],
)
def test_the_same_prompts_and_answers_on_two_ranks(backbone_directory, tmp_path, config, groups):
    assert run_script(TRAINED, tmp_path, 2, backbone_directory, config, groups).count("fine") == 2
