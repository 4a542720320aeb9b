"""Checkpoints that are written while training goes on: what is in them, and what is left when writing fails."""

import gc
import time

import pytest
import torch

from megaprompt.config import ProbeConfig
from megaprompt.distributed.world import World
from megaprompt.engine import trainer as trainer_module
from megaprompt.engine.trainer import Interrupted
from megaprompt.errors import MegapromptError
from megaprompt.run import training
from megaprompt.run.checkpoint_writer import CheckpointWriter
from megaprompt.run.checkpoints import load_checkpoint
from megaprompt.run.job import probe


@pytest.fixture
def state():
    """As a learner has it: tensors that steps change in place, and what else there is."""
    module = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    module(torch.ones(300)).sum().backward()
    optimizer.step()
    return {"encoder": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "best": {"kept": None}}


def change(state) -> None:
    with torch.no_grad():
        state["encoder"]["weight"].add_(1)
        state["optimizer"]["state"][0]["exp_avg"].add_(1)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["copied", "written at once"])
def test_a_checkpoint_has_what_was_there_when_it_was_begun(state, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(World, "free_host_memory", lambda _: memory)
    about = {"training": {"step": 3, "stopped_after": {}}}
    weight = state["encoder"]["weight"].clone()
    average = state["optimizer"]["state"][0]["exp_avg"].clone()
    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(3, {"P36": state, "P30": state}, about)
        change(state)
        about["training"]["stopped_after"]["P36"] = 4
        writer.finish()
    found = load_checkpoint(tmp_path, World())
    assert found.about == {"training": {"step": 3, "stopped_after": {}}}
    for task in ("P36", "P30"):
        read = found.read(task)
        assert read["encoder"]["weight"].equal(weight)
        assert read["optimizer"]["state"][0]["exp_avg"].equal(average)
        assert (read["step"], read["best"]) == (3, {"kept": None})


def test_no_more_than_a_quarter_of_the_free_memory_is_taken(tmp_path, monkeypatch):
    """States of 4 MB, for two of which there is room."""
    monkeypatch.setattr(World, "free_host_memory", lambda _: 4 * 9_000_000)
    tensor = torch.zeros(1_000_000)
    seen: list[int] = []
    copy = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **more: seen.append(live()) or copy(*args, **more))

    def live() -> int:
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == 1_000_000]
        return 4_000_000 * len({t.data_ptr() for t in found})

    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(1, {f"P{i}": {"encoder": {"weight": tensor}} for i in range(6)}, {})
        writer.finish()
    assert len(seen) == 6
    assert max(seen) <= 2 * 4_000_000  # the tensor itself, and a copy while the next one is made
    assert load_checkpoint(tmp_path, World()) is not None


def test_the_last_one_is_written_without_a_copy(state, tmp_path, monkeypatch):
    monkeypatch.setattr("megaprompt.run.checkpoint_writer._copied", pytest.fail)
    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(1, {"P36": state}, {}, complete=True)
        assert not writer.is_begun
    assert load_checkpoint(tmp_path, World()).step == 1


def test_what_is_not_complete_is_not_loaded_and_costs_nothing_older(state, tmp_path):
    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(1, {"P36": state}, {}, complete=True)
    with CheckpointWriter(tmp_path, World()) as writer:  # as an error, or the second Ctrl-C, ends a run
        writer.save(2, {"P36": state}, {})
    assert load_checkpoint(tmp_path, World()).step == 1
    assert (tmp_path / ".step-00000002.partial").exists()
    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(2, {"P36": state}, {}, complete=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_write_that_fails_is_told_and_leaves_the_older_one(state, tmp_path):
    with CheckpointWriter(tmp_path, World()) as writer:
        writer.save(1, {"P36": state}, {}, complete=True)
        writer.save(2, {"P36": state, "no/such/directory": state}, {})
        with pytest.raises(MegapromptError, match=r"cannot write a checkpoint .*No such file.*the older ones are kept"):
            writer.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        writer.save(3, {"P36": state}, {})
        writer.save(4, {"P36": state}, {})  # completes the one before
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_one_is_passed_over(state, tmp_path, caplog):
    with CheckpointWriter(tmp_path, World()) as writer:
        for step in (1, 2):
            writer.save(step, {"P36": state}, {"step": step}, complete=True)
    file = tmp_path / "step-00000002" / "P36.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert load_checkpoint(tmp_path, World()).about == {"step": 1}
    assert "P36.pt is damaged (wrong checksum); trying an older checkpoint" in caplog.text
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(MegapromptError, match=r"no checkpoint in .* can be used"):
        load_checkpoint(tmp_path, World())


@pytest.fixture
def options(backbone_directory, data_directory):
    where = {"backbone": str(backbone_directory), "data": str(data_directory)}
    return lambda out, **more: ProbeConfig(**where, methods=("p-tuning",), max_steps=8, out=out, **more)


def stop_at(monkeypatch, step: int, **hooks) -> None:
    train = trainer_module.Trainer.train

    def stopped(self, given):
        given.should_stop = lambda: self.step == step
        for name, hook in hooks.items():
            setattr(given, name, lambda hook=hook: hook(self))
        return train(self, given)

    monkeypatch.setattr(trainer_module.Trainer, "train", stopped)


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_written_meanwhile(options, tmp_path, monkeypatch):
    """There is no time for the last checkpoint; the one before was written while steps were taken."""
    whole = probe(options(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_at(patched, 6, should_save=lambda trainer: trainer.step == 3)
        patched.setattr(training, "_ENDING_SECONDS", 1e9)
        patched.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 100)))
        with pytest.raises(Interrupted):
            probe(options(tmp_path / "broken"))
    assert load_checkpoint(tmp_path / "broken" / "state", World()).about["training"]["step"] == 3
    assert probe(options(tmp_path / "broken", resume=True))["methods"] == whole["methods"]


def test_the_last_checkpoint_is_left_out_where_it_would_come_too_late(options, tmp_path, monkeypatch, caplog):
    stop_at(monkeypatch, 6, should_save=lambda trainer: trainer.step == 3)
    monkeypatch.setattr(CheckpointWriter, "seconds_for", lambda *_: 90.0)
    for left, step in ((200, 6), (95, 3)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left)))
        with pytest.raises(Interrupted):
            probe(options(tmp_path / str(left)))
        assert load_checkpoint(tmp_path / str(left) / "state", World()).step == step
    assert "a checkpoint would take 90 s" in caplog.text
