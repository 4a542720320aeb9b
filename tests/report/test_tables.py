"""The scores of one run in the terminal: what is best, gained, missing."""

from megaprompt.report.tables import methods_in_order
from tests.report.made_up import printed, printed_rows


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
