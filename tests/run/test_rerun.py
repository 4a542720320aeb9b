"""What results tell of their origin; a run that is repeated, and what is said where something differs."""

import hashlib
import json
import shutil
import sys

import pytest

from megaprompt.cli import main
from megaprompt.config import ProbeConfig, RerunConfig, from_yaml
from megaprompt.run.job import probe
from megaprompt.run.rerun import compare, repeated
from tests.conftest import write_data
from tests.report.made_up import change
from tests.schemas import check_run, validator


@pytest.fixture(scope="module")
def made(backbone_directory, tmp_path_factory):
    """A run and its data, which are copied for each test."""
    place = tmp_path_factory.mktemp("made")
    options = {"max_steps": 6, "learning_rate": 0.03, "limit_facts": 7, "data_seed": 4, "seed": 3}
    data = write_data(place / "data")
    probe(ProbeConfig(backbone=str(backbone_directory), data=str(data), out=place / "run", **options))
    return place


@pytest.fixture
def run(made, tmp_path):
    for name in ("data", "run"):
        shutil.copytree(made / name, tmp_path / name)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(tmp_path)))
    return tmp_path / "run"


@pytest.fixture
def data_directory(run):
    return run.with_name("data")


def test_the_origin_of_results(run, data_directory):
    results = check_run(run)
    assert results["seeds"] == {"seed": 3, "data_seed": 4}
    [command] = results["commands"]
    assert command.startswith(sys.orig_argv[0])
    files = {path.relative_to(data_directory).as_posix(): path for path in data_directory.rglob("*.jsonl")}
    assert results["data"]["files"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }


def test_options_name_files_too(run, data_directory, tmp_path):
    words, prompts = tmp_path / "words.txt", tmp_path / "prompts.jsonl"
    words.write_text("Paris\nRome\nEurope\nAsia\n")
    prompts.write_text('{"relation": "P36", "template": "[X] : [Y]"}\n')
    options = from_yaml(ProbeConfig, run / "config.yaml").__dict__
    more = {"vocab": str(words), "discrete": (f"mine={prompts}",), "methods": ("manual",), "out": tmp_path / "more"}
    files = probe(ProbeConfig(**{**options, **more}))["data"]["files"]
    assert set(files) > {str(words), str(prompts)}


def test_the_same_comes_out(run, tmp_path, capsys):
    again = tmp_path / "again"
    assert main(["rerun", str(run), "--out", str(again)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"the same results as {run}\n")
    assert "was" not in printed
    found = compare(run, again)
    assert found.origins == []
    assert {method: row[2:] for method, row in found.rows.items()} == {
        "majority": (0, 0), "manual": (14, 0), "p-tuning": (14, 0)
    }  # fmt: skip
    assert main(["rerun", str(run), "--out", str(again)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main(["rerun", str(run), "--out", str(again), "--resume"]) == 0


def test_what_differs_is_told(run, data_directory, tmp_path, capsys):
    path = data_directory / "trex" / "test" / "P36.jsonl"
    path.write_text(path.read_text().replace("Paris", "Rome"))
    change(run, lambda results: results["environment"].update(transformers="5.0.0"))
    change(run, lambda results: results["backbone"].update(fingerprint="another"))
    change(run, lambda results: results["methods"]["manual"]["macro"].update(p_at_1=0.9876))
    assert main(["rerun", str(run), "--out", str(tmp_path / "again")]) == 1
    printed = capsys.readouterr()
    assert "its results are not those of" in printed.err
    for line in ("data trex/test/P36.jsonl: ", "asked of P36: ", "environment transformers: ", "was 5.0.0"):
        assert line in printed.out
    assert "backbone fingerprint: " in printed.out
    assert "98.8" in printed.out
    assert compare(run, tmp_path / "again").rows["manual"][3] == 1, "the object of a fact"


def test_what_a_run_has_settled_is_kept(run, tmp_path):
    change(run, lambda results: results.update(pass_tokens=64, candidates=2))
    config = repeated(RerunConfig(run, out=tmp_path / "again"))
    assert config.out == tmp_path / "again"
    assert (config.pass_tokens, config.candidates) == (64, 2)


def test_what_cannot_be_repeated(run, tmp_path, capsys):
    again = ["--out", str(tmp_path / "again")]
    assert main(["rerun", str(tmp_path), *again]) == 2
    assert "holds no results.json" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "less")
    (tmp_path / "less" / "config.yaml").unlink()
    assert main(["rerun", str(tmp_path / "less"), *again]) == 1
    assert "has no config.yaml" in capsys.readouterr().err
    change(run, lambda results: results.update(complete=False))
    assert main(["rerun", str(run), *again]) == 1
    assert "is not complete; continue it with --resume" in capsys.readouterr().err


def test_a_run_goes_on_only_with_the_files_that_it_was_started_with(run, data_directory, capsys):
    change(run, lambda results: (results["methods"].pop("p-tuning"), results.update(complete=False)))
    path = data_directory / "relations.jsonl"
    before = path.read_text()
    path.write_text(before.replace("is in", "lies in"))
    assert main(["probe", "--resume", "--out", str(run)]) == 1
    assert "relations.jsonl is not what it was when" in capsys.readouterr().err
    path.write_text(before)
    assert main(["probe", "--resume", "--out", str(run)]) == 0
    assert len(check_run(run)["commands"]) == 2


def test_the_schemas_see_mistakes(run):
    results = json.loads((run / "results.json").read_text())
    line = json.loads((run / "predictions" / "P36.jsonl").read_text().split("\n")[0])
    schemas = [(validator("run/results.schema.json"), results), (validator("tasks/lama/one_token.schema.json"), line)]
    for schema, right in schemas:
        assert schema.is_valid(right)
        assert not schema.is_valid(right | {"schema": 3})
        assert not schema.is_valid(right | {"more": 1})
    assert not schemas[1][0].is_valid(line | {"rank": 0})
    results["methods"]["manual"]["relations"]["P36"]["p_at_1"] = 50
    assert not schemas[0][0].is_valid(results)
