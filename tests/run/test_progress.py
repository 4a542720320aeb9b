"""progress.json and `megaprompt status`, and runs over parts of the relations that are put together."""

import dataclasses
import json
import logging
import time

import pytest

from megaprompt.cli import main
from megaprompt.config import ProbeConfig, from_yaml
from megaprompt.errors import MegapromptError
from megaprompt.report.runs import read_run
from megaprompt.run.merge import merge_runs
from megaprompt.run.progress import ProgressFile, read_progress
from megaprompt.run.saved_prompts import load_prompts

LINE = {"relation": "P36", "epoch": 1, "dev_p_at_1": 0.5}


def test_file_follows_the_run(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = ProgressFile(tmp_path)
    with file.ending():
        file.phase("p-tuning")
        assert read_progress(tmp_path)["state"] == "running"
        assert read_progress(tmp_path)["eta_seconds"] is None
        file.facts(100, 1000, 10)  # resumed there
        assert read_progress(tmp_path)["step"] == 10
        now[0] += 1
        file.facts(200, 1000, 20)
        assert read_progress(tmp_path)["step"] == 10, "written too often"
        file.epochs([LINE, {**LINE, "epoch": 2, "dev_p_at_1": 0.25}])
        now[0] += 4
        file.facts(300, 1000, 30)
        found = read_progress(tmp_path)
        assert found["step"] == 30
        assert (found["facts_done"], found["facts_total"]) == (300, 1000)
        assert found["relations"] == {"P36": {"epoch": 2, "best_dev_p_at_1": 0.5}}
        assert found["seconds"] == 5
        assert found["eta_seconds"] == 17.5  # 700 facts at 40 a second
        assert abs(found["updated"] - time.time()) < 60
    assert read_progress(tmp_path)["state"] == "complete"


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (MegapromptError("full"), "failed")]
)
def test_file_says_how_the_run_ended(tmp_path, error, state):
    file = ProgressFile(tmp_path)
    file.phase("manual")
    with pytest.raises(type(error)), file.ending():
        raise error
    assert read_progress(tmp_path)["state"] == state


def test_no_file_of_a_run_that_never_began_or_of_other_ranks(tmp_path):
    with pytest.raises(MegapromptError), ProgressFile(tmp_path).ending():
        raise MegapromptError("the directory is another run's")
    with ProgressFile(tmp_path, enabled=False).ending():
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise MegapromptError("no space left")

    monkeypatch.setattr("megaprompt.run.progress.write_file", full)
    with caplog.at_level(logging.WARNING), ProgressFile(tmp_path).ending() as _:
        ProgressFile(tmp_path).phase("manual")
    assert "no space left" in caplog.text


@pytest.fixture
def probe(backbone_directory, data_directory, tmp_path):
    def run(out: str, *args: object) -> None:
        where = ("--backbone", backbone_directory, "--data", data_directory, "--out", tmp_path / out)
        assert main(["probe", *map(str, (*where, "--learning-rate", 0.03, "--max-epochs", 3, *args))]) == 0

    return run


def test_status_of_a_run(probe, tmp_path, capsys):
    probe("run")
    found = read_progress(tmp_path / "run")
    assert found["state"] == "complete"
    assert found["facts_done"] == found["facts_total"] == 3 * (16 + 16)
    assert {about["epoch"] for about in found["relations"].values()} == {3}
    capsys.readouterr()
    assert main(["status", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("complete")
    assert "96 of at most 96 facts (100 %)" in printed
    assert "P36      epoch    3" in printed
    assert main(["status", str(tmp_path / "nowhere")]) == 2


def test_parts_make_the_whole(probe, tmp_path, capsys):
    probe("joint")
    for name in ("P30", "P36"):
        probe(f"all/{name}", "--relations", name)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "all")]) == 0
    assert "macro" in capsys.readouterr().out
    merged, joint = (read_run(tmp_path / run).results for run in ("all", "joint"))
    assert merged["complete"]
    assert merged["data"] == joint["data"]
    assert merged["methods"] == joint["methods"]
    assert (tmp_path / "all" / "report.html").stat().st_size > 10_000
    configs = {run: from_yaml(ProbeConfig, tmp_path / run / "config.yaml") for run in ("all", "joint")}
    assert configs["all"] == dataclasses.replace(configs["joint"], out=tmp_path / "all", relations=("P30", "P36"))
    for name, prompt in load_prompts(tmp_path / "all").items():
        assert prompt.vectors.allclose(load_prompts(tmp_path / "joint")[name].vectors, rtol=1e-4, atol=1e-5)
    assert len((tmp_path / "all" / "log.jsonl").read_text().splitlines()) == 2

    # A part that is not complete is left out; parts that do not belong together are refused.
    path = tmp_path / "all" / "P36" / "results.json"
    whole = path.read_text()
    path.write_text(whole.replace('"complete": true', '"complete": false'))
    parts = [tmp_path / "all" / name for name in ("P30", "P36")]
    assert list(merge_runs(parts, tmp_path / "less")["data"]["relations"]) == ["P30"]
    assert not json.loads((tmp_path / "less" / "results.json").read_text())["complete"]
    path.write_text(whole.replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(MegapromptError, match="its backbone is not that of"):
        merge_runs(parts, tmp_path / "no")
    with pytest.raises(MegapromptError, match="2 of its runs have the relation P30"):
        merge_runs([parts[0], tmp_path / "joint"], tmp_path / "no")
