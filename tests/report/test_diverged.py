"""Relations whose training diverged: marked, explained, and never averaged or compared as if nothing had happened."""

import json

import pytest

from megaprompt.report.charts import relations_chart, types_chart
from megaprompt.report.html import write_joint_report, write_report
from megaprompt.report.runs import read_run
from megaprompt.report.table2_formats import as_csv, latex, markdown
from megaprompt.report.tables import notes_of
from tests.report.made_up import (
    Page,
    change,
    compared,
    diverge,
    joined,
    make_results,
    markdown_rows,
    plain,
    printed,
    printed_rows,
    shown,
    write_predictions,
    write_run,
)

SCORES = {
    "manual": {"P36": 0.2, "P30": 0.4, "P17": 0.6},
    "p-tuning": {"P36": 0.5, "P30": 0.7, "P17": 0.9},
}


def test_a_relation_with_prompts_from_before_keeps_their_score(tmp_path):
    results = make_results(SCORES)
    diverge(results, "p-tuning", "P30", 0.3)
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["P30"][3:] == ["40.0", "30.0\u00a0‡", "−10.0"]
    assert page.rows(0)["macro"][3:] == ["40.0", "56.7", "+16.7"]
    assert (
        "‡ p-tuning: the training of P30 diverged at step 7 (the loss is nan); its score is that of the best on dev "
        "before." in page.prose()
    )
    assert "averages over" not in page.prose()


def test_averages_over_fewer_relations_say_so_and_are_not_compared(tmp_path):
    results = make_results(SCORES)
    diverge(results, "p-tuning", "P36", None)
    run = write_run(tmp_path, results)
    page = Page(write_report(run))
    assert page.rows(0)["P36"][3:] == ["20.0", "–\u00a0‡", "–"]
    assert page.rows(0)["macro"][3:] == ["40.0", "80.0\u00a0‡", "+30.0"]  # of P30 and P17
    assert page.bold(0)["macro"] == []
    assert "Over 2 relations, the mean P@1 of p-tuning on test is 80.0 %." in page.prose()
    assert notes_of(read_run(run).results) == [
        "‡ p-tuning: the training of P36 diverged at step 7 (the loss is nan); it has no score.",
        "‡ p-tuning: averages over 2 of 3 relations. The best is found among averages over the same relations; gains "
        "are over those that both have.",
    ]
    assert ["P36", "p36", "N-1", "40", "20.0", "–", "‡", "–"] in printed_rows(results)
    assert "over 2 of 3 relations" in plain(printed(results))


def test_as_many_relations_are_not_the_same_relations(tmp_path):
    results = make_results({"autoprompt": SCORES["manual"], **SCORES})
    diverge(results, "p-tuning", "P36", None)
    diverge(results, "autoprompt", "P17", None)
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0)["macro"][3:] == ["40.0", "30.0\u00a0‡", "80.0\u00a0‡", "+30.0"]
    assert page.bold(0)["macro"] == []


@pytest.fixture
def seeds(make_run):
    """Two seeds, the second of which lost P36."""
    runs = [make_run(f"s{seed}", SCORES, seed=seed) for seed in (0, 1)]
    change(runs[1], lambda results: diverge(results, "p-tuning", "P36", None))
    change(runs[1], lambda results: results["methods"]["p-tuning"]["relations"]["P30"].update(p_at_1=0.8))
    return runs


def test_seeds_are_averaged_over_the_relations_that_all_of_them_have(seeds, tmp_path):
    table = joined(*seeds)
    assert shown(table) == {
        "tiny": {"MP": "40.0", "P-tuning": "82.5 ± 3.5 ‡ (+32.5)"}
    }  # of (70 + 90) / 2 and (80 + 90) / 2
    assert table.rows[0].best() == set()
    assert f"‡ {seeds[1]}, p-tuning: the training of P36 diverged at step 7 (the loss is nan); it has no score." in (
        table.notes
    )
    assert any("tiny, p-tuning: averages over 2 of 3 relations" in note for note in table.notes)
    assert ["tiny", "40.0", "82.5 ± 3.5 ‡ (+32.5)"] in markdown_rows(markdown(table))
    assert r"82.5 $\pm$ 3.5 $^\ddagger$" in latex(table)
    assert "tiny,p-tuning,macro,82.5000,3.5355,2,2,80," in as_csv(table)
    page = Page(write_joint_report(table, tmp_path / "out"))
    assert page.rows(2)["P36"][-2:] == ["20.0", "–"]
    assert not {"nan", "None"} & set(page.prose().split())


def test_charts_leave_out_what_has_no_score(seeds):
    change(seeds[1], lambda results: results["data"]["relations"]["P36"].update(type="1-1"))
    change(seeds[0], lambda results: results["data"]["relations"]["P36"].update(type="1-1"))
    table = joined(*seeds)
    texts = [text.get_text() for text in types_chart(table).axes[0].texts]
    assert texts == ["20", "50", "40", "82", "82"]  # no number of p-tuning on 1-1
    relations_chart(table)


def test_a_method_that_lost_every_relation_is_left_out_and_said(make_run):
    run = make_run("a", SCORES)

    def lose(results):
        for name in SCORES["manual"]:
            row = results["methods"]["p-tuning"]["relations"][name]
            row |= {"p_at_1": None, "diverged": {"step": 1, "reason": "inf"}}

    change(run, lose)
    table = joined(run)
    assert shown(table) == {"tiny": {"MP": "40.0"}}
    assert sum("diverged at step 1 (inf)" in note for note in table.notes) == 3


def test_predictions_are_compared_where_both_have_them(seeds):
    for name in ("P36", "P30"):
        for run in seeds:
            lost = run is seeds[1] and name == "P36"
            write_predictions(run, name, {"manual": [2, 1], **({} if lost else {"p-tuning": [1, 1]})})
    table = joined(*seeds)
    (found,) = compared(table)
    (gap,) = found.differences
    assert (gap.points, gap.relations, gap.items) == (50.0, 1, 2)


def test_the_line_of_a_retired_relation_is_no_epoch(tmp_path):
    results = make_results(SCORES)
    diverge(results, "p-tuning", "P36", None)
    log = [{"relation": "P36", "diverged": "the loss is nan", "step": 7}]
    write_run(tmp_path, results, log)
    assert "learning_curves" not in write_report(tmp_path).read_text()
    assert not (tmp_path / "learning_curves.png").exists()
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 7
