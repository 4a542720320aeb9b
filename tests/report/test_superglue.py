"""SuperGLUE's tables: their layout, what stands beside them, and how sure the numbers are."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megaprompt.cli import main
from megaprompt.config import SuperGlueConfig, to_yaml
from megaprompt.report.cited_superglue import CITED, COLUMNS, cited_table
from megaprompt.report.intervals import SAMPLES, interval, samples_of
from megaprompt.report.superglue import AVERAGE, superglue_table
from megaprompt.report.superglue_formats import legend_of
from tests.report.made_up import Page, change, joined, make_results, markdown_rows

METRICS = {"score": "score", "accuracy": "accuracy", "macro_f1": "F1", "em": "EM", "f1a": "F1a"}
TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "RTE", "WSC", "WiC")
ORACLE = Path(__file__).parents[2] / ".fairseq" / "lib"


@pytest.fixture
def make_run(tmp_path):
    """A run on SuperGLUE: `make_run("a", {"manual": 0.5})` has that score everywhere; CB's F1 is 0.1 below its
    accuracy, and so is MultiRC's EM below F1a."""

    def make(name, scores, *, backbone="tiny", hidden_size=576, tasks=TASKS, setting="full", predictions=(), seed=0):
        results = make_results({m: dict.fromkeys(tasks, value) for m, value in scores.items()}, METRICS, "examples")
        results["backbone"] |= {"name": backbone, "hidden_size": hidden_size}
        results["data"]["name"] = f"SuperGLUE ({setting})"
        for method in results["methods"].values():
            for row in method["relations"].values():
                value = row["score"]
                row |= {"accuracy": value + 0.05, "macro_f1": value - 0.05, "em": value - 0.05, "f1a": value + 0.05}
        path = tmp_path / name
        path.mkdir()
        (path / "results.json").write_text(json.dumps(results))
        config = SuperGlueConfig(backbone=backbone, out=path, data="x", setting=setting.partition(",")[0], seed=seed)
        (path / "config.yaml").write_text(to_yaml(config))
        for task in predictions:
            lines = [{"method": m, **line} for m in scores for line in predicted(task)]
            (path / "predictions").mkdir(exist_ok=True)
            (path / "predictions" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return make


def predicted(task: str, count: int = 40, seed: int = 0) -> list[dict]:
    """Made-up answers; MultiRC's are four to a passage, two to a question."""
    generator = np.random.default_rng(seed)
    labels = {"CB": ["entailment", "contradiction", "neutral"], "MultiRC": ["0", "1"]}.get(task, ["False", "True"])
    lines = []
    for i in range(count):
        gold, answer = (labels[k] for k in generator.integers(len(labels), size=2))
        idx = [i // 4, i // 2, i] if task == "MultiRC" else [i]
        text = f"passage {i // 4} | q {i // 2} | {i}" if task == "MultiRC" else f"text {i}"
        lines.append({"idx": idx, "input": text, "gold": gold, "answer": answer, "right": gold == answer})
    return lines


def test_the_layout_is_the_papers(make_run, tmp_path):
    scores = {"majority": 0.5, "manual": 0.4, "p-tuning": 0.7}
    runs = [make_run(f"s{seed}", {**scores, "p-tuning": 0.7 + 0.1 * seed}, seed=seed) for seed in (0, 1)]
    out = tmp_path / "out"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    page = Page(out / "report.html")
    heading = [cell for cell, _ in page.tables[0][0]]
    assert heading == [
        "method", "BoolQ Acc.", "CB Acc.", "CB F1", "WiC Acc.", "RTE Acc.", "MultiRC EM", "MultiRC F1a", "WSC Acc.",
        "COPA Acc.", "Avg.",
    ]  # fmt: skip
    rows = page.rows(0)
    assert list(rows)[1:] == ["majority", "MP zero-shot", "P-tuning, model frozen"]
    assert rows["MP zero-shot"][1:3] == ["45.0\u00a0°", "35.0\u00a0°"], "no better than always the same answer"
    assert rows["P-tuning, model frozen"][0] == "80.0\u00a0±\u00a07.1"
    assert rows["P-tuning, model frozen"][-1] == "75.0\u00a0±\u00a07.1"
    assert "2 seeds" in page.prose()
    assert "Cited" not in page.prose()
    assert not (out / "types.png").exists()
    assert (out / "averages.png").exists()
    assert markdown_rows((out / "table.md").read_text())[-1][:3] == ["tiny", "P-tuning, model frozen", "**80.0 ± 7.1**"]
    lines = list(csv.DictReader((out / "table.csv").open()))
    assert len(lines) == 3 * 10
    assert {line["task"] for line in lines} == {*TASKS, "Avg."}
    assert (out / "table.tex").read_text().count(r" \\") == 4


def test_the_papers_figures_stand_beside_the_same_backbone_and_setting_only(make_run):
    scores = {"majority": 0.5, "manual": 0.4}
    same = make_run("a", scores, backbone="openai-community/gpt2", hidden_size=768)
    other = make_run("b", scores, backbone="gpt2", hidden_size=32)
    found = superglue_table(joined(same, other))
    first, second = found.blocks
    assert (first.cited.table, second.cited) == (3, None)
    by_name = {line.what: found.cited_values(line) for line in first.cited.lines}
    assert by_name["MP zero-shot"]["MultiRC", "f1a"] == 23.8
    assert by_name["P-tuning, model tuned"][AVERAGE] == 70.4
    few = make_run("c", scores, backbone="gpt2", hidden_size=768, setting="few-shot")
    assert superglue_table(joined(few)).blocks[0].cited is None


def test_an_average_over_fewer_tasks_is_never_beside_the_papers(make_run):
    run = make_run("a", {"majority": 0.5, "manual": 0.4}, backbone="gpt2", hidden_size=768, tasks=("CB", "RTE"))
    found = superglue_table(joined(run))
    assert found.average_heading == "over 2 tasks"
    [mp] = [line for line in found.blocks[0].cited.lines if line.what == "MP zero-shot"]
    assert found.cited_values(mp) == {
        ("CB", "accuracy"): 44.6, ("CB", "macro_f1"): 33.3, ("RTE", "accuracy"): 49.5, AVERAGE: "–"
    }  # fmt: skip
    assert "the paper's average is over seven" in " ".join(legend_of(found))


def test_scores_that_were_chosen_on_are_marked(make_run):
    run = make_run("a", {"manual": 0.4}, setting="full, chosen on the validation set")
    found = superglue_table(joined(run))
    assert (found.setting, found.chosen_on_test) == ("full", True)
    assert "--select-on validation" in " ".join(legend_of(found))


def test_cited_averages_follow_from_their_lines():
    """All do but one: GPT2-base P-tuning, 70.34 by its cells."""
    off = []
    for table in CITED:
        for line in table.lines:
            assert len(line.values) == len(COLUMNS)
            if line.average is not None:
                boolq, cb, f1, wic, rte, em, f1a, wsc, copa = map(float, line.values)
                mean = (boolq + (cb + f1) / 2 + wic + rte + (em + f1a) / 2 + wsc + copa) / 7
                if abs(mean - line.average) > 0.0501:
                    off.append((table.model, line.what))
    assert off == [("gpt2", "P-tuning, model tuned")]
    albert = {"name": "/models/albert-xxlarge-v2", "hidden_size": 4096}
    assert cited_table(albert, "few-shot").table == 5
    assert cited_table(albert, "full") is None


def test_intervals_are_shown_where_there_are_predictions(make_run, tmp_path):
    run = make_run("a", {"majority": 0.5, "manual": 0.4}, tasks=("CB", "MultiRC"), predictions=("CB", "MultiRC"))
    [block] = superglue_table(joined(run)).blocks
    values = block.lines[-1].values
    assert all(value.interval[0] < value.interval[1] for value in values.values())
    assert main(["report", str(run)]) == 0
    prose = Page(run / "report.html").prose()
    assert "In the layout of the P-tuning paper" in prose
    assert "95 % intervals over the choice of examples" in prose
    (run / "predictions" / "CB.jsonl").write_text('{"method": "manual", "idx": [0], "input": "a"}\n')
    assert main(["report", str(run)]) == 1


@pytest.fixture(scope="module")
def sklearn_metrics():
    sys.path.append(str(ORACLE))
    yield pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (make fairseq does it)")
    sys.path.remove(str(ORACLE))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", ["RTE", "CB", "MultiRC"])
def test_samples_as_scikit_learn(sklearn_metrics, task, seed, monkeypatch):
    """Each sample is the metric of examples that are repeated as often as they were drawn."""
    lines = predicted(task, 40, seed)
    texts = sorted({line["input"].partition(" | ")[0] for line in lines}, key=lambda text: int(text.split()[1]))
    drawn = np.random.default_rng(seed).multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=8)
    monkeypatch.setattr("megaprompt.report.intervals._drawn", lambda count: drawn.astype(float))
    metrics = {"CB": ("accuracy", "macro_f1"), "MultiRC": ("em", "f1a")}.get(task, ("accuracy",))
    found = samples_of(lines, metrics)
    for sample, counts in enumerate(drawn):
        times = dict(zip(texts, counts, strict=True))
        repeated = [line for line in lines for _ in range(times[line["input"].partition(" | ")[0]])]
        gold, said = ([line[key] for line in repeated] for key in ("gold", "answer"))
        if "accuracy" in metrics:
            assert found["accuracy"][sample] == pytest.approx(sklearn_metrics.accuracy_score(gold, said))
        if "macro_f1" in metrics:
            expected = sklearn_metrics.f1_score(gold, said, average="macro", zero_division=0)
            assert found["macro_f1"][sample] == pytest.approx(expected)
        if "f1a" in metrics:
            expected = sklearn_metrics.f1_score(gold, said, pos_label="1", zero_division=0)
            assert found["f1a"][sample] == pytest.approx(expected)
            questions = [line["idx"][1] for line in lines]
            weights = [times[lines[questions.index(q)]["input"].partition(" | ")[0]] for q in sorted(set(questions))]
            right = [all(line["right"] for line in lines if line["idx"][1] == q) for q in sorted(set(questions))]
            assert found["em"][sample] == pytest.approx(np.average(right, weights=weights))


def test_an_interval_is_as_wide_as_the_binomials():
    lines = [{"idx": [i], "input": f"t{i}", "gold": "a", "answer": "a", "right": i % 2 == 0} for i in range(400)]
    samples = samples_of(lines, ["accuracy"])["accuracy"]
    assert len(samples) == SAMPLES
    low, high = interval(samples)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.01)


def test_what_any_constant_answer_scores_is_marked(make_run):
    """Also where the most frequent answer of train is the wrong one, as always No on MultiRC."""
    run = make_run("a", {"majority": 0.0, "manual": 0.3})
    constant = {"MultiRC": {"score": 0.3, "em": 0.01, "f1a": 0.59}, "RTE": {"score": 0.2, "accuracy": 0.2}}

    def add(results):
        for task, found in constant.items():
            results["methods"]["majority"]["relations"][task]["constant"] = found

    change(run, add)
    [block] = superglue_table(joined(run)).blocks
    manual = next(line for line in block.lines if line.method == "manual")
    marked = {column for column in manual.values if block.no_better_than_constant(manual, column)}
    assert marked == {("MultiRC", "f1a")}
    constant |= {task: {"score": 0.4} for task in TASKS if task not in constant}
    change(run, add)
    [block] = superglue_table(joined(run)).blocks
    assert block.no_better_than_constant(manual, AVERAGE), "30 on average, where constant answers have 36"
