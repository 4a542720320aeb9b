"""`megaprompt superglue` from the command line, on a tiny model and made-up data."""

import json
import re
import statistics
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import pytest

from megaprompt.cli import main
from megaprompt.config import SUPERGLUE_TASKS, SuperGlueConfig, from_yaml
from tests.conftest import run_cli
from tests.report.made_up import Page
from tests.schemas import check_run
from tests.tasks.superglue.made_up import write_model, write_superglue

ORACLE = Path(__file__).parents[2] / ".fairseq" / "lib"
QUICK = ("--learning-rate", "0.01", "--fine-tuning-rate", "0.001", "--max-epochs", "2")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A transformers directory, as a user has it."""
    return write_model(tmp_path_factory.mktemp("model"))


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


def labels_of(row: dict, question: int | None = None) -> list[str]:
    """The labels of a line of the data or of a submission; of MultiRC's, those of all answers or of one question's."""
    if "passage" not in row or isinstance(row["passage"], str):
        return [str(row["label"]).lower()]
    questions = row["passage"]["questions"]
    return [
        str(a["label"]) for q in (questions if question is None else questions[question:][:1]) for a in q["answers"]
    ]


def as_scikit_learn(run: Path, data: Path, results: dict, methods: Iterable[str]) -> None:
    """Scores, from the labels in the data and the answers that a run submits, without any of our own code."""
    sys.path.append(str(ORACLE))
    try:
        metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (make fairseq does it)")
    finally:
        sys.path.remove(str(ORACLE))
    for task in SUPERGLUE_TASKS:
        rows = read_lines(data / task / "val.jsonl")
        for method in methods:
            lines = read_lines(run / "submission" / method / f"{task}.jsonl")
            gold = [label for row in rows for label in labels_of(row)]
            said = [label for line in lines for label in labels_of(line)]
            row = results[method]["relations"][task]
            if task == "MultiRC":
                assert row["f1a"] == pytest.approx(metrics.f1_score(gold, said, pos_label="1", zero_division=0))
                exact = [
                    labels_of(line, q) == labels_of(row, q)
                    for row, line in zip(rows, lines, strict=True)
                    for q in (0, 1)
                ]
                assert row["em"] == pytest.approx(metrics.accuracy_score([True] * len(exact), exact))
                continue
            assert row["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said))
            if task == "CB":
                expected = metrics.f1_score(gold, said, average="macro", zero_division=0)
                assert row["macro_f1"] == pytest.approx(expected)


def test_seven_tasks_make_a_run_with_all_its_files(superglue, tmp_path, capsys):
    assert superglue("--methods", "manual,in-context,p-tuning,manual+fine-tuning") == 0
    run = tmp_path / "run"
    results = check_run(run)
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
    text = re.sub(r"<script.*?</script>|<[^>]+>", " ", page.partition("<body>")[2], flags=re.S)
    text = re.sub(r"\s+", " ", text)
    for heading in ("accuracy, %", "F1, %", "EM, %", "F1a, %", "score on dev, %"):
        assert heading in text
    assert "Over 7 tasks, the mean score of p-tuning on test is" in text
    assert "<em>Score</em> is the mean of the metrics of a task" in page
    assert not re.search(r"\b(None|nan|Undefined|P@1|relations?|facts?)\b", text.partition(" Run ")[0])
    as_scikit_learn(run, tmp_path / "data", results["methods"], set(results["methods"]) - {"majority"})


@pytest.mark.slow
def test_classifiers_are_trained_where_train_has_both_classes(superglue, tmp_path):
    assert superglue("--methods", "fine-tuning", "--setting", "full") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["methods"]["fine-tuning"]["relations"]
    assert set(rows) == set(SUPERGLUE_TASKS)
    assert all(row["epochs"] == 2 and row["score"] is not None for row in rows.values())
    assert results["data"]["relations"]["RTE"]["facts"] == {"train": 5, "dev": 1, "test": 6}


@pytest.mark.slow
def test_a_run_is_repeated(superglue, tmp_path, capsys):
    assert superglue("--tasks", "copa,wsc", "--methods", "manual,p-tuning") == 0
    files = check_run(tmp_path / "run")["data"]["files"]
    assert set(files) == {f"{task}/{split}.jsonl" for task in ("COPA", "WSC") for split in ("train", "dev32", "val")}
    assert main(["rerun", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert "the same results" in capsys.readouterr().out


TUNED = ("p-tuning", "--tune", "both")


def test_the_model_is_tuned_with_the_prompts(superglue, tmp_path):
    """In another column than with the model frozen; a search writes down what it tried."""
    assert superglue("--tasks", "multirc", "--methods", *TUNED, "--search", "--select-on", "validation") == 0
    run = tmp_path / "run"
    results = check_run(run)
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
    assert not (run / "state").exists()
    assert not (run / "prompts").exists(), "a prompt is of no use without its model"
    page = (run / "report.html").read_text()
    for text in ("p-tuning+fine-tuning", "chosen on the validation set", "learning rate 2e-05, batches of 16"):
        assert text in page


@contextmanager
def stopped_soon(monkeypatch):
    """As by a signal that comes after a few steps; what is done by then is kept."""

    @contextmanager
    def soon():
        yield lambda asked=[]: asked.append(0) or len(asked) > 5

    with monkeypatch.context() as patched:
        for module in ("training", "context"):
            patched.setattr(f"megaprompt.run.{module}.stop_signals", soon)
        yield


@pytest.mark.parametrize(
    ("tasks", "methods"),
    [
        ("CB,COPA,WSC", ["manual,p-tuning", "--batch-size", "2"]),
        pytest.param("CB,COPA,WSC", ["manual+fine-tuning", "--batch-size", "2"], marks=pytest.mark.slow),
        pytest.param("COPA", [*TUNED, "--search"], marks=pytest.mark.slow),
    ],
    ids=["frozen", "tuned", "searched"],
)
def test_an_interrupted_run_goes_on_exactly(superglue, tmp_path, monkeypatch, tasks, methods):
    chosen = ("--tasks", tasks, "--methods", *methods)
    assert superglue(*chosen, out="whole") == 0

    with stopped_soon(monkeypatch):
        assert superglue(*chosen) == 130
    if "--search" in methods:
        assert len(list((tmp_path / "run" / "state" / "parts" / "p-tuning+fine-tuning").rglob("*.pt"))) == 2
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


def test_what_was_made_of_complete_columns_is_made_again(superglue, tmp_path, monkeypatch):
    """The mean of patterns is not yet on the disk when the next method is interrupted in its first task."""
    chosen = ("--tasks", "RTE,CB", "--methods", "best-manual,in-context")
    assert superglue(*chosen, out="whole") == 0
    entered = []

    @contextmanager
    def in_the_second_method():
        entered.append(1)
        yield lambda: len(entered) > 1

    with monkeypatch.context() as patched:
        patched.setattr("megaprompt.run.context.stop_signals", in_the_second_method)
        assert superglue(*chosen) == 130
    assert main(["superglue", "--resume", "--out", str(tmp_path / "run")]) == 0
    whole, resumed = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "run"))
    assert "mean of patterns" in resumed["methods"]
    assert resumed["methods"] == whole["methods"]


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


def test_prompts_for_texts_are_not_asked_for_facts(superglue, tmp_path, capsys):
    assert superglue("--tasks", "cb", "--methods", "manual") == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    for command in (
        ["evaluate", "--prompts", run],
        ["evaluate", "--prompts", run, "--report"],
        ["ask", "x", "--prompts", run],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "not for facts" in error
        assert "run megaprompt superglue with another --data" in error


def test_patterns_are_compared_each_with_its_words(superglue, tmp_path, caplog):
    assert superglue("--tasks", "rte,multirc,wsc", "--methods", "manual,best-manual", out="all") == 0
    assert "pattern pet-0 is left out: RTE, idx 0: template" in caplog.text, "a causal model reads no field behind [Y]"
    run = tmp_path / "all"
    methods = check_run(run)["methods"]
    assert list(methods) == ["majority", "manual", "best-manual", "mean of patterns"]
    alone = {}  # pattern -> its row as the manual prompt of a run of its own
    alone["pet-0"] = methods["manual"]["relations"]["MultiRC"]
    for name in ("pet-1", "pet-2"):
        mine = tmp_path / "mine.toml"
        mine.write_text(f'[MultiRC]\nmanual = "{name}"\n')
        assert superglue("--tasks", "multirc", "--methods", "manual", "--patterns", mine, out=name) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        alone[name] = results["methods"]["manual"]["relations"]["MultiRC"]
    best, mean = (methods[column]["relations"]["MultiRC"] for column in ("best-manual", "mean of patterns"))
    assert {each["name"]: each["test_f1a"] for each in best["tried"]} == {n: row["f1a"] for n, row in alone.items()}
    assert best["chosen"] == max(alone, key=lambda name: alone[name]["dev"]["score"])
    assert best["f1a"] == alone[best["chosen"]]["f1a"]
    for metric in ("em", "f1a", "score"):
        values = [row[metric] for row in alone.values()]
        assert mean[metric] == pytest.approx(statistics.mean(values))
        assert mean[f"{metric}_deviation"] == pytest.approx(statistics.stdev(values))
    assert len(methods["best-manual"]["relations"]["RTE"]["tried"]) == 1
    table = (run / "table.md").read_text()
    assert "MP zero-shot, mean of patterns" in table
    assert f"{100 * mean['f1a']:.1f} ± {100 * mean['f1a_deviation']:.1f}" in table
    assert "standard deviation over patterns" in table
    assert "seeds" not in table
    mine.write_text('[RTE]\ncompared = ["table6-2", "table6-3"]\n')
    options = ("--tasks", "rte", "--methods", "best-manual,p-tuning", "--patterns", mine)
    assert superglue(*options, out="six") == 0
    page = Page(tmp_path / "six" / "report.html")
    [six] = [table for table in page.tables if table[0][0][0] == "pattern"]
    assert [row[0][0].partition(":")[0] for row in six[1:]] == ["table6-2", "table6-3", "P-tuning, model frozen"]
    mine.write_text('[CB]\ncompared = ["pet-1"]\n')
    assert superglue("--tasks", "cb", "--methods", "best-manual", "--patterns", mine, out="none") == 2


@pytest.mark.slow
def test_pet_tunes_the_model_on_each_pattern(superglue, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text('[MultiRC]\ncompared = ["pet-0", "pet-1"]\n')
    options = ("--tasks", "multirc", "--methods", "pet,manual+fine-tuning", "--max-steps", "3")
    options += ("--patterns", str(tmp_path / "mine.toml"))
    assert superglue(*options, out="whole") == 0
    methods = json.loads((tmp_path / "whole" / "results.json").read_text())["methods"]
    assert set(methods) == {"majority", "pet", "pet-best", "manual+fine-tuning"}
    best, mean, alone = (methods[name]["relations"]["MultiRC"] for name in ("pet-best", "pet", "manual+fine-tuning"))
    tried = {each["name"]: each for each in best["tried"]}
    assert list(tried) == ["pet-0", "pet-1"]
    assert tried["pet-0"]["test_f1a"] == alone["f1a"], "the same as the manual prompt, from the original weights"
    assert best["chosen"] == max(tried, key=lambda name: tried[name]["score"])
    assert mean["em"] == pytest.approx(statistics.mean(each["test_em"] for each in tried.values()))
    table = (tmp_path / "whole" / "table.md").read_text()
    assert "PET, mean of patterns" in table

    with stopped_soon(monkeypatch):  # after the first pattern
        assert superglue(*options) == 130
    assert main(["superglue", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["methods"] == methods


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
