"""What a page holds of the items of test, so that they can be searched."""

import json
import math
import re

import pytest

from megaprompt.report import browse
from megaprompt.report.browse import browsed, quotas
from megaprompt.report.html import write_joint_report, write_report
from megaprompt.report.predictions import Answer, Answers, read_answers
from tests.report.made_up import ACCURACY, Page, change, joined, make_results, write_predictions, write_run


def held(path):
    """The items of a page, each with rank, probability of the gold and answers by method."""
    [text] = re.findall(r'<script type="application/json" id="browse-data">(.*?)</script>', path.read_text(), re.S)
    data = json.loads(text)
    word = data["words"].__getitem__
    found = {}
    for i, relation in enumerate(data["group"]):
        answers = {}
        for method in data["methods"]:
            said = method["said"][i]
            pairs = list(zip(map(word, said[::2]), said[1::2], strict=True))
            answers[method["name"]] = (method["rank"][i], method["gold"][i], pairs)
        found[data["groups"][relation], word(data["input"][i]), word(data["gold"][i])] = answers
    return found


def write_lines(run, name, lines):
    (run / "predictions").mkdir(exist_ok=True)
    (run / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_holds_all_answers_of_all_methods(make_run):
    run = make_run("a", {"majority": {"P36": 0.1}, "manual": {"P36": 0.5}, "best": {"P36": 0.5}})
    top = [["Rome", 0.5], ["Lima", 0.25], ["</script><b>", 0.1], ["Kyiv", 0.0004], ["Oslo", 0.0], ["Bern", 0.0]]
    first = {"subject": "Peru", "object": "Lima", "rank": 2, "probability": 0.25, "top": top}
    second = {"subject": "Italy", "object": "Rome", "rank": None, "probability": None, "top": [["Rom", None]]}
    write_lines(
        run, "P36", [{"method": "manual", **first}, {"method": "manual", **second}, {"method": "best", **first}]
    )
    found = held(write_report(run))
    said = [("Rome", 500), ("Lima", 250), ("</script><b>", 100), ("Kyiv", 0), ("Oslo", 0)]
    assert found == {
        ("p36", "Peru", "Lima"): {"manual": (2, 250, said), "best": (2, 250, said)},
        ("p36", "Italy", "Rome"): {"manual": (0, -1, [("Rom", -1)]), "best": (-1, -1, [])},
    }
    page = Page(run / "report.html")
    assert "b" not in {tag for tag, _ in page.tags}
    assert "2 of" not in page.prose()
    chosen = [attrs["value"] for tag, attrs in page.tags if tag == "option" and "selected" in attrs]
    assert chosen == ["0", "1"]  # manual and best


def test_examples_say_whether_they_are_right(tmp_path):
    results = make_results({"manual": {"WSC": 0.5}}, ACCURACY, "examples")
    run = write_run(tmp_path, results)
    line = {"method": "manual", "input": "a | b", "gold": "True"}
    told = {"answer": "True", "right": True, "probability": 0.75}
    written = {"answer": "False", "right": False, "written": "the cat"}
    write_lines(run, "WSC", [line | told, line | {"input": "c"} | written])
    assert held(write_report(run)) == {
        ("wsc", "a | b", "True"): {"manual": (1, -1, [("True", 750)])},
        ("wsc", "c", "True"): {"manual": (0, -1, [("False (“the cat”)", -1)])},
    }


def test_several_backbones_stand_beside_each_other(answered, make_run, tmp_path):
    other = make_run("b", {"manual": {"P36": 0.1, "P30": 0.2}}, "gpt")
    write_predictions(other, "P36", {"manual": [1, 2]})
    found = held(write_joint_report(joined(answered, other), tmp_path / "out"))
    assert len(found) == 9
    ranks = {name: rank for name, (rank, *_) in found["p36", "s1", "o"].items()}
    assert ranks == {"tiny: manual": 1, "tiny: p-tuning": 1, "gpt: manual": 2}
    assert found["p30", "s0", "o"]["gpt: manual"] == (-1, -1, [])


def test_without_predictions_there_is_nothing_to_look_at(tmp_path, results):
    page = Page(write_report(write_run(tmp_path, results)))
    assert "browse" not in {attrs.get("id") for _, attrs in page.tags}


def test_what_does_not_fit_is_said(answered, monkeypatch):
    monkeypatch.setattr(browse, "MOST_BYTES", 3 * (40 + 2 * 55))  # three facts with two methods
    change(answered, lambda results: results["data"]["relations"]["P30"]["facts"].update(test=1))
    found = held(write_report(answered))
    assert list(found) == [("p36", "s0", "o"), ("p36", "s1", "o"), ("p30", "s0", "o")]
    told = "This page holds 3 of 9 facts, the first ones of each relation"
    assert told in Page(answered / "report.html").prose()
    assert "the files in predictions/ of the run have all" in Page(answered / "report.html").prose()


@pytest.fixture
def table_of(make_run):
    """A table with so many facts in test of each relation."""

    def made(counts, methods=4):
        run = make_run("a", {f"method {i}": dict.fromkeys(counts, 0.5) for i in range(methods)})

        def edit(results):
            for name, count in counts.items():
                results["data"]["relations"][name]["facts"]["test"] = count

        change(run, edit)
        return joined(run)

    return made


def test_a_million_facts_are_too_many_for_a_page(table_of):
    counts = {f"P{i}": 25_000 for i in range(39)} | {"P40": 10, "P41": 25_000}
    found = quotas(table_of(counts))
    assert found["P40"] >= 10
    shown = sum(min(counts[name], limit) for name, limit in found.items())
    assert 0.95 < shown * (40 + 4 * 55) / browse.MOST_BYTES <= 1
    assert len({found[name] for name in counts if name != "P40"}) <= 2  # as many of each


def test_thousands_of_facts_take_a_few_megabytes(table_of):
    """33 relations with 400 facts, each asked by four methods, whole."""
    names = [f"P{i}" for i in range(33)]
    table = table_of(dict.fromkeys(names, 400))
    assert min(quotas(table).values()) >= 400
    items = [(name, f"a subject with a name {name} {i}", f"object {i % 90}", 0) for name in names for i in range(400)]
    others = tuple((f"answer {i}", 0.0412) for i in range(4))
    answers = [
        Answer(f"object {i % 90}", 0.7312, i % 3 == 0, 1 + i % 3 * 77, 0.0123, others) for i in range(len(items))
    ]
    asked = Answers(items, {}, {f"method {i}": list(answers) for i in range(4)})
    found = browsed(table, [asked])
    assert found is not None
    assert found.held == found.asked == 33 * 400
    assert len(found.data.encode()) < 55 * 4 * 33 * 400 + 40 * 33 * 400 < 4_000_000


def test_other_answers_are_kept_of_so_many_facts(answered):
    asked = read_answers(joined(answered).rows[0], ["P36", "P30"], {"P36": 3})
    others = [len(answer.others) for answer in asked.first["manual"]]
    assert others == [0, 0, 1, 0, 0, 0, 0, 0, 0]  # s0 and s1 have one answer only
    assert [answer.rank for answer in asked.first["manual"]][:4] == [1, 1, 2, 2]
    assert math.isclose(asked.first["manual"][0].of_gold, 0.9)
