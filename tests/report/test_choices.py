"""What was tried and chosen on dev: by method, with the spread over wordings, and where there were few facts."""

import pytest

from megaprompt.report.choices import candidate_in_words, choices_of
from megaprompt.report.html import write_report
from tests.report.made_up import Page, joined, log_line, make_results, printed, write_run


@pytest.fixture
def chosen() -> dict:
    """P36 with three wordings, and everything that `best` chooses from; P30 with nothing but its majority."""
    methods = ("majority", "manual", "best-manual", "in-context", "p-tuning", "best")
    results = make_results({method: {"P36": 0.5, "P30": 0.25} for method in methods}, P36="capital")
    results |= {"selects": ["p_at_1", "mrr"], "few": 64}
    rows = {method: results["methods"][method]["relations"]["P36"] for method in methods}

    def scores(p_at_1, mrr=0.5):
        return {"p_at_1": p_at_1, "p_at_10": 0.75, "mrr": mrr}

    rows["best-manual"]["tried"] = [
        {"template": text, "dev_examples": dev, **scores(p), "test_p_at_1": test}
        for text, dev, p, test in (("[X] <b> [Y]", 10, 0.5, 0.4), ("[X]: [Y]", 10, 0.3, 0.6), ("[Y]", 5, 0.0, 0.2))
    ]
    rows["in-context"]["tried"] = [
        {"demonstrations": 4, "draw": 1, "dev_examples": 10, **scores(0.6)},
        {"demonstrations": 0, "draw": None, "dev_examples": 5, **scores(0.2)},
    ]
    rows["best"] |= {
        "chosen": "anchors-behind-4",
        "tried": [
            {"name": "manual", **scores(0.5), "dropped_after": None},
            {"name": "paper", "p_at_1": 0.4, "mrr": 0.625, "dropped_after": None},
            {"name": "anchors-behind-4", "p_at_1": 0.7, "mrr": 0.875, "dropped_after": None},
            {"name": "anchors", "p_at_1": 0.1, "mrr": 0.25, "dropped_after": 40},
        ],
    }
    return results


def test_what_was_chosen_stands_beside_what_was_tried(tmp_path, chosen):
    page = Page(write_report(write_run(tmp_path, chosen)))
    (table,) = [i for i, rows in enumerate(page.tables) if rows[0][-1][0] == "chosen by"]
    assert page.rows(table) == {
        "relation": ["label", "best-manual", "in-context", "best", "chosen by"],
        "P36\u00a0§": [
            "capital", "[X] <b> [Y]", "4 demonstrations, draw 2",
            "learned vectors among manual words, behind 4 demonstrations",
            "MRR on 10 dev facts",
        ],
    }  # fmt: skip
    tried = [[text for text, _ in row] for row in page.tables[table + 2]]
    assert tried[0] == ["method", "tried", "P@1 on dev, %", "P@10 on dev, %", "MRR on dev", "dev facts", "dropped"]
    assert ["in-context", "4 demonstrations, draw 2", "60.0", "75.0", "0.500", "10", "–"] in tried
    assert ["", "no demonstrations", "20.0", "75.0", "0.500", "5", "–"] in tried
    assert ["", "learned vectors among manual words", "10.0", "–", "0.250", "10", "after step 40"] in tried
    assert len(tried) == 1 + 3 + 2 + 4
    bold = [text for row in page.tables[table + 2] for text, kind in row if "best" in kind.split()]
    assert bold == [
        "[X] <b> [Y]",
        "4 demonstrations, draw 2",
        "learned vectors among manual words, behind 4 demonstrations",
    ]
    assert [tag for tag, _ in page.tags].count("details") == 1
    assert "b" not in {tag for tag, _ in page.tags}


def test_each_wording_has_its_own_score_and_their_spread(tmp_path, chosen):
    page = Page(write_report(write_run(tmp_path, chosen)))
    (table,) = [i for i, rows in enumerate(page.tables) if rows[0][1][0] == "wording"]
    assert [[text for text, _ in row] for row in page.tables[table][1:]] == [
        ["P36", "[X] <b> [Y]", "50.0", "40.0", "40.0 ± 20.0 (20.0 to 60.0)"],
        ["", "[X]: [Y]", "30.0", "60.0", ""],
        ["", "[Y]", "0.0", "20.0", ""],
    ]
    row = chosen["methods"]["best-manual"]["relations"]["P36"]
    row["tried"] = row["tried"][:1]
    (choice,) = choices_of(chosen)
    assert (choice.wordings, choice.spread) == ([], "–")  # one wording has no spread


def test_few_facts_are_marked_and_said(tmp_path, chosen, make_run):
    facts = chosen["data"]["relations"]
    facts["P30"]["facts"] = {"train": 1000, "dev": 64, "test": 40}
    page = Page(write_report(write_run(tmp_path, chosen)))
    assert list(page.rows(0)) == ["relation", "P36 §", "P30", "macro", "micro"]
    said = (
        "§ Fewer than 64 facts in train or dev: P36 (31 and 10). On so few in dev MRR chooses, not P@1; best is chosen "
        "by cross-validation over train and dev."
    )
    assert said in page.prose()
    assert said in " ".join(printed(chosen, width=200).split())
    few = "tiny: 1 of 2 relations with fewer than 64 facts in train or dev, little to choose with."
    assert few in joined(tmp_path).notes
    facts["P36"]["facts"] = {"train": 31, "dev": 64, "test": 40}
    (choice,) = choices_of(chosen)
    assert (choice.few, choice.by) == (True, "P@1")
    assert "chooses, not" not in Page(write_report(write_run(tmp_path, chosen))).prose()
    only = make_results({"manual": {"P36": 0.5}}) | {"selects": ["p_at_1", "mrr"], "few": 64}
    assert "§" not in Page(write_report(write_run(tmp_path, only))).prose()  # nothing is chosen


def test_a_run_that_chose_nothing_has_no_such_section(tmp_path, results):
    assert choices_of(results) == []
    assert "What was tried" not in Page(write_report(write_run(tmp_path, results))).prose()


def test_candidates_in_words():
    assert candidate_in_words("paper") == "p-tuning"
    assert candidate_in_words("paper-behind-1") == "p-tuning, behind 1 demonstration"
    assert candidate_in_words("best-manual") == "best-manual"
    assert candidate_in_words("paper-slower") == "p-tuning and with a lower learning rate"


def test_curves_are_those_of_p_tuning_alone(tmp_path, results, monkeypatch):
    from megaprompt.report import html

    seen, chart = [], html.learning_chart
    monkeypatch.setattr(html, "learning_chart", lambda r, log: seen.extend(log) or chart(r, log))
    lines = [log_line("P36", 1, 0.25), log_line("P36", 1, 0.5) | {"candidate": "anchors"}]
    write_report(write_run(tmp_path, results, lines))
    assert seen == lines[:1]
