"""The whole job from the command line, on a small random model: results, errors, interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import megaprompt
from megaprompt.config import ProbeConfig, from_yaml
from megaprompt.distributed.world import World
from megaprompt.errors import UsageError
from megaprompt.run.checkpoints import FORMAT, load_checkpoint
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts
from tests.conftest import make_model, write_facts
from tests.schemas import check_run

QUICK = ("--learning-rate", "0.03", "--max-epochs", "3")


@pytest.fixture
def probe(backbone_directory, data_directory, tmp_path):
    """Run `megaprompt probe` on the small model and data, in this process; returns the exit code."""
    from megaprompt.cli import main

    def run(*args: object, out="run") -> int:
        where = ("--backbone", backbone_directory, "--data", data_directory, "--out", tmp_path / out)
        return main(["probe", *map(str, (*where, *QUICK, *args))])

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_has_all_its_files(probe, tmp_path, capsys):
    assert probe() == 0
    run = tmp_path / "run"
    results = check_run(run)
    assert results["complete"]
    assert set(results["methods"]) == {"majority", "manual", "p-tuning"}
    for method in results["methods"].values():
        assert set(method["relations"]) == {"P36", "P30"}
        rows = method["relations"].values()
        assert method["macro"]["p_at_1"] == pytest.approx(sum(row["p_at_1"] for row in rows) / 2)
    assert results["methods"]["majority"]["relations"]["P30"]["p_at_1"] == pytest.approx(5 / 9)
    assert results["methods"]["p-tuning"]["relations"]["P36"]["epochs"] == 3
    assert results["peak_memory_bytes"][0] > 1 << 20
    assert from_yaml(ProbeConfig, run / "config.yaml").max_epochs == 3

    predictions = read_lines(run / "predictions" / "P36.jsonl")
    assert [p["method"] for p in predictions] == ["manual"] * 13 + ["p-tuning"] * 13
    learned = [p for p in predictions if p["method"] == "p-tuning"]
    score = results["methods"]["p-tuning"]["relations"]["P36"]["p_at_1"]
    assert sum(p["rank"] == 1 for p in learned) / 13 == pytest.approx(score)
    assert all((p["top"][0][0] == p["object"]) == (p["rank"] == 1) for p in learned)

    log = read_lines(run / "log.jsonl")
    assert [line["step"] for line in log] == [6, 6]  # few steps: dev is scored at their end
    assert list((run / "tensorboard").iterdir())
    assert "P36" in (run / "report.html").read_text()
    assert "macro" in capsys.readouterr().out


def test_saved_prompts_score_the_same_and_answer(probe, tmp_path, capsys):
    from megaprompt.cli import main

    assert probe() == 0
    out = tmp_path / "scores.json"
    assert main(["evaluate", "--prompts", str(tmp_path / "run"), "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name, row in scores["relations"].items():
        for metric in ("p_at_1", "p_at_10", "mrr"):
            assert row[metric] == results["methods"]["p-tuning"]["relations"][name][metric]
    capsys.readouterr()
    assert main(["ask", "--prompts", str(tmp_path / "run"), "--relation", "P36", "Japan", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    predictions = read_lines(tmp_path / "run" / "predictions" / "P36.jsonl")
    expected = next(p for p in predictions if p["method"] == "p-tuning" and p["subject"] == "Japan")["top"]
    assert [line.split("%")[1].strip() for line in lines] == [token for token, _ in expected[:3]]


def test_options_bound_the_run(probe, tmp_path):
    assert probe("--relations", "P36", "--limit-facts", "4", "--methods", "p-tuning", "--max-epochs", "1") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    about = results["data"]["relations"]
    assert list(about) == ["P36"]
    assert about["P36"]["facts"] == {"train": 4, "dev": 4, "test": 4}
    assert about["P36"]["left_out"]["over the limit"] == 27
    assert "manual" not in results["methods"]


def test_objects_that_are_not_one_token_are_counted(probe, data_directory, tmp_path):
    path = data_directory / "trex" / "test" / "P36.jsonl"
    write_facts(path, [("Peru", "Lima"), ("Bolivia", "La Paz"), ("Nepal", "Kathmandu")])
    assert probe() == 0
    about = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["relations"]["P36"]
    assert about["facts"]["test"] == 1
    assert about["left_out"]["object is not one token"] == 2


def test_vocabulary_restricts_facts_and_answers(probe, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Paris\nRome\nEurope\nAsia\nNotAWord\n")
    assert probe("--vocab", words) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["vocabulary"] == {"name": "words.txt", "tokens": 4}
    assert results["data"]["relations"]["P36"]["facts"]["test"] == 2
    assert results["data"]["relations"]["P30"]["left_out"]["object is not in the vocabulary"] == 6
    predictions = read_lines(tmp_path / "run" / "predictions" / "P30.jsonl")
    assert {token for p in predictions for token, _ in p["top"]} == {"Paris", "Rome", "Europe", "Asia"}


BAD_OPTIONS = {
    "unknown backbone": (["--backbone", "no/such-model"], 2, "--backbone no/such-model: cannot be loaded"),
    "missing GGUF": (["--backbone", "x.gguf"], 2, "no such file"),
    "missing data": (["--data", "nowhere"], 2, "--data nowhere: there is no such directory"),
    "unknown relation": (["--relations", "P9999"], 2, "--relations P9999"),
    "template without [Y]": (["--template", "<3>[X]<3>"], 2, "exactly one [X]"),
    "template without [X]": (["--template", "<3>[Y]"], 2, "exactly one [X]"),
    "subject after object": (["--template", "[Y]<3>[X]"], 2, "[X] after [Y]"),
    "no pseudo tokens": (["--template", "[X] is [Y]"], 1, "no pseudo tokens"),
    "unknown method": (["--methods", "magic"], 2, "--methods magic: unknown"),
    "unknown option": (["--no-such-option", "1"], 2, "--no-such-option"),
    "wrong type": (["--max-epochs", "many"], 2, "--max-epochs: many is not a whole number"),
    "half an epoch": (["--max-epochs", "1.5"], 2, "--max-epochs: 1.5 is not a whole number"),
    "wrong choice": (["--encoder", "gru"], 2, 'Invalid value "gru" for --encoder. Choose from: "lstm", "mlp", "none".'),
    "no value": (["--relations"], 2, "--relations requires an argument"),
    "too many arguments": (["P36"], 2, "P36: not expected; `megaprompt probe --help` tells what may be given"),
    "negative": (["--learning-rate", "-1"], 2, "--learning-rate -1.0: give a number above 0"),
    "negative decay": (["--weight-decay", "-1"], 2, "--weight-decay -1.0: give 0 or more"),
    "a word for a number": (["--learning-rate", "fast"], 2, "--learning-rate: fast is not a number"),
    "no finite number": (["--fine-tuning-rate", "nan"], 2, "--fine-tuning-rate: nan is not a number"),
    "zero": (["--limit-facts", "0"], 2, "--limit-facts 0"),
    "missing vocabulary": (["--vocab", "nowhere.txt"], 2, "--vocab nowhere.txt: cannot be read"),
    "not a number": (["--learning-rate", "1e30"], 1, "lower the learning rate"),
    "missing DeepSpeed configuration": (["--deepspeed", "nowhere.json"], 2, "--deepspeed nowhere.json: cannot be read"),
    "nothing to resume": (["--resume"], 2, "holds no run"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_give_one_line(probe, capsys, case):
    args, code, message = BAD_OPTIONS[case]
    assert probe(*args) == code
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert last.startswith("megaprompt: ")
    assert message in last
    assert "Traceback" not in error


OTHER_COMMANDS = {
    "report": "RUNS is missing: give the directory of a run, or of several",
    "status": "RUN is missing: give the directory of the run",
    "status a b": "b: not expected; `megaprompt status --help` tells",
    "ask": "SUBJECT is missing: give what to ask about",
    "ask Denmark": "--prompts is missing: give a run, or a directory of prompts (.safetensors)",
    "ask Denmark --prompts x --top 0": "--top 0: give a number above 0",
    "evaluate": "--prompts is missing: give a run",
    "evaluate --prompts": "--prompts is missing: give a run",
    "evaluate --prompts x --split valid": 'Invalid value "valid" for --split. Choose from: "train", "dev", "test".',
    "evaluate --prompts x --limit-facts 0": "--limit-facts 0: give a number above 0",
    "plan": "BACKBONE is missing: give bert-base, ",
    "plan gpt2 --chart": "--chart requires an argument; `megaprompt plan --help` tells",
    "plan gpt2 -x": "Unknown option: -x; `megaprompt plan --help` tells",
    "plan gpt2 --gpu-memory inf": "--gpu-memory: inf is not a number",
    "plan no/such": "--backbone no/such: cannot be loaded",
    "plan gpt2 --deepspeed zero4": "give a file, or one of zero3, ",
    "memory --ranks two": "--ranks two: give numbers above 0",
    "convert": "SOURCE is missing: give the directory with the checkpoint's parts",
    "convert a": "OUT is missing: give a directory to write",
    "convert a b --parts 0": "--parts 0: give a number above 0",
    "data fetch": "SOURCE is missing: give lama (",
    "data fetch nope": 'Invalid value "nope" for SOURCE. Choose from: "lama", ',
    "data vocabulary --out x": "--backbones is missing: give names as for `megaprompt probe`",
    "data count --bakbone x": "Unknown option: --bakbone. Did you mean --backbone?",
}


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_wrong_use_of_a_command_is_one_line(command, capsys):
    from megaprompt.cli import main

    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("megaprompt: ")
    assert OTHER_COMMANDS[command] in line


def test_vocabulary_without_any_object(probe, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("The\nof\n")
    assert probe("--vocab", words) == 1
    assert "no relation of data has an object in the vocabulary words.txt" in capsys.readouterr().err
    words.write_text("qqqqqq\n")
    assert probe("--vocab", words, out="other") == 2
    assert "none of its words is one token" in capsys.readouterr().err


def test_relation_without_facts(probe, data_directory, capsys):
    (data_directory / "trex" / "dev" / "P36.jsonl").write_text("")
    assert probe() == 1
    assert "relation P36 of data: it has no facts in dev" in capsys.readouterr().err


def test_relation_without_a_manual_prompt(probe, data_directory, capsys):
    (data_directory / "relations.jsonl").unlink()
    assert probe() == 1
    assert "no manual prompt" in capsys.readouterr().err
    assert probe("--methods", "p-tuning", out="second") == 0


def test_another_run_is_not_overwritten(probe, tmp_path, capsys):
    assert probe() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert probe("--seed", "1") == 2
    assert "holds another run; choose another directory" in capsys.readouterr().err
    assert probe("--seed", "1", "--resume") == 2
    assert "was started with --seed 0, not 1" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert probe("--resume") == 0, "a complete run is shown again"


def test_a_failed_start_leaves_the_directory_free(probe, tmp_path):
    assert probe("--relations", "P9999") == 2
    assert probe() == 0


def test_prompts_of_another_backbone(probe, tokenizer, tmp_path, capsys):
    from megaprompt.cli import main

    assert probe() == 0
    other = tmp_path / "other"
    make_model("llama", len(tokenizer), seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    ask = ["ask", "--prompts", str(tmp_path / "run"), "--relation", "P36", "Peru"]
    assert main([*ask, "--backbone", str(other)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "P36.safetensors: learned on" in error
    assert "give --backbone" in error
    assert main([*ask[:3], "--relation", "P31", "Peru"]) == 2
    assert "--relation P31: no prompt" in capsys.readouterr().err
    assert main(["ask", "--prompts", str(tmp_path / "nowhere"), "Peru"]) == 2


def test_fingerprint_survives_half_precision(make_backbone):
    assert make_backbone(dtype=torch.float32).fingerprint == make_backbone(dtype=torch.bfloat16).fingerprint
    assert make_backbone(seed=1).fingerprint != make_backbone(seed=2).fingerprint


def test_interrupted_run_resumes_to_the_same_result(backbone_directory, data_directory, tmp_path):
    """Ctrl-C in the middle of training, in a process of its own; then --resume without any other option."""
    from megaprompt.cli import main

    options = ["--backbone", str(backbone_directory), "--data", str(data_directory), "--learning-rate", "0.01"]
    options += ["--max-epochs", "200", "--patience", "200"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["probe", *options, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "megaprompt", "probe", *options, "--out", str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (broken / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "continue with --resume" in error
    assert not json.loads((broken / "results.json").read_text())["complete"]
    assert load_checkpoint(broken / "state", World()).step > 0
    assert len(list((broken / "state").iterdir())) <= 2

    assert main(["probe", "--out", str(broken), "--resume"]) == 0
    results = [json.loads((run / "results.json").read_text()) for run in (whole, broken)]
    assert results[0]["methods"] == results[1]["methods"]
    prompts = [load_prompts(run) for run in (whole, broken)]
    for name, prompt in prompts[0].items():
        assert torch.equal(prompt.vectors, prompts[1][name].vectors)
    logs = [read_lines(run / "log.jsonl") for run in (whole, broken)]
    assert [{**line, "time": 0} for line in logs[0]] == [{**line, "time": 0} for line in logs[1]]


def test_damaged_checkpoint_and_prompt(probe, tmp_path, capsys, caplog, monkeypatch):
    from megaprompt.cli import main

    monkeypatch.setattr("megaprompt.run.job.forget", lambda *_: None)
    assert probe() == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    del results["methods"]["p-tuning"]
    (run / "results.json").write_text(json.dumps(results | {"complete": False}))
    (last,) = (run / "state").iterdir()
    shutil.copytree(last, run / "state" / "step-99999998")
    shutil.copytree(last, run / "state" / "step-99999999")
    (run / "state" / "step-99999999" / "manifest.json").write_text("{")
    (run / "state" / "step-99999998" / "P36.pt").write_bytes(b"PK damaged")
    assert probe("--resume") == 0  # with the one that is left
    assert "step-99999999 is damaged" in caplog.text
    assert "step-99999998/P36.pt is damaged (wrong checksum)" in caplog.text

    (run / "results.json").write_text(json.dumps(results | {"complete": False}))
    for path in (run / "state").glob("step-*/P36.pt"):
        path.write_bytes(b"PK damaged")
    assert probe("--resume") == 1
    assert "no checkpoint" in capsys.readouterr().err
    for path in (run / "state").glob("step-*/manifest.json"):
        path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT - 1}'))
    assert probe("--resume") == 1
    assert "was written by another version of megaprompt" in caplog.text
    (run / "prompts" / "P36.safetensors").write_bytes(b"damaged")
    assert main(["ask", "--prompts", str(run), "--relation", "P36", "Peru"]) == 1
    assert "P36.safetensors: cannot be read as a prompt" in capsys.readouterr().err


def test_another_precision_is_refused_when_resuming(probe, tmp_path, capsys):
    assert probe("--methods", "manual") == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"complete": False}))
    config = tmp_path / "bf16.json"
    config.write_text('{"bf16": {"enabled": true}}')
    assert probe("--methods", "manual", "--resume", "--deepspeed", str(config)) == 1
    assert "was started in float32, not in bfloat16; give --dtype float32" in capsys.readouterr().err
    assert json.loads((run / "results.json").read_text())["backbone"]["dtype"] == "float32"


def test_a_prompt_that_is_not_finite_is_not_saved(tmp_path):
    from megaprompt.errors import MegapromptError

    prompt = SavedPrompt("P36", "<1>[X][Y]", "m", "f", "geonames", torch.tensor([[float("nan")]]))
    with pytest.raises(MegapromptError, match="not finite"):
        prompt.save(tmp_path / "P36.safetensors")


def test_config_file_gives_defaults(probe, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("relations: [P36]\nlimit_facts: 5\n")
    assert probe("--config", path, "--limit-facts", "3") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["data"]["relations"]) == ["P36"]
    assert results["data"]["relations"]["P36"]["facts"]["test"] == 3


def test_mistakes_in_the_config_file_are_told_with_its_name(probe, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("pass_tokens: -1", f"{path}: --pass-tokens -1: give a number above 0"),
        ("max_epoch: 3", f'{path}: Unknown option: "[max_epoch]" from this file. Did you mean --max-epochs?'),
        ("max_epochs: many", f"{path}: Invalid value for [max_epochs]: many is not a whole number"),
        ("- P36", f"{path}: expected `option: value` lines"),
        ("a: b: c", f"{path}: cannot be read as YAML"),
    ):
        path.write_text(text)
        assert probe("--config", path) == 2
        assert message in capsys.readouterr().err
    path.unlink()
    assert probe(f"--config={path}") == 2
    assert f"{path}: cannot be read as YAML" in capsys.readouterr().err


def test_help_and_unknown_command(capsys):
    from megaprompt.cli import main

    for args in (["--help"], ["-h"], []):
        assert main(args) == 0
        assert "evaluate" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megaprompt {megaprompt.__version__}\n"
    assert main(["prob"]) == 2
    assert 'Unknown command "prob". Did you mean "probe"?' in capsys.readouterr().err
    assert main(["data", "fetsch"]) == 2
    assert '"fetsch"' in capsys.readouterr().err
    assert main(["probe", "--help"]) == 0
    assert "--limit-facts" in capsys.readouterr().out


def test_debug_shows_where(capsys):
    from megaprompt.cli import main

    with pytest.raises(UsageError):
        main(["status", "nowhere", "--debug"])
    assert main(["status", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("megaprompt: nowhere: ")


def test_full_disk_is_one_line(probe, tmp_path, capsys):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        assert probe(out="small/run") == 1
        assert "No space left" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", small], check=True)
