"""Relations whose encoders do not fit into memory together are learned in waves, with the same results."""

import json

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.engine import trainer as trainer_module
from megaprompt.engine.schedule import groups_for, waves_for
from megaprompt.engine.trainer import Interrupted
from megaprompt.methods.p_tuning import PTuning
from megaprompt.run.job import probe


@pytest.fixture
def options(backbone_directory, data_directory):
    options = {"backbone": str(backbone_directory), "data": str(data_directory), "max_steps": 8, "learning_rate": 0.01}
    return lambda out, **more: ProbeConfig(**{**options, "out": out, "methods": ("manual", "p-tuning"), **more})


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(PTuning, "_at_once", lambda *_: 1)


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return sorted(
        ({name: value for name, value in line.items() if name != "time"} for line in lines),
        key=lambda line: (line["relation"], line.get("step", 0)),
    )


def test_waves_change_nothing(options, tmp_path, request):
    together = probe(options(tmp_path / "together"))
    request.getfixturevalue("little_memory")
    waves = probe(options(tmp_path / "waves"))
    assert (together["waves"], waves["waves"]) == (1, 2)
    assert waves["methods"] == together["methods"]
    logs = [log_of(tmp_path / run) for run in ("waves", "together")]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, other in zip(*logs, strict=True):  # packed with others, so rounded otherwise
        assert one | {"train_loss": 0} == other | {"train_loss": 0}
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert waves["timing"]["training_seconds"] == pytest.approx(sum(waves["timing"]["seconds_of_waves"].values()))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("wave", "step"), [pytest.param(1, 6, marks=pytest.mark.slow), (2, 3)])
def test_an_interrupted_wave_goes_on_exactly(options, tmp_path, monkeypatch, wave, step):
    whole = probe(options(tmp_path / "whole"))
    train, seen = trainer_module.Trainer.train, []

    def interrupted(self, hooks):
        seen.append(self)
        hooks.should_stop = lambda: len(seen) == wave and self.step == step
        return train(self, hooks)

    monkeypatch.setattr(trainer_module.Trainer, "train", interrupted)
    with pytest.raises(Interrupted):
        probe(options(tmp_path / "broken"))
    monkeypatch.setattr(trainer_module.Trainer, "train", train)
    resumed = probe(options(tmp_path / "broken", resume=True))
    assert resumed["methods"] == whole["methods"]
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


@pytest.mark.usefixtures("little_memory")
def test_best_in_waves(options, tmp_path):
    results = probe(options(tmp_path / "run", methods=("best",)))
    assert (results["waves"], results["candidates"]) == (2, 1)
    assert set(results["methods"]["best"]["relations"]) == {"P36", "P30"}


def test_groups_and_waves():
    assert groups_for(41, 16) == 16  # 3 relations at most, 2.6 on average
    assert groups_for(41, 1) == 1
    assert groups_for(1, 8) == 1
    assert groups_for(3, 2) == 1  # one rank would wait for the other half of the time
    assert groups_for(4, 6) == 2
    assert [waves_for(41, at_once) for at_once in (41, 40, 21, 1, 0)] == [1, 2, 2, 41, 41]
