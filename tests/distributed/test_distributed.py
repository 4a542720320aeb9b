"""Several processes, real DeepSpeed ZeRO-3 on the CPU: the same prompts as one process, however the work is divided."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megaprompt.run.saved_prompts import load_prompts
from tests.conftest import PAIRS, TEMPLATES, run_cli, write_facts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
ZERO3 = ("--deepspeed", CONFIGS / "zero3.json")
CPU_OFFLOAD = ("--deepspeed", CONFIGS / "zero3_cpu_offload.json")
OPTIONS = ("--learning-rate", "0.003", "--max-epochs", "3")


def torchrun(ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    """The options of a run, and its result on one process. Relations differ in size, so that some ranks idle early."""
    path = tmp_path_factory.mktemp("alone")
    sizes = {"P36": len(PAIRS["P36"]), "P30": 9, "P17": 5, "P37": 2}
    for relation, size in sizes.items():
        pairs = (PAIRS.get(relation) or PAIRS["P36"])[:size]
        for split in ("train", "dev", "test"):
            write_facts(path / "data" / "trex" / split / f"{relation}.jsonl", pairs)
    rows = [{"relation": r, "template": TEMPLATES["P36"], "label": r, "type": "N-1"} for r in sizes]
    (path / "data" / "relations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    config = LlamaConfig(  # parameters of a megabyte, below which DeepSpeed does not swap
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8, hidden_size=768, intermediate_size=1024,
        vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "backbone")
    tokenizer.save_pretrained(path / "backbone")
    options = ("--backbone", path / "backbone", "--data", path / "data", *OPTIONS)
    finished = run_cli("probe", *options, "--out", path / "run")
    assert finished.returncode == 0, finished.stderr
    return options, path / "run"


def assert_same_run(first: Path, second: Path, tolerance: float = 1e-3) -> dict:
    prompts, others = load_prompts(first), load_prompts(second)
    assert set(prompts) == set(others)
    for name, prompt in prompts.items():
        error = (prompt.vectors - others[name].vectors).norm() / prompt.vectors.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    for name, row in results[0]["methods"]["p-tuning"]["relations"].items():
        assert results[1]["methods"]["p-tuning"]["relations"][name]["epochs"] == row["epochs"]
    assert results[0]["methods"]["manual"] == results[1]["methods"]["manual"]
    return results[1]


@pytest.mark.parametrize(
    ("ranks", "deepspeed", "groups"),
    [
        (1, ZERO3, 1), (1, CPU_OFFLOAD, 1),
        (2, (), 1), (2, ZERO3, 1), (2, ZERO3, 2), (2, CPU_OFFLOAD, 2),
        (4, ZERO3, 1), (4, ZERO3, 2), (4, ZERO3, 4),
    ],
    ids=lambda value: Path(value[1]).stem if value and isinstance(value, tuple) else str(value),
)  # fmt: skip
def test_same_prompts_on_any_number_of_ranks_and_groups(alone, tmp_path, ranks, deepspeed, groups):
    options, expected = alone
    launcher = torchrun(ranks) if ranks > 1 else (sys.executable,)
    options = (*options, *deepspeed, "--relation-groups", groups, "--out", tmp_path / "many")
    finished = run_cli("probe", *options, launcher=launcher)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = assert_same_run(expected, tmp_path / "many")
    assert results["environment"]["world_size"] == ranks
    sent = results["communication"]["sent_bytes_by_rank"]
    assert len(sent) == ranks
    assert all(bool(rank.get("gradients")) == (groups < ranks) for rank in sent)  # none where nobody shares relations


NO_WHOLE_COPIES = """
import sys
from megaprompt.cli import main
from megaprompt.run import fitting
fitted = fitting.fitted

def without_memory(config, templates, machines, deepspeed, *more):
    machines = machines if deepspeed else machines._replace(host_memory=0.1)
    return fitted(config, templates, machines, deepspeed, *more)

fitting.fitted = without_memory
sys.exit(main(sys.argv[1:]))
"""


def test_auto_shards_where_whole_copies_do_not_fit(backbone_directory, data_directory, tmp_path):
    options = ("--backbone", backbone_directory, "--data", data_directory, "--learning-rate", 3e-3, "--max-steps", 4)
    assert run_cli("probe", *options, "--out", tmp_path / "alone").returncode == 0
    (tmp_path / "main.py").write_text(NO_WHOLE_COPIES)
    command = (*torchrun(2), tmp_path / "main.py", "probe", *options, "--deepspeed", "auto", "--out", tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr
    assert "--deepspeed auto takes zero3, since whole copies would be too large" in finished.stderr
    assert assert_same_run(tmp_path / "alone", tmp_path / "run")["deepspeed"] == "ds_configs/zero3.json"


def test_the_same_is_chosen_on_ranks_and_groups(backbone_directory, data_directory, tmp_path):
    """Candidates of one relation are in different groups, and are dropped by what all ranks know."""
    options = ("--backbone", backbone_directory, "--data", data_directory, "--methods", "best", "--learning-rate", 3e-3)
    options = (*options, "--max-steps", "50")
    assert run_cli("probe", *options, "--out", tmp_path / "one").returncode == 0
    finished = run_cli(
        "probe", *options, *ZERO3, "--relation-groups", "2", "--out", tmp_path / "two", launcher=torchrun(2)
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one, two = (json.loads((tmp_path / run / "results.json").read_text())["methods"] for run in ("one", "two"))
    for method in ("in-context", "best"):
        for relation, row in one[method]["relations"].items():
            other = two[method]["relations"][relation]
            assert (other.get("chosen"), other.get("shown")) == (row.get("chosen"), row.get("shown"))
            assert other["mrr"] == pytest.approx(row["mrr"], abs=1e-3)
            dropped = [[(each.get("name"), each.get("dropped_after")) for each in r["tried"]] for r in (row, other)]
            assert dropped[0] == dropped[1]
    steps = {each["dropped_after"] for row in one["best"]["relations"].values() for each in row["tried"]}
    assert 25 in steps  # some were dropped


def test_nvme_offload_gives_the_same_prompts(alone, tmp_path):
    """Most of its time is the build of the operator, once on a machine."""
    options, expected = alone
    config = json.loads((CONFIGS / "zero3_nvme_offload.json").read_text())
    config["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path / "nvme"), "buffer_size": 800_000}
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    options = (*options, "--deepspeed", tmp_path / "nvme.json", "--out", tmp_path / "run")
    finished = run_cli("probe", *options, launcher=torchrun(2), timeout=900)
    if "libaio" in finished.stderr:
        pytest.skip("libaio with its headers is not installed")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_run(expected, tmp_path / "run")
    assert any((tmp_path / "nvme").rglob("*.swp")), "nothing was offloaded"


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("fp16", 0.001)])
def test_half_precision_learns_about_the_same(alone, tmp_path, precision, tolerance):
    """Losses of all epochs, within a few roundings of those in float32: measured are 0.0025 and 0.0003."""
    options, expected = alone
    options = (*options, "--deepspeed", CONFIGS / f"zero3_{precision}.json", "--out", tmp_path / "half")
    finished = run_cli("probe", *options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads((tmp_path / "half" / "results.json").read_text())
    assert results["backbone"]["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[precision]
    lines = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (expected, tmp_path / "half")]
    for one, other in zip(*lines, strict=True):
        assert one["relation"] == other["relation"]
        assert other["skipped_steps"] <= 4
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=tolerance)
        assert other["train_loss"] != one["train_loss"]  # it was computed in another precision


CHECKPOINTS = """
import sys, torch
from pathlib import Path
from megaprompt.distributed.launch import joined_world
from megaprompt.errors import MegapromptError
from megaprompt.run.checkpoint_writer import CheckpointWriter
from megaprompt.run.checkpoints import load_checkpoint

with joined_world() as world, CheckpointWriter(Path(sys.argv[1]), world) as writer:
    state = {"weight": torch.full((1000,), float(world.rank))}
    writer.save(1, {f"P{world.rank}": state}, {"step": 1})
    writer.finish()
    writer.save(2, {f"P{world.rank}": state} | ({"no/such": state} if world.rank else {}), {"step": 2})
    try:
        writer.finish()
    except MegapromptError as error:
        assert "No such file" in str(error)
    else:
        raise AssertionError
    found = load_checkpoint(Path(sys.argv[1]), world)
    assert (found.step, found.about) == (1, {"step": 1})
    assert [found.read(f"P{rank}")["weight"][0] for rank in range(2)] == [0, 1]
"""


def test_every_rank_writes_its_part_and_all_know_of_a_failure(tmp_path):
    (tmp_path / "main.py").write_text(CHECKPOINTS)
    command = (*torchrun(2), tmp_path / "main.py", tmp_path / "state")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000001"]


def test_resuming_on_another_number_of_ranks(alone, tmp_path):
    """A checkpoint written on 2 ranks in 2 groups goes on alone, to the same prompts."""
    options, expected = alone
    few = (*options[:-1], "3", "--out", tmp_path / "run")
    script = tmp_path / "stop.py"
    script.write_text(STOP_AFTER_3)
    finished = subprocess.run(
        [*torchrun(2), script, *few, *ZERO3, "--relation-groups", "2"],
        capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "interrupted after step 3" in finished.stderr, finished.stderr
    resumed = run_cli("probe", "--resume", "--out", tmp_path / "run", "--relation-groups", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(expected, tmp_path / "run")


STOP_AFTER_3 = """
import sys
from megaprompt.engine import trainer
from megaprompt.cli import main

original = trainer.Trainer.train
def train(self, hooks):
    hooks.should_stop = lambda: self.step == 3
    return original(self, hooks)
trainer.Trainer.train = train
sys.exit(main(["probe", *sys.argv[1:]]))
"""


FROZEN = """
import sys, torch, deepspeed
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.distributed.zero3 import whole
from megaprompt.engine.trainer import Hooks
from megaprompt.prompting.recipe import Recipe
from tests.engine.test_trainer import trainer_for

with joined_world(force=True) as world:
    before = dict(load_backbone(sys.argv[1]).named_parameters())
    backbone = load_backbone(sys.argv[1], deepspeed=read_deepspeed_config(Path(sys.argv[2])).sharding)
    trainer = trainer_for(backbone, recipe=Recipe(0.01, 0.0, 1.0, batch_size=4, max_epochs=2, patience=9), world=world)
    owned = {id(p) for l in trainer.learners for g in l.optimizer.param_groups for p in g["params"]}
    trainer.train(Hooks())
    assert backbone.engine.optimizer.__class__.__name__ == "DeepSpeedZeRoOffload"
    for name, p in backbone.named_parameters():
        assert hasattr(p, "ds_id") and not p.requires_grad and p.grad is None and id(p) not in owned, name
        with whole([p]):
            assert torch.equal(p, before[name]), name
    for weight in [l.encoder.embedding.weight.detach() for l in trainer.learners]:
        other = weight.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, weight), "replicas of the encoder have drifted apart"
print(f"rank {world.rank} of {world.size} fine")
"""

MEMORY = """
import os, resource, sys, torch
from pathlib import Path
from megaprompt.backbone import load_backbone
from megaprompt.distributed.launch import joined_world
from megaprompt.distributed.deepspeed_config import read_deepspeed_config
from megaprompt.prompting.packing import pack
from megaprompt.prompting.query import Query

with joined_world(force=True) as world:
    config = read_deepspeed_config(Path(sys.argv[2])).sharding
    load_backbone(sys.argv[1], deepspeed=config)  # imports, operators, thread pools
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    backbone = load_backbone(sys.argv[3], deepspeed=config)
    backbone(pack([Query((1, 2, 3), (2,))], 64))
    grown = peak() - before
    size = sum(p.ds_numel * p.element_size() for p in backbone.parameters())
sys.stdout.write(f"grown {grown / size:.3f}\\n")  # in one piece, since four processes write
"""


def run_script(text: str, tmp_path: Path, ranks: int, *args: object) -> str:
    script = tmp_path / "script.py"
    script.write_text(text + "\nimport os\nsys.stdout.flush()\nos._exit(0)\n")  # as megaprompt's processes end
    finished = subprocess.run(
        [*map(str, (*torchrun(ranks), script, *args))],
        capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_backbone_is_bit_identical_and_owns_nothing_under_zero3(backbone_directory, tmp_path):
    assert run_script(FROZEN, tmp_path, 2, backbone_directory, ZERO3[1]).count("fine") == 2


REPLICAS = """
import sys, torch
from megaprompt.backbone import load_backbone
from megaprompt.distributed.launch import joined_world
from megaprompt.engine.trainer import Hooks
from tests.engine.test_trainer import trainer_for

with joined_world(force=True) as world:
    backbone = load_backbone(sys.argv[1], torch.float64)
    expected = trainer_for(backbone).train(Hooks())
    trainer = trainer_for(backbone, world=world)
    if world.rank == 1:  # as if its kernels had added up in another order, only worse
        with torch.no_grad():
            for learner in trainer.learners:
                for parameter in learner.parameters:
                    parameter.mul_(1.5)
    for name, one in trainer.train(Hooks()).items():
        torch.testing.assert_close(one.kept.vectors, expected[name].kept.vectors, rtol=1e-9, atol=1e-9)
        assert one.dev == expected[name].dev
print(f"rank {world.rank} of {world.size} fine")
"""


def test_a_replica_that_drifts_is_no_part_of_the_results(backbone_directory, tmp_path):
    assert run_script(REPLICAS, tmp_path, 2, backbone_directory).count("fine") == 2


def test_no_rank_ever_holds_the_whole_backbone(backbone_directory, tokenizer, tmp_path):
    """Peak resident memory of each of 4 ranks, on a backbone of 0.5 GB: a quarter of it, one layer, and change."""
    config = LlamaConfig(
        num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8, hidden_size=1024, intermediate_size=1536,
        vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    live = json.loads(ZERO3[1].read_text())
    live["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    (tmp_path / "ds.json").write_text(json.dumps(live))
    output = run_script(MEMORY, tmp_path, 4, backbone_directory, tmp_path / "ds.json", tmp_path / "backbone")
    grown = [float(share) for share in re.findall(r"grown (\d+\.\d{3})", output)]
    assert len(grown) == 4
    assert max(grown) < 0.6, grown
