"""Runs over parts of the relations that are put together: only what was set up alike, whatever version wrote it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megaprompt.config import ProbeConfig, SuperGlueConfig, from_yaml, to_yaml
from megaprompt.errors import MegapromptError
from megaprompt.run.merge import merge_runs
from megaprompt.run.saved_prompts import SavedPrompt, load_prompts, prompt_file
from tests.report.made_up import change, diverge, make_results, write_run

FORMAT_1 = Path(__file__).parents[1] / "report" / "format_1"


@pytest.fixture
def part(tmp_path):
    """Write the run over one relation: `part("P36", seed=1)`; options go into its config.yaml."""

    def make(relation: str, score: float = 0.5, **options) -> Path:
        path = tmp_path / relation
        path.mkdir()
        write_run(path, make_results({"manual": {relation: score}, "p-tuning": {relation: score}}), [])
        (path / "config.yaml").write_text(to_yaml(ProbeConfig(backbone="tiny", out=path, **options)))
        return path

    return make


@pytest.mark.parametrize(
    ("option", "values", "said"),
    [
        ("seed", (0, 1), "--seed 1, {} has --seed 0"),
        ("template", (None, "<2>[X][Y]"), "--template <2>[X][Y], {} has --template (not given)"),
        ("learning_rate", (0.01, 0.02), "--learning-rate 0.02, {} has --learning-rate 0.01"),
        ("discrete", ((), ("a=b", "c=d")), "--discrete a=b,c=d, {} has --discrete "),
        ("dtype", (None, "float32"), "--dtype float32, {} has --dtype (not given)"),
    ],
)
def test_unlike_options_are_refused(part, tmp_path, option, values, said):
    first, second = (part(name, **{option: value}) for name, value in zip(("P30", "P36"), values, strict=True))
    with pytest.raises(MegapromptError) as caught:
        merge_runs([first, second], tmp_path / "all")
    assert str(caught.value) == f"{second}: has {said.format(first)}; merge only what is alike"
    assert not (tmp_path / "all").exists()


def test_options_that_change_no_results_may_differ(part, tmp_path):
    first = part("P30", relations=("P30",), row_tokens=64, pass_tokens=64)
    second = part("P36", relations=("P36",), relation_groups=2, deepspeed=Path("zero3.json"))
    merged = merge_runs([first, second], tmp_path / "all")
    assert list(merged["methods"]["manual"]["relations"]) == ["P30", "P36"]
    config = from_yaml(ProbeConfig, tmp_path / "all" / "config.yaml")
    assert (config.relations, config.out) == (("P30", "P36"), tmp_path / "all")


def test_prompts_of_every_method_are_put_together(part, tmp_path):
    parts = [part("P30"), part("P36")]
    for run in parts:
        for method in ("p-tuning", "best", "in-context", "best-manual", "manual"):
            vectors, about = torch.ones(1, 4), {"relation": run.name, "method": method, "data": "d", "backbone": "b"}
            prompt = SavedPrompt(vectors=vectors, template="[X] [Y]", fingerprint="f", **about)
            prompt.save(prompt_file(run, method, run.name))
    merge_runs(parts, tmp_path / "all")
    for method in ("p-tuning", "best", "in-context", "best-manual", "manual"):
        prompts = load_prompts(tmp_path / "all", method)
        assert {name: prompt.method for name, prompt in prompts.items()} == {"P30": method, "P36": method}


def test_other_precision_is_refused(part, tmp_path):
    first, second = part("P30"), part("P36", deepspeed=Path("zero3_bf16.json"))
    change(second, lambda results: results["backbone"].update(dtype="bfloat16"))
    with pytest.raises(MegapromptError, match=r"its backbone is not that of .* \(dtype bfloat16, not float32\)"):
        merge_runs([first, second], tmp_path / "all")


def test_other_metrics_are_refused(part, tmp_path):
    first, second = part("P30"), part("P36")
    change(second, lambda results: results.update(metrics={"accuracy": "accuracy"}))
    with pytest.raises(MegapromptError, match=r"its score is not that of .* \(name accuracy, not p_at_1\)"):
        merge_runs([first, second], tmp_path / "all")


def test_an_option_of_a_later_version_has_its_default(part, tmp_path):
    first, second = part("P30"), part("P36")
    file = first / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("init:")))
    assert merge_runs([first, second], tmp_path / "all")["complete"]


def test_averages_are_over_the_relations_that_did_not_diverge(part, tmp_path):
    parts = [part(name, score) for name, score in (("P17", 0.5), ("P30", 0.7), ("P36", 0.9))]
    change(parts[2], lambda results: results["methods"]["p-tuning"]["relations"]["P36"].update(p_at_1=None))
    change(parts[1], lambda results: diverge(results, "p-tuning", "P30", 0.1))
    macro = {name: method["macro"] for name, method in merge_runs(parts, tmp_path / "all")["methods"].items()}
    assert (macro["manual"]["p_at_1"], macro["manual"]["relations"]) == (pytest.approx(0.7), 3)
    assert (macro["p-tuning"]["p_at_1"], macro["p-tuning"]["relations"]) == (pytest.approx(0.3), 2)


def test_parts_of_both_versions_make_one_run(tmp_path):
    """One run of the version before, cut in two; one half was written again by this version."""
    whole = json.loads((FORMAT_1 / "results.json").read_text())
    parts = []
    for name, other in (("P30", "P36"), ("P36", "P30")):
        run = Path(shutil.copytree(FORMAT_1, tmp_path / name))
        (run / "predictions" / f"{other}.jsonl").unlink()
        kept = [line for line in (run / "log.jsonl").read_text().splitlines(True) if other not in line]
        (run / "log.jsonl").write_text("".join(kept))

        def cut(results, other=other):
            del results["data"]["relations"][other]
            for method in results["methods"].values():
                del method["relations"][other]

        change(run, cut)
        parts.append(run)
    new = {"schema": 2, "metrics": {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR"}, "items": "facts"}
    change(parts[1], lambda results: [results.pop("format"), results.update(new)])
    merged = merge_runs(parts, tmp_path / "all")
    assert merged["schema"] == 2
    assert "format" not in merged
    assert merged["data"] == whole["data"]
    for name, method in whole["methods"].items():
        assert merged["methods"][name]["relations"] == method["relations"]
        assert merged["methods"][name]["macro"] == method["macro"] | {"relations": 2}
    assert (tmp_path / "all" / "log.jsonl").read_text() == (FORMAT_1 / "log.jsonl").read_text()


def test_tasks_with_metrics_of_their_own_are_put_together(tmp_path):
    rows = {"CB": {"score": 0.5, "macro_f1": 0.25}, "RTE": {"score": 0.75}}
    for name, row in rows.items():
        path = tmp_path / name
        path.mkdir()
        results = make_results({"manual": {name: 0.0}})
        results["metrics"] = dict.fromkeys(row, "heading")
        results["methods"]["manual"]["relations"][name] |= row
        write_run(path, results, [])
        options = SuperGlueConfig(backbone="tiny", data="data", out=path, tasks=(name.lower(),))
        (path / "config.yaml").write_text(to_yaml(options))
    merged = merge_runs([tmp_path / name for name in rows], tmp_path / "all")
    assert merged["metrics"] == {"score": "heading", "macro_f1": "heading"}
    assert merged["methods"]["manual"]["macro"]["score"] == pytest.approx(0.625)
    assert merged["methods"]["manual"]["macro"]["macro_f1"] == pytest.approx(0.25)
    assert from_yaml(SuperGlueConfig, tmp_path / "all" / "config.yaml").tasks == ("CB", "RTE")
