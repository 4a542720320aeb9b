"""The scripts in slurm/, as they come, on machines of several sizes: their runs fit, or are refused with a remedy."""

import re
from pathlib import Path

import pytest

from megaprompt.config import PlanConfig
from megaprompt.resources.plan import advice, plan

SLURM = Path(__file__).parents[2] / "slurm"
MACHINES = {
    "2 x 8 x 80 GB": {"nodes": 2, "gpus": 8, "gpu_memory": 80.0, "host_memory": 1000.0},
    "2 x 4 x 40 GB": {"nodes": 2, "gpus": 4, "gpu_memory": 40.0, "host_memory": 500.0},
    "1 x 8 x 24 GB": {"nodes": 1, "gpus": 8, "gpu_memory": 24.0, "host_memory": 256.0},
    "1 x 80 GB": {"nodes": 1, "gpus": 1, "gpu_memory": 80.0, "host_memory": 256.0},
}
RUNS = {"lama_11b.sh": "megatron-11b", "lama_gpt2_xl.sh": "gpt2-xl"}  # one job with all relations
RELATIONS = 41
pytestmark = pytest.mark.slow


def planned(script: str, machine: str):
    found = re.search(r"--deepspeed (\S+)", (SLURM / script).read_text())
    config = PlanConfig(RUNS[script], relations=RELATIONS, **MACHINES[machine])
    return plan(config, Path(found[1]) if found[1] != "auto" else None)  # which it takes first


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("script", RUNS)
def test_a_job_with_all_relations_fits(script, machine):
    found = planned(script, machine)
    assert found.fits, found.reasons
    ranks = MACHINES[machine]["nodes"] * MACHINES[machine]["gpus"]
    assert found.groups == ranks
    encoders = found.bytes["device"]["encoders"]
    assert encoders <= 0.5 * (found.available["device"] - found.bytes["device"]["parameters"])


def test_waves_where_the_encoders_do_not_fit_together():
    waves = {machine: planned("lama_11b.sh", machine).waves for machine in MACHINES}
    assert waves["2 x 8 x 80 GB"] == 1
    assert waves["1 x 80 GB"] > 1
    config = PlanConfig("megatron-11b", relations=RELATIONS, **MACHINES["1 x 80 GB"])
    said = advice(config, [planned("lama_11b.sh", "1 x 80 GB")])
    assert f"relations in {waves['1 x 80 GB']} waves, one after the other" in said
    assert planned("lama_gpt2_xl.sh", "1 x 80 GB").waves == 1


def test_too_small_machines_are_refused_with_a_remedy():
    config = PlanConfig("megatron-11b", relations=RELATIONS, gpus=1, gpu_memory=8.0, host_memory=16.0)
    found = plan(config, Path("ds_configs/zero3.json"))
    assert not found.fits
    assert "does not fit" in advice(config, [found])
