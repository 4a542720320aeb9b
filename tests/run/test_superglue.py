"""`megaprompt superglue` from the command line, on a tiny model and made-up data."""

import json
import re
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megaprompt.cli import main
from megaprompt.config import SUPERGLUE_TASKS, SuperGlueConfig, from_yaml
from tests.conftest import run_cli
from tests.tasks.superglue.made_up import make_tokenizer, write_superglue

QUICK = ("--learning-rate", "0.01", "--fine-tuning-rate", "0.001", "--max-epochs", "2")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A transformers directory, as a user has it."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def superglue(model, tmp_path):
    """Run the command on the tiny model and made-up data, in this process; returns the exit code."""
    data = write_superglue(tmp_path / "data")

    def run(*args: object, out: str = "run") -> int:
        where = ("--backbone", model, "--data", data, "--out", tmp_path / out)
        quick = QUICK if "--search" not in args else QUICK[:2] + QUICK[4:]  # a search has rates of its own
        return main(["superglue", *map(str, (*where, *quick, *args))])

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seven_tasks_make_a_run_with_all_its_files(superglue, tmp_path, capsys):
    assert superglue("--methods", "manual,in-context,p-tuning,manual+fine-tuning") == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["complete"]
    assert list(results["metrics"]) == ["score", "accuracy", "macro_f1", "em", "f1a"]
    assert list(results["data"]["relations"]) == list(SUPERGLUE_TASKS)
    assert set(results["methods"]) == {"majority", "manual", "in-context", "p-tuning", "manual+fine-tuning"}
    for name, method in results["methods"].items():
        rows = method["relations"]
        assert method["macro"]["score"] == pytest.approx(sum(row["score"] for row in rows.values()) / 7)
        assert rows["CB"]["score"] == pytest.approx((rows["CB"]["accuracy"] + rows["CB"]["macro_f1"]) / 2)
        assert rows["MultiRC"]["score"] == pytest.approx((rows["MultiRC"]["em"] + rows["MultiRC"]["f1a"]) / 2)
        assert "em" not in rows["RTE"]
        for task in SUPERGLUE_TASKS if name != "majority" else ():
            lines = [each for each in read_lines(run / "predictions" / f"{task}.jsonl") if each["method"] == name]
            assert len(lines) == rows[task]["facts"]
            if task in ("BoolQ", "RTE", "COPA", "WSC"):
                assert sum(line["right"] for line in lines) / len(lines) == pytest.approx(rows[task]["accuracy"])
            submitted = read_lines(run / "submission" / name / f"{task}.jsonl")
            assert [line["idx"] for line in submitted] == list(range(6))
    assert results["methods"]["p-tuning"]["relations"]["WSC"]["epochs"] == 2
    assert {path.stem for path in (run / "prompts").glob("*.safetensors")} == set(SUPERGLUE_TASKS)
    assert from_yaml(SuperGlueConfig, run / "config.yaml").setting == "few-shot"
    printed = capsys.readouterr().out
    assert "score on test, %" in printed
    assert "macro" in printed

    page = (run / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))
    for heading in ("accuracy, %", "F1, %", "EM, %", "F1a, %", "score on dev, %"):
        assert heading in text
    assert "Over 7 tasks, the mean score of p-tuning on test is" in text
    assert "<em>Score</em> is the mean of the metrics of a task" in page
    assert not re.search(r"\b(None|nan|Undefined|P@1|relations?|facts?)\b", text.partition(" Run ")[0])


def test_classifiers_are_trained_where_train_has_both_classes(superglue, tmp_path):
    assert superglue("--methods", "fine-tuning", "--setting", "full") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["methods"]["fine-tuning"]["relations"]
    assert set(rows) == set(SUPERGLUE_TASKS)
    assert all(row["epochs"] == 2 and row["score"] is not None for row in rows.values())
    assert results["data"]["relations"]["RTE"]["facts"] == {"train": 5, "dev": 1, "test": 6}


TUNED = ("p-tuning", "--tune", "both")


def test_the_model_is_tuned_with_the_prompts(superglue, tmp_path):
    """In another column than with the model frozen; a search writes down what it tried."""
    assert superglue("--tasks", "multirc", "--methods", *TUNED, "--search", "--select-on", "validation") == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["name"] == "SuperGLUE (few-shot, chosen on the validation set)"
    assert set(results["methods"]) == {"majority", "p-tuning+fine-tuning"}
    row = results["methods"]["p-tuning+fine-tuning"]["relations"]["MultiRC"]
    assert {metric: row[metric] for metric in row["dev"]} == row["dev"], "dev is the validation set"
    assert "<1>" in row["template"]
    assert len(row["tried"]) == 6
    [chosen] = [each for each in row["tried"] if each["name"] == row["chosen"]]
    assert chosen["score"] == max(each["score"] for each in row["tried"]) == row["score"]
    lines = read_lines(run / "log.jsonl")
    assert len({line["candidate"] for line in lines if "epoch" in line}) == 6
    assert sum("tried" in line for line in lines) == 1
    assert not (run / "state" / "parts").exists()
    assert not (run / "prompts").exists(), "a prompt is of no use without its model"
    page = (run / "report.html").read_text()
    for text in ("p-tuning+fine-tuning", "chosen on the validation set", "learning rate 2e-05, batches of 16"):
        assert text in page


@pytest.mark.parametrize(
    ("tasks", "methods"),
    [
        ("CB,COPA,WSC", ["manual,p-tuning", "--batch-size", "2"]),
        ("CB,COPA,WSC", ["manual+fine-tuning", "--batch-size", "2"]),
        ("COPA", [*TUNED, "--search"]),
    ],
    ids=["frozen", "tuned", "searched"],
)
def test_an_interrupted_run_goes_on_exactly(superglue, tmp_path, monkeypatch, tasks, methods):
    chosen = ("--tasks", tasks, "--methods", *methods)
    assert superglue(*chosen, out="whole") == 0

    @contextmanager
    def soon():
        """As a signal that comes after a few steps; what is done by then is kept."""
        yield lambda asked=[]: asked.append(0) or len(asked) > 5

    with monkeypatch.context() as patched:
        for module in ("training", "context"):
            patched.setattr(f"megaprompt.run.{module}.stop_signals", soon)
        assert superglue(*chosen) == 130
    if "--search" in methods:
        assert len(list((tmp_path / "run" / "state" / "parts").rglob("*.pt"))) == 2
    assert main(["superglue", "--resume", "--out", str(tmp_path / "run")]) == 0
    whole, resumed = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "run"))
    assert resumed["methods"] == whole["methods"]
    for task in tasks.split(","):
        one, other = (read_lines(tmp_path / out / "predictions" / f"{task}.jsonl") for out in ("whole", "run"))
        assert one == other
    one, other = (
        [{**line, "time": None} for line in read_lines(tmp_path / out / "log.jsonl")] for out in ("whole", "run")
    )
    assert one == other


def test_what_a_run_would_do_is_checked(superglue, tmp_path, capsys):
    assert superglue("--check", "--tasks", "rte,multirc") == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()] == [
        ["ok", name] for name in ("versions", "options", "backbone", "data", "disk", "memory")
    ]
    assert "2 task(s), 30 train, 30 dev, 30 test examples; learned prompts [premise...] Question:" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--tasks", "rte,mnli"], 2, "--tasks mnli: unknown; choose from BoolQ, CB"),
        (["--methods", "autoprompt"], 2, "--methods autoprompt: unknown"),
        (["--data", "nowhere"], 2, "--data nowhere: there is no such directory"),
        (["--patterns", "nowhere"], 2, "--patterns nowhere: cannot be read as TOML"),
        (["--limit-examples", "0"], 2, "--limit-examples 0"),
        (["--setting", "half"], 2, "half"),
        (["--tune", "both", "--methods", "manual"], 2, "--tune both: says what p-tuning trains; add it to --methods"),
        (["--search"], 2, "--search: is for methods that train the model; add fine-tuning, or --tune both"),
        (["--search", "--tune", "both", "--batch-size", "8"], 2, "leave --batch-size and --fine-tuning-rate out"),
        (["--tune", "both", "--dtype", "bfloat16"], 2, "fine-tuning in half precision needs ZeRO-3's float32 copies"),
    ],
)
def test_mistakes_are_told_at_once(superglue, tmp_path, capsys, args, code, message):
    assert superglue(*args) == code
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_mistakes_that_need_the_model_leave_nothing(superglue, tmp_path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text('[CB]\nmanual = "pet-1"\n')
    assert superglue("--tasks", "cb", "--methods", "manual", "--patterns", mine) == 2
    error = capsys.readouterr().err
    assert "has [premise...] after [Y]; a causal backbone reads only what stands before" in error
    wsc = tmp_path / "data" / "WSC" / "train.jsonl"
    wsc.write_text("".join(line + "\n" for line in wsc.read_text().splitlines() if '"label": true' in line))
    assert superglue("--tasks", "wsc", "--methods", "fine-tuning") == 2
    assert "--methods fine-tuning: all training examples of WSC are True" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_majority_of_train_that_was_chosen_is_that_of_dev(superglue, tmp_path):
    """WSC's few-shot train set is all True."""
    wsc = tmp_path / "data" / "WSC"
    for split, label in (("train", True), ("dev32", False)):
        rows = [json.loads(line) | {"label": label} for line in (wsc / f"{split}.jsonl").read_text().splitlines()]
        (wsc / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert superglue("--tasks", "wsc", "--methods", "manual") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    gold = [line["gold"] for line in read_lines(tmp_path / "run" / "predictions" / "WSC.jsonl")]
    assert results["methods"]["majority"]["relations"]["WSC"]["accuracy"] == gold.count("False") / len(gold)


@pytest.mark.slow
def test_two_ranks_and_groups_say_the_same(model, tmp_path):
    """With the model sharded, and a group of ranks for WSC, whose answers take more rounds than the others have."""
    data = write_superglue(tmp_path / "data")
    options = ("--backbone", model, "--data", data, *QUICK, "--tasks", "copa,wsc", "--dtype", "float32")
    options += ("--methods", "manual,p-tuning,manual+fine-tuning")
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    finished = run_cli("superglue", *options, "--out", runs[1], timeout=900)
    assert finished.returncode == 0, finished.stderr
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    groups = ("--deepspeed", "zero3", "--relation-groups", "2")
    finished = run_cli("superglue", *options, *groups, "--out", runs[2], launcher=launcher, timeout=900)
    assert finished.returncode == 0, finished.stderr
    for task in ("COPA", "WSC"):
        one, two = (read_lines(run / "predictions" / f"{task}.jsonl") for run in runs.values())
        assert len(one) == len(two)
        for line, other in zip(one, two, strict=True):
            assert line["method"] == other["method"]
            assert line.get("written") == other.get("written")
            assert line["answer"] == other["answer"]
            assert line.get("probability", 1) == pytest.approx(other.get("probability", 1), rel=1e-3)


@pytest.mark.slow
def test_sharding_and_ranks_change_nothing_where_the_model_is_tuned(model, tmp_path):
    """Both optimizers, and the norm that clips gradients of prompts and weights together."""
    data = write_superglue(tmp_path / "data")
    options = ("--backbone", model, "--data", data, "--tasks", "copa", "--methods", *TUNED, "--max-epochs", "2")
    options += ("--learning-rate", "0.01", "--fine-tuning-rate", "0.001", "--batch-size", "8", "--setting", "full")
    assert main(["superglue", *map(str, options), "--out", str(tmp_path / "one")]) == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    more = ("--deepspeed", "zero3", "--out", tmp_path / "two")
    finished = run_cli("superglue", *options, *more, launcher=launcher, timeout=900)
    assert finished.returncode == 0, finished.stderr
    one, two = ([line["train_loss"] for line in read_lines(tmp_path / run / "log.jsonl")] for run in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
    assert len(one) == 2
    assert one[-1] < one[0]
