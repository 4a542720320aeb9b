"""Several runs joined: rows of backbones, means over seeds, what is kept apart and what is said."""

from pathlib import Path

import pytest

from megaprompt.errors import MegapromptError
from megaprompt.report.table2_formats import legend, lines_of
from tests.report.made_up import change, joined, shown


def test_backbones_and_methods_stand_as_in_the_paper(make_run):
    one = make_run("a", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}}, "bert")
    more = {"fine-tuning": {"P36": 0.4, "P30": 0.5}, "lpaqa": {"P36": 0.3, "P30": 0.3}}
    two = make_run("b", more, "bert", methods=("fine-tuning",))
    three = make_run("c", {"manual": {"P36": 0.1, "P30": 0.2}, "p-tuning": {"P36": 0.1, "P30": 0.1}}, "gpt")
    table = joined(one, two, three)
    over = "P-tuning over the best other"
    assert shown(table) == {
        "bert": {"MP": "30.0", "LPAQA": "30.0", "FT": "45.0", "P-tuning": "60.0 (+30.0)", over: "+15.0 (FT)"},
        "gpt": {"MP": "15.0", "LPAQA": "–", "FT": "–", "P-tuning": "10.0 (−5.0)", over: "−5.0 (MP)"},
    }
    _, lines = lines_of(table, "macro")
    assert [[cell.text for cell in line if cell.best] for line in lines] == [["60.0 (+30.0)"], ["15.0"]]
    assert list(table.relations) == ["P36", "P30"]
    assert not table.notes


def test_what_is_chosen_on_dev_stands_in_the_table(make_run):
    scores = {"best": 0.7, "manual": 0.2, "in-context": 0.4, "p-tuning": 0.5, "best-manual": 0.3, "majority": 0.1}
    table = joined(make_run("a", {method: {"P36": score} for method, score in scores.items()}, candidates=3))
    assert shown(table)["tiny"] == {
        "majority": "10.0", "MP": "20.0", "best MP": "30.0", "in-context": "40.0", "P-tuning": "50.0 (+30.0)",
        "best": "70.0 (+50.0)", "best over the best other": "+20.0 (P-tuning)",
    }  # fmt: skip
    assert "In brackets: P-tuning and best over MP, in points." in legend(table)
    assert "best MP: of several manual prompts the best on dev" in legend(table)[0]


@pytest.mark.parametrize(
    ("option", "values", "rows"),
    [
        ("candidates", (2, 3), {"tiny (candidates 2)": ["best"], "tiny (candidates 3)": ["best"]}),
        ("wordings", (Path("a"), Path("b")), {"tiny (wordings a)": ["best"], "tiny (wordings b)": ["best"]}),
    ],
)
def test_another_choice_is_no_other_seed(make_run, option, values, rows):
    runs = [
        make_run(f"s{seed}", {"best": {"P36": 0.5}}, seed=seed, methods=("best",), **{option: value})
        for seed, value in enumerate(values)
    ]
    assert {row.name: list(row.cells) for row in joined(*runs).rows} == rows


def test_other_facts_are_no_other_seed(make_run):
    def rows(**options):
        runs = [make_run(f"{len(options)}{i}", {"manual": {"P36": 0.5}}, data_seed=i, **options) for i in (0, 1)]
        return [row.name for row in joined(*runs).rows]

    assert rows() == ["tiny"]  # all facts
    assert rows(limit_facts=10) == ["tiny (data-seed 0)", "tiny (data-seed 1)"]


def test_runs_on_other_facts_are_no_other_seed(make_run):
    """Whatever made them others; the results tell what was asked."""
    runs = [make_run(f"{i}", {"manual": {"P36": 0.5, "P30": 0.5}}, seed=i) for i in range(3)]
    for i, run in enumerate(runs):
        change(run, lambda results, i=i: results["data"]["relations"]["P36"].update(sha256=f"{i // 2}"))
        change(run, lambda results: results["data"]["relations"]["P30"].update(sha256="same"))
    table = joined(*runs)
    assert [len(row.cells["manual"].runs) for row in table.rows] == [2, 1]
    assert all(row.name.startswith("tiny (examples ") for row in table.rows)
    change(runs[2], lambda results: results["data"]["relations"].pop("P36"))  # then the others are over P30 alone
    assert [row.name for row in joined(*runs).rows] == ["tiny"]


def test_micro_counts_facts(make_run):
    run = make_run("a", {"manual": {"P36": 0.5, "P30": 1.0}})
    change(run, lambda results: results["methods"]["manual"]["relations"]["P30"].update(facts=120))
    assert shown(joined(run))["tiny"] == {"MP": "75.0"}
    assert shown(joined(run), "micro")["tiny"] == {"MP": "87.5"}  # (40 * 0.5 + 120) / 160


def test_seeds_are_averaged(make_run):
    runs = [
        make_run(f"s{seed}", {"manual": {"P36": 0.25}, "p-tuning": {"P36": score}}, seed=seed)
        for seed, score in enumerate((0.5, 0.6, 0.4))
    ]
    table = joined(*runs)
    assert shown(table) == {"tiny": {"MP": "25.0", "P-tuning": "50.0 ± 10.0 (+25.0)"}}  # not the 8.2 of a population
    assert "±: standard deviation over 3 seeds." in legend(table)
    again = joined(*runs, runs[0])  # the same seed once more is no further evidence
    assert len(again.rows[0].cells["p-tuning"].runs) == 3
    assert shown(joined(runs[0])) == {"tiny": {"MP": "25.0", "P-tuning": "50.0 (+25.0)"}}


def test_another_run_with_the_same_seed_is_left_out_and_that_is_said(make_run):
    a = make_run("a", {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}, seed=3)
    b = make_run("b", {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.9}}, seed=3)
    table = joined(a, b)
    assert shown(table) == {"tiny": {"MP": "25.0", "P-tuning": "50.0 (+25.0)"}}
    [note] = [note for note in table.notes if "seed" in note]
    assert note == f"tiny, p-tuning: left out of {b}, which has the seed of {a}."


def test_wordings_are_averaged_over_the_relations_of_the_table(make_run):
    columns = ("manual", "wording 2", "wording 3")
    a = make_run("a", {name: {"P36": p, "P30": 0.0} for name, p in zip(columns, (0.1, 0.2, 0.3), strict=True)})
    b = make_run("b", {"manual": {"P36": 0.5}}, limit_facts=10)
    [sentence] = [text for text in legend(joined(a, b)) if "standard error" in text]
    assert "20.0 ± 5.8" in sentence  # of P36 alone


def test_few_facts_are_told_of_each_row(make_run):
    runs = [make_run(name, {"p-tuning": {"P36": 0.5, "P30": 0.5}}, limit_facts=n) for name, n in (("a", 9), ("b", 8))]
    for run in runs:
        change(run, lambda results: results.update(few=64, selects=["p_at_1", "mrr"]))
        change(run, lambda results: results["data"]["relations"]["P36"]["facts"].update(dev=10))
    notes = [note for note in joined(*runs).notes if "little to choose" in note]
    assert [note.split(":")[0] for note in notes] == ["tiny (limit-facts 9)", "tiny (limit-facts 8)"]
    assert not any("§" in note for note in joined(*runs).notes)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(make_run):
    scores = {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}
    a = make_run("a", scores, seed=0)
    b = make_run("b", scores, seed=1, encoder="mlp", row_tokens=64)
    c = make_run("c", {"fine-tuning": {"P36": 0.5}}, seed=0, max_epochs=3)  # of another method: in the row of a
    d = make_run("d", {"manual": {"P36": 0.5}}, seed=0, limit_facts=10)  # other facts
    table = joined(a, b, c, d)
    assert [row.name for row in table.rows] == [
        "tiny (limit-facts not given, encoder lstm)", "tiny (limit-facts not given, encoder mlp)",
        "tiny (limit-facts 10)",
    ]  # fmt: skip
    assert [list(row.cells) for row in table.rows] == [
        ["manual", "fine-tuning", "p-tuning"], ["manual", "p-tuning"], ["manual"]
    ]  # fmt: skip


def test_settings_of_other_methods_do_not_keep_seeds_apart(make_run):
    scores = {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}
    one = make_run("a", scores | {"lpaqa": {"P36": 0.3}}, seed=0, discrete=("lpaqa=mined",))
    two = make_run("b", scores, seed=1, fine_tuning_rate=1e-5)
    assert shown(joined(one, two)) == {"tiny": {"MP": "25.0", "LPAQA": "30.0", "P-tuning": "50.0 (+25.0)"} | {
        "P-tuning over the best other": "+20.0 (LPAQA)"
    }}  # fmt: skip
    assert len(joined(one, two).rows[0].cells["p-tuning"].runs) == 2


def test_no_run_is_lost_behind_one_that_learns_something_else(make_run):
    first = make_run("a", {"fine-tuning": {"P36": 0.4}}, methods=("fine-tuning",))  # --encoder is lstm, but not used
    runs = [make_run(kind, {"p-tuning": {"P36": p}}, encoder=kind) for kind, p in (("mlp", 0.1), ("lstm", 0.9))]
    found = {row.name: {m: cell.mean()[0] for m, cell in row.cells.items()} for row in joined(first, *runs).rows}
    assert found == {
        "tiny (encoder mlp)": {"fine-tuning": 40.0, "p-tuning": 10.0}, "tiny (encoder lstm)": {"p-tuning": 90.0}
    }  # fmt: skip


def test_seeds_in_another_precision_are_not_averaged(make_run):
    """Neither --dtype, which is not given, nor the DeepSpeed configuration says what it was."""
    scores = {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}
    runs = [make_run(f"s{seed}", scores, seed=seed, deepspeed=Path("zero3.json")) for seed in (0, 1, 2)]
    change(runs[2], lambda results: results["backbone"].update(dtype="bfloat16"))
    assert {row.name: len(row.cells["p-tuning"].runs) for row in joined(*runs).rows} == {
        "tiny (dtype float32)": 2, "tiny (dtype bfloat16)": 1
    }  # fmt: skip


def test_precision_said_or_by_default_is_the_same(make_run):
    scores = {"p-tuning": {"P36": 0.5}, "fine-tuning": {"P36": 0.5}}
    runs = [make_run(f"s{seed}", scores, seed=seed, dtype=dtype) for seed, dtype in enumerate((None, "float32"))]
    (row,) = joined(*runs).rows
    assert {method: len(cell.runs) for method, cell in row.cells.items()} == {"fine-tuning": 2, "p-tuning": 2}


def test_weights_fine_tuned_in_another_precision_are_not_averaged(make_run):
    """Beside a backbone in bfloat16 they are float32 without DeepSpeed, bfloat16 with it."""
    runs = [
        make_run(f"s{seed}", {"fine-tuning": {"P36": 0.5}}, seed=seed, deepspeed=deepspeed)
        for seed, deepspeed in enumerate((None, Path("zero3_bf16.json")))
    ]
    for run in runs:
        change(run, lambda results: results["backbone"].update(dtype="bfloat16"))
    assert [row.name for row in joined(*runs).rows] == ["tiny (dtype float32)", "tiny (dtype bfloat16)"]


def test_prompts_of_another_file_are_not_averaged(make_run):
    runs = [
        make_run(path, {"lpaqa": {"P36": p}}, seed=seed, methods=("manual",), discrete=(f"lpaqa={path}",))
        for seed, (path, p) in enumerate((("mined", 0.3), ("paraphrase", 0.9)))
    ]
    assert shown(joined(*runs)) == {
        "tiny (lpaqa mined)": {"LPAQA": "30.0"}, "tiny (lpaqa paraphrase)": {"LPAQA": "90.0"}
    }  # fmt: skip


def test_a_configuration_of_an_older_version_has_the_defaults(make_run):
    runs = [make_run(f"s{seed}", {"p-tuning": {"P36": 0.5}}, seed=seed) for seed in (0, 1)]
    file = runs[0] / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("discrete:", "init:", "limit_facts:"))]
    assert len(kept) == len(lines) - 3
    file.write_text("".join(kept))
    (row,) = joined(*runs).rows
    assert (row.name, len(row.cells["p-tuning"].runs)) == ("tiny", 2)


def test_other_weights_or_no_configuration_make_other_rows(make_run):
    runs = [make_run(name, {"manual": {"P36": 0.25}}) for name in "abc"]
    change(runs[1], lambda results: results["backbone"].update(fingerprint="other"))
    (runs[2] / "config.yaml").unlink()
    change(runs[2], lambda results: results["methods"].update({"p-tuning": results["methods"]["manual"]}))
    change(runs[0], lambda results: results["methods"].update({"p-tuning": results["methods"]["manual"]}))
    names = [row.name for row in joined(*runs).rows]
    assert len(names) == len(set(names)) == 3
    assert "weights ab12" in names[0]
    assert "weights other" in names[1]


def test_only_relations_of_all_runs_count(make_run, tmp_path):
    one = make_run("a", {"manual": {"P36": 0.2, "P30": 0.8, "P47": 1.0}})
    two = make_run("b", {"manual": {"P36": 0.4, "P47": 0.6}}, "gpt")
    change(two, lambda results: results["data"]["relations"]["P47"]["facts"].update(test=0))
    table = joined(one, two)
    assert {name: cells["MP"] for name, cells in shown(table).items()} == {"tiny": "20.0", "gpt": "40.0"}
    assert "Over the 1 relation of all runs. Left out: 2 relations (P30, P47)." in table.notes[0]
    other = make_run("c", {"manual": {"P17": 0.4}}, "gpt")
    with pytest.raises(MegapromptError, match="no relation in common"):
        joined(one, other)


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_missing_scores_are_dashes_and_said(make_run, bad):
    run = make_run("a", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}})

    def damage(results):
        results["methods"]["p-tuning"]["relations"]["P30"]["p_at_1"] = bad
        results["methods"]["majority"] = {"relations": {}}
        results["methods"]["lpaqa"] = None
        results["complete"] = False

    change(run, damage)
    table = joined(run)
    assert shown(table) == {"tiny": {"MP": "30.0"}}
    assert any("p-tuning" in note and "no score of P30" in note for note in table.notes)
    assert any("not complete" in note for note in table.notes)
    whole = make_run("b", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}}, seed=1)
    assert len(joined(run, whole).rows[0].cells["p-tuning"].runs) == 1


@pytest.mark.parametrize("what", ["data", "vocabulary"])
def test_runs_on_other_data_are_refused(make_run, what):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]

    def other(results):
        if what == "data":
            results["data"]["name"] = "other"
        else:
            results["data"]["vocabulary"]["name"] = "other"

    change(runs[1], other)
    with pytest.raises(MegapromptError, match=f"its {what} is other"):
        joined(*runs)


def test_other_facts_are_said(make_run):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]
    change(runs[1], lambda results: results["methods"]["manual"]["relations"]["P36"].update(facts=39))
    assert any("a 40, b 39" in note for note in joined(*runs).notes)
