"""What a run that is interrupted, goes on, or meets other data must not forget."""

import json
import os
import signal
from dataclasses import replace

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.distributed.world import World
from megaprompt.engine.trainer import Interrupted
from megaprompt.errors import MegapromptError
from megaprompt.methods import in_context
from megaprompt.report.html import write_joint_report  # noqa: F401 (imported before signals are tried)
from megaprompt.run import results_file
from megaprompt.run.checkpoints import load_checkpoint, publish
from megaprompt.run.context import RunContext
from megaprompt.run.directory import RunDirectory
from megaprompt.run.interruption import stop_signals
from megaprompt.run.job import probe
from megaprompt.run.progress import ProgressFile, describe_progress, read_progress
from tests.conftest import write_facts


@pytest.fixture
def options(backbone_directory, data_directory, tmp_path):
    def options(**more) -> ProbeConfig:
        given = {"methods": ("manual",), "relations": ("P36",), "out": tmp_path / "run", **more}
        return ProbeConfig(backbone=str(backbone_directory), data=str(data_directory), **given)

    return options


def test_checkpoints_of_late_waves_are_the_newest(tmp_path):
    for number in (90_000_075, 90_000_100, 100_000_025, 100_000_050):
        scratch = tmp_path / f".step-{number:08}.partial"
        scratch.mkdir()
        assert publish(scratch, tmp_path / f"step-{number:08}", number, {}, {"number": number}) is None
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000025", "step-100000050"}
    assert load_checkpoint(tmp_path, World()).about == {"number": 100_000_050}


def test_a_signal_during_the_last_relation_of_a_method_stops_the_run(options, monkeypatch):
    scored = in_context.Scored

    def interrupted(*args):  # behind its last pass
        os.kill(os.getpid(), signal.SIGUSR1)
        return scored(*args)

    monkeypatch.setattr(in_context, "Scored", interrupted)
    with pytest.raises(Interrupted, match="before p-tuning"):
        probe(options(methods=("in-context", "p-tuning"), max_steps=2))
    monkeypatch.undo()
    results = probe(options(methods=("in-context", "p-tuning"), max_steps=2, resume=True))
    assert list(results["methods"]) == ["majority", "in-context", "p-tuning"]


@pytest.mark.parametrize("method", ["manual", "in-context", "p-tuning"])
def test_a_signal_while_a_relation_is_asked_stops_behind_the_pass(options, monkeypatch, method):
    """Which may be one of very many; and each is told."""
    asked = {"methods": (method,), "max_steps": 2, "relations": ("P30", "P36"), "row_tokens": 16, "pass_tokens": 16}
    whole = probe(options(**asked))
    told = []
    passes = ProgressFile.passes

    def second_pass(self, done, total):
        passes(self, done, total)
        told.append((done, total))
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressFile, "passes", second_pass)
    broken = options(out=options().out.parent / "broken", **asked)
    with pytest.raises(Interrupted, match="interrupted in P30; continue with --resume"):
        probe(broken)
    assert [done for done, _ in told] == [1, 2]
    assert told[0][1] == told[1][1] > 2
    found = read_progress(broken.out)
    assert (found["state"], found["passes"]) == ("interrupted", list(told[1]))
    assert f"pass 2 of {told[0][1]} of what is asked" in describe_progress({**found, "state": "running"})
    monkeypatch.undo()
    resumed = probe(replace(broken, resume=True))
    assert resumed["methods"] == whole["methods"]
    assert read_progress(broken.out)["state"] == "complete"


def test_blocks_within_others_know_that_they_are_to_stop():
    with stop_signals() as outer:
        with stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert inner()
        assert outer()
        with stop_signals() as next_:
            assert next_()
    with stop_signals() as another:
        assert not another()


def interrupted_after(monkeypatch, method: str) -> None:
    """Let runs end behind a method."""
    each_task = RunContext.each_task

    def ending(self, columns, score, **more):
        found = each_task(self, columns, score, **more)
        if method in columns:
            raise Interrupted("interrupted")
        return found

    monkeypatch.setattr(RunContext, "each_task", ending)


def test_data_that_grew_is_refused(options, data_directory, monkeypatch):
    interrupted_after(monkeypatch, "manual")
    with pytest.raises(Interrupted):
        probe(options(methods=("manual", "in-context"), relations=()))
    monkeypatch.undo()
    for split in ("train", "dev", "test"):
        write_facts(data_directory / "trex" / split / "P19.jsonl", [("Rome", "Italy")])
    with pytest.raises(MegapromptError, match="P19: not what was asked"):
        probe(options(methods=("manual", "in-context"), relations=(), resume=True))


def test_seconds_and_environments_of_all_starts_are_told(options, monkeypatch):
    interrupted_after(monkeypatch, "manual")
    with pytest.raises(Interrupted):
        probe(options(methods=("manual", "in-context")))
    monkeypatch.undo()
    path = options().out / "results.json"
    before = json.loads(path.read_text())
    before["environment"]["torch"] = "2.0"
    before["peak_memory_bytes"] = [1 << 50]
    path.write_text(json.dumps(before))
    results = probe(options(methods=("manual", "in-context"), resume=True))
    assert results["timing"]["manual"] == before["timing"]["manual"]
    assert [each["torch"] for each in results["earlier_environments"]] == ["2.0"]
    assert results["environment"]["torch"] != "2.0"
    assert results["peak_memory_bytes"] == [1 << 50]


def test_a_report_that_was_interrupted_is_written_by_the_next_start(options, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    write = results_file.write_report
    monkeypatch.setattr(results_file, "write_report", lambda path: None)
    probe(options())
    progress = options().out / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"state": "interrupted"}))
    assert not (options().out / "report.html").exists()
    monkeypatch.setattr(results_file, "write_report", write)
    probe(options(resume=True))
    assert (options().out / "report.html").exists()
    assert read_progress(options().out)["state"] == "complete"


def test_a_torn_line_of_the_log_is_cut_off(options):
    config = options(methods=("p-tuning",), max_steps=2)
    probe(config)
    run = RunDirectory(config.out)
    whole = run.read_log()
    with (config.out / "log.jsonl").open("a") as file:
        file.write('{"time": 1, "rela')
    run.mend_log()
    assert run.read_log() == whole


def test_a_text_that_is_too_long_is_told_before_anything_is_learned(options, data_directory, caplog):
    path = data_directory / "trex" / "train" / "P36.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"sub_label": "France " * 2000, "obj_label": "Paris"}) + "\n")
    with pytest.raises(MegapromptError, match=r"P36, train: France France .* tokens long"):
        probe(options(methods=("p-tuning",), max_steps=2))
    assert not (options().out / "config.yaml").exists()
    probe(options())  # which asks test alone


def test_a_wrong_manual_prompt_is_named(options, data_directory):
    (data_directory / "relations.jsonl").write_text('{"relation": "P36", "template": "[Y] is the capital of [X]"}\n')
    with pytest.raises(MegapromptError, match=r"manual prompt of P36: .* causal backbone"):
        probe(options())


def test_data_with_test_facts_only(options, data_directory):
    for split in ("train", "dev"):
        for path in (data_directory / "trex" / split).iterdir():
            path.unlink()
    with pytest.raises(MegapromptError, match="has no facts in train/dev; give --methods manual"):
        probe(options(methods=("p-tuning",)))
