"""The scores of one run in the terminal: what is best, gained, missing."""

from megaprompt.report.html import write_report
from megaprompt.report.tables import methods_in_order
from tests.report.made_up import Page, make_results, printed, printed_rows, write_run


def test_the_terminal_shows_the_numbers(results):
    lines = printed_rows(results)
    assert ["P36", "capital", "N-1", "40", "0.0", "53.8", "50.0", "−3.8"] in lines
    assert ["macro", "80", "12.5", "51.9", "56.3", "+4.4"] in lines
    assert ["micro", "80", "22.5", "61.9", "66.3", "+4.4"] in lines
    del results["methods"]["manual"]
    assert ["P36", "capital", "N-1", "40", "0.0", "50.0"] in printed_rows(results)
    assert "gain" not in printed(results)


def test_methods_stand_in_a_sensible_order():
    names = ("best", "p-tuning", "zzz", "lpaqa ensemble", "autoprompt", "in-context", "manual", "majority", "abc")
    assert methods_in_order((*names, "lpaqa best", "manual+fine-tuning", "best-manual")) == [
        "majority", "manual", "best-manual", "in-context", "lpaqa best", "lpaqa ensemble", "abc", "zzz", "autoprompt",
        "manual+fine-tuning", "p-tuning", "best",
    ]  # fmt: skip


def test_gains_are_those_of_the_lead(results):
    results["methods"]["best"] = results["methods"]["p-tuning"]
    results["methods"]["p-tuning"] = results["methods"]["majority"]
    assert ["P36", "capital", "N-1", "40", "0.0", "53.8", "0.0", "50.0", "−3.8"] in printed_rows(results)


def test_columns_and_averages_that_say_nothing_are_left_out(tmp_path):
    """As of SuperGLUE: tasks have no type and no label but their name, and a score that is no mean over examples."""
    metrics = {"score": "score", "accuracy": "accuracy", "em": "EM"}
    results = make_results({"majority": {"RTE": 0.5, "MultiRC": 0.1}, "manual": {"RTE": 0.5, "MultiRC": 0.25}}, metrics)
    for name, about in results["data"]["relations"].items():
        about |= {"label": name, "type": ""}
    rows = results["methods"]["manual"]["relations"]
    rows["RTE"]["em"] = rows["MultiRC"]["accuracy"] = None
    results["methods"]["manual"]["macro"] |= {"accuracy": 0.875, "em": 0.875}
    lines = printed_rows(results)
    assert ["MultiRC", "40", "10.0", "25.0"] in lines
    assert ["macro", "80", "30.0", "37.5"] in lines
    assert not any(line[:1] == ["micro"] or {"label", "type"} & {*line} for line in lines)
    page = Page(write_report(write_run(tmp_path, results)))
    assert page.rows(0) == {
        "relation": ["test facts", "majority", "manual"],
        "RTE": ["40", "50.0", "50.0"], "MultiRC": ["40", "10.0", "25.0"], "macro": ["80", "30.0", "37.5"],
    }  # fmt: skip
    more = page.rows(1)
    assert more["relation"] == ["method", "score, %", "accuracy, %", "EM, %", "score on dev, %", "template"]
    assert more["RTE"] == ["manual", "50.0", "87.5", "–", "87.5", "[X] [Y] ."]
    assert more["macro"] == ["manual", "37.5", "–", "–", "–", ""]  # of EM there is only MultiRC's
    assert page.rows(2)["RTE"] == ["31", "10", "40", "190", "0"]
    assert "micro" not in page.prose()


def test_a_label_that_repeats_the_name_is_said_once(results):
    results["data"]["relations"]["P30"]["label"] = "P30"
    assert ["P30", "N-1", "40", "25.0", "50.0", "62.5", "+12.5"] in printed_rows(results)
    assert ["P36", "capital", "N-1", "40", "0.0", "53.8", "50.0", "−3.8"] in printed_rows(results)
