"""The scripts in slurm/, unmodified, on a real Slurm with two virtual nodes (see `slurm_cluster`)."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megaprompt.cli import main
from megaprompt.report.runs import read_run
from megaprompt.run.progress import read_progress
from tests.backbone.megatron_parts import random_model, write_checkpoint
from tests.conftest import PAIRS, make_model, run_cli, write_data
from tests.distributed.test_launch import BIN, HELLO, ROOT
from tests.run.slurm_cluster import SlurmCluster, wait_for, why_not
from tests.tasks.superglue.made_up import write_model, write_superglue

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

EPOCHS = 150  # of the run that is disturbed; the others are short
SMALL = ("--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm") as base:
        cluster = SlurmCluster(Path(base))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def options(backbone_directory, tmp_path_factory):
    """Options of `megaprompt probe` for all runs here."""
    data = write_data(tmp_path_factory.mktemp("data") / "facts")
    return [str(part) for part in ("--backbone", backbone_directory, "--data", data, "--learning-rate", "0.01")]


@pytest.fixture(scope="module")
def megatron(tokenizer, tmp_path_factory):
    """A small Megatron in 8 parts, converted; its words are those of the other backbones here."""
    path = tmp_path_factory.mktemp("megatron")
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (path / "encoder.json").write_text(json.dumps(bpe["vocab"]))
    (path / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"]))
    (path / "dict.txt").write_text("".join(f"{i} 1\n" for i in bpe["vocab"].values()))
    rows = -(-(len(bpe["vocab"]) + 4) // 64) * 64
    write_checkpoint(path, random_model(rows), parts=8)
    assert main(["convert", str(path), str(path / "converted")]) == 0
    return path / "converted"


def epochs(number: int) -> list[str]:
    return [f"--max-epochs={number}", f"--patience={number}", f"--max-steps={2 * number}"]


@pytest.fixture(scope="module")
def short(options, tmp_path_factory):
    """A short run in one process."""
    out = tmp_path_factory.mktemp("short") / "run"
    finished = run_cli("probe", *options, *epochs(20), "--out", out)
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """A longer run, on two ranks outside of Slurm."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finished = run_cli("probe", *options, *epochs(EPOCHS), "--out", out, launcher=torchrun)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out


@pytest.fixture
def site(tmp_path):
    """A user's slurm/site.env."""
    path = tmp_path / "site.env"
    path.write_text(
        f"PYTHON=('{sys.executable}')\n"
        f"export PYTHONPATH='{ROOT}' OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1\n"
    )
    return {"MEGAPROMPT_SITE": str(path), "SBATCH_OUTPUT": str(tmp_path / "%x-%A-%a.out")}


@pytest.fixture
def submit(cluster, site):
    """Submit a script of slurm/ for two nodes; returns the job's id."""

    def submit(script: str, *arguments: object, nodes: int = 2) -> str:
        command = ("sbatch", "--parsable", f"--nodes={nodes}", *SMALL, f"slurm/{script}", *arguments)
        return cluster.run(*command, **site).strip()

    return submit


@pytest.fixture(autouse=True)
def _in_the_root_directory(monkeypatch):
    monkeypatch.chdir(ROOT)


def scores(run: Path) -> dict:
    return read_run(run).results["methods"]


def completed(cluster: SlurmCluster, job: str) -> str:
    """Wait for a job that must succeed; returns its output."""
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    return cluster.output(job)


# --------------------------------------------------------------------------------------------------------------- tests


def test_every_launcher_in_a_job(cluster, tmp_path):
    hello, script = tmp_path / "hello.py", tmp_path / "job.sh"
    hello.write_text(HELLO)
    run = f"'{sys.executable}' '{hello}'"
    torchrun = f"'{BIN}/torchrun' --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node1:29400"
    script.write_text(
        "#!/bin/bash\nset -e\n"
        f"{run} batch\n"  # SLURM_NTASKS is 2 here, but this is one process
        f"srun {run} srun\n"
        f"srun --nodes=1 --ntasks=1 --nodelist=node2 {run} second\n"
        f"srun --mpi=pmi2 {run} pmi2\n"
        f"'{BIN}/mpirun' -n 2 {run} mpirun\n"
        f"srun {torchrun} '{hello}' torchrun\n"
    )
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", *SMALL, f"--output={tmp_path}/out", script,
        PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    ).strip()  # fmt: skip
    output = completed(cluster, job)
    expected = [
        f"hello {launcher} {rank}/2 sum 11" for launcher in ("srun", "pmi2", "mpirun", "torchrun") for rank in range(2)
    ]
    found = re.findall(r"^hello .*$", output, re.MULTILINE)
    assert sorted(found) == sorted([*expected, "hello batch 0/1 sum 1", "hello second 0/1 sum 1"]), output


def test_two_nodes_give_the_same_table_for_a_converted_megatron(cluster, submit, megatron, options, tmp_path):
    options = ["--backbone", str(megatron), *options[2:], *epochs(20)]
    alone = run_cli("probe", *options, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    output = completed(cluster, submit("lama_11b.sh", *options, "--out", tmp_path / "run"))
    assert re.search(r"macro .* 22 ", output), output
    assert scores(tmp_path / "run") == scores(tmp_path / "alone")  # ZeRO-3 on two ranks, and one process
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["environment"]["world_size"] == 2
    assert read_progress(tmp_path / "run")["state"] == "complete"


def test_array_and_report(cluster, site, options, short, tmp_path):
    out = tmp_path / "all"
    printed = cluster.run(
        "bash", "slurm/lama_array.sh", "P36,P30", *options, *epochs(20), "--out", out,
        **site, SBATCH_OPTIONS=" ".join(SMALL),
    )  # fmt: skip
    array, report = re.search(r"array (\d+), then report (\d+)", printed).groups()
    assert cluster.job(report)["JobState"] == "PENDING", printed
    for task in (0, 1):
        completed(cluster, f"{array}_{task}")
    output = completed(cluster, report)
    assert "P36" in output
    assert "P36" in (out / "report.html").read_text()
    merged, joint = scores(out), scores(short)
    for method in joint:
        assert list(merged[method]["relations"]) == ["P30", "P36"]
        for average in ("macro", "micro"):
            assert merged[method][average] == pytest.approx(joint[method][average])
    assert main(["evaluate", "--prompts", str(out)]) == 0  # the prompts are there, too


def test_the_whole_of_table_2(cluster, site, backbone_directory, options, tokenizer, tmp_path):
    make_model("gpt2", len(tokenizer)).save_pretrained(tmp_path / "gpt2-small")
    tokenizer.save_pretrained(tmp_path / "gpt2-small")
    out = tmp_path / "table"
    printed = cluster.run(
        "bash", "slurm/lama_table2.sh", f"{backbone_directory},{tmp_path / 'gpt2-small'}/", *options[2:], *epochs(3),
        "--out", out, **site, SBATCH_OPTIONS=" ".join(SMALL), METHODS="manual,p-tuning",
    )  # fmt: skip
    array, report = re.search(r"array (\d+), then report (\d+)", printed).groups()
    for task in range(2):
        completed(cluster, f"{array}_{task}")
    completed(cluster, report)
    assert {word for pairs in PAIRS.values() for _, word in pairs} <= set((out / "vocabulary.txt").read_text().split())
    rows = list(csv.DictReader((out / "table.csv").open()))
    methods = {"majority", "manual", "p-tuning"}
    assert {(Path(row["backbone"]).name, row["method"]) for row in rows} == {
        (name, method) for name in (backbone_directory.name, "gpt2-small") for method in methods
    }


def test_superglue_interrupted_and_requeued_is_as_undisturbed(cluster, site, tmp_path):
    """Submitted by a job, as with sbatch; the array's first task gets the signal that its time is up."""
    model, data = write_model(tmp_path / "model"), write_superglue(tmp_path / "data", rows=12)
    options = ["--data", str(data), "--learning-rate", "0.01", *epochs(300)]
    alone = [
        "--backbone",
        str(model),
        "--out",
        str(tmp_path / "alone"),
        "--tasks",
        "cb",
        "--methods",
        "manual,p-tuning",
    ]
    assert main(["superglue", *options, *alone]) == 0
    out = tmp_path / "out"
    variables = {**site, "SBATCH_OPTIONS": " ".join(SMALL), "METHODS": "manual,p-tuning", "TASKS": "cb"}
    submitted = cluster.run(
        "sbatch", "--parsable", *SMALL, "slurm/superglue.sh", model, *options, "--out", out, **variables
    )
    array, report = re.search(r"array (\d+), then report (\d+)", completed(cluster, submitted.strip())).groups()
    job, run = f"{array}_0", out / "runs" / f"{str(model).replace('/', '--')}-manual-p-tuning-seed0" / "cb"

    def training() -> bool:
        progress = read_progress(run) if (run / "progress.json").exists() else {"state": None}
        assert progress["state"] != "complete", "it was over before it could be disturbed"
        return progress["state"] == "running" and progress.get("step", 0) >= 10

    wait_for(training, 120, "it does not train", lambda: cluster.output(job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 60, "no requeue", lambda: cluster.output(job))
    assert read_progress(run)["state"] == "interrupted"
    completed(cluster, job)
    completed(cluster, report)
    assert scores(run) == scores(tmp_path / "alone")
    one, other = (load_file(at / "prompts" / "CB.safetensors")["prompts"] for at in (run, tmp_path / "alone"))
    assert one.equal(other)
    assert "P-tuning, model frozen" in (out / "table.md").read_text()


def test_memory_on_clusters_of_several_sizes(cluster, site, backbone_directory, tmp_path):
    out = tmp_path / "memory"
    printed = cluster.run(
        "bash", "slurm/memory_benchmark.sh", "1,2", "--backbones", backbone_directory, "--deepspeed",
        ROOT / "ds_configs" / "zero3.json", "--pass-tokens", 64, "--row-tokens", 64, "--memory-limit", 8, "--out", out,
        **site, SBATCH_OPTIONS=" ".join(SMALL),
    )  # fmt: skip
    one, two, report = re.search(r"submitted: (\d+) (\d+), then (\d+)", printed).groups()
    for job in (one, two, report):
        completed(cluster, job)
    rows = json.loads((out / "memory.json").read_text())
    found = {(row["method"], row["ranks"]): len(row["measured"]) for row in rows}
    assert found == {(method, ranks): ranks for method in ("p-tuning", "fine-tuning") for ranks in (1, 2)}
    frozen = [rank for row in rows if row["method"] == "p-tuning" for rank in row["measured"]]
    assert all(rank["gradients"] == rank["optimizer"] == 0 < rank["encoders"] for rank in frozen)
    assert (out / "memory.png").exists()


def test_misuse_is_told_at_once(cluster, submit, site, tmp_path):
    def login(*arguments: object) -> subprocess.CompletedProcess:
        command = ["bash", "slurm/lama_gpt2_xl.sh", *map(str, arguments)]
        environment = {**cluster.environment, **site}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    helped = login("--help")
    assert helped.returncode == 0
    assert "bash slurm/lama_gpt2_xl.sh [OPTIONS OF megaprompt probe]" in helped.stdout
    wrong = login("--backbone", tmp_path / "nowhere", "--data", "world", "--out", tmp_path / "run")
    assert wrong.returncode == 2
    assert "WRONG backbone" in wrong.stdout
    assert "no rank was started" in wrong.stderr
    assert not (tmp_path / "run").exists()

    jobs = cluster.run("squeue", "--noheader")
    assert not jobs, jobs
    job = submit("lama_gpt2_xl.sh", "--max-epoch", 3)
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "--max-epoch" in cluster.output(job)
    assert "no rank was started" in cluster.output(job)


def test_a_run_survives_the_night(cluster, submit, options, undisturbed, tmp_path):
    """The time limit, a node that fails, a rank that is killed: what comes out is the same to the last bit."""
    run = tmp_path / "run"
    arguments = ("lama_gpt2_xl.sh", *options, *epochs(EPOCHS), "--out", run)
    job = submit(*arguments)

    def train_until(step: int, job: str) -> None:
        def there() -> bool:
            assert cluster.job(job)["JobState"] != "FAILED", cluster.output(job)
            progress = read_progress(run) if (run / "progress.json").exists() else {"state": None}
            assert progress["state"] != "complete", "it was over before it could be disturbed"
            # Slurm may not have started it again; the file is then that of the last start.
            fresh = time.time() - progress.get("updated", 0) < 2
            return progress["state"] == "running" and progress["step"] >= step and fresh and is_running()

        def is_running() -> bool:
            if cluster.job(job)["JobState"] == "PENDING":  # rather than two minutes after a requeue
                cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return cluster.job(job)["JobState"] == "RUNNING"

        wait_for(there, 120, f"step {step} is not reached", lambda: cluster.output(job))

    # The time is nearly up.
    train_until(10, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 60, "no requeue", lambda: cluster.output(job))
    assert "goes back into the queue" in cluster.output(job)
    saved = read_progress(run)
    assert saved["state"] == "interrupted"
    assert saved["step"] >= 10

    # A node fails. Slurm puts the job back into the queue by itself.
    train_until(saved["step"] + 1, job)
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    wait_for(lambda: cluster.job(job)["Restarts"] == "2", 60, "no requeue", lambda: cluster.output(job))
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)  # it may be back already

    # A rank is killed, as by the kernel when memory is short.
    train_until(saved["step"] + 1, job)
    rank = [pid for pid in cluster.processes("node2", "megaprompt probe") if "srun" not in command(pid)]
    assert len(rank) == 1, [command(pid) for pid in rank]
    os.kill(rank[0], signal.SIGKILL)
    killed = time.monotonic()
    assert cluster.wait(job, timeout=60)["JobState"] == "FAILED", cluster.output(job)
    assert time.monotonic() - killed < 40
    assert "node2: task 1: Killed" in cluster.output(job)
    assert "the same sbatch command continues it" in cluster.output(job)

    # The user does what it says.
    job = submit(*arguments)
    completed(cluster, job)
    for name in ("P30", "P36"):
        vectors, expected = (load_file(at / "prompts" / f"{name}.safetensors")["prompts"] for at in (run, undisturbed))
        assert vectors.equal(expected)
    assert scores(run) == scores(undisturbed)
    logs = [[json.loads(line) for line in (at / "log.jsonl").read_text().splitlines()] for at in (run, undisturbed)]
    same = [[{key: line[key] for key in ("relation", "epoch", "step", "train_loss")} for line in log] for log in logs]
    assert same[0] == same[1]
    assert read_progress(run)["relations"] == read_progress(undisturbed)["relations"]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
