"""BEAR's layout, as it is and with mistakes."""

import json
from pathlib import Path

import pytest

from megaprompt.errors import MegapromptError
from megaprompt.tasks.lama.facts import SPLITS, Fact, load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks
from tests.tasks.bear_data import CAPITALS, MORE_CAPITALS, WORDINGS, write_bear

SHARED = Path(__file__).parents[3] / "shared" / "data" / "bear"


@pytest.fixture
def bear(tmp_path) -> Path:
    return write_bear(tmp_path / "bear")


def change_metadata(path: Path, relation: str, **changes) -> None:
    file = path / "metadata_relations.json"
    metadata = json.loads(file.read_text())
    metadata[relation] |= changes
    file.write_text(json.dumps(metadata))


def test_bears_facts_are_test_and_the_rest_is_train_and_dev(bear):
    data = load_data(str(bear))
    assert (data.name, list(data.relations), data.whole_answers) == ("bear", ["P36", "P30"], True)
    assert load_data(str(bear / "BEAR-big")).whole_answers  # which says nowhere what is to choose from
    relation = data.relations["P36"]
    assert [relation.template, *relation.wordings] == WORDINGS["P36"]
    assert relation.answers == tuple(CAPITALS.values())
    assert relation.facts["test"] == [Fact(*pair) for pair in CAPITALS.items()]
    assert sorted(relation.facts["train"] + relation.facts["dev"]) == sorted(Fact(*p) for p in MORE_CAPITALS.items())
    assert relation.facts["train"]
    assert relation.facts["dev"]
    assert load_data(str(bear)).relations == data.relations  # the same split each time


@pytest.mark.parametrize(("folder", "answers"), [("BEAR", len(CAPITALS)), ("BEAR-big", 0)])
def test_one_of_the_two_is_test_only(bear, folder, answers):
    data = load_data(str(bear / folder))
    assert data.name == folder
    assert len(data.relations["P36"].answers) == answers
    facts = data.relations["P36"].facts
    assert (len(facts["train"]), len(facts["dev"])) == (0, 0)
    assert len(facts["test"]) == len(CAPITALS) + (0 if answers else len(MORE_CAPITALS))


def test_what_is_missing_is_left_out_with_a_word(bear, caplog):
    (bear / "BEAR" / "P30.jsonl").unlink()
    with (bear / "BEAR-big" / "P36.jsonl").open("a") as file:
        file.write(json.dumps({"sub_id": "Q0", "sub_label": "", "obj_id": "Q1", "obj_label": "Rome"}) + "\n")
    data = load_data(str(bear))
    assert list(data.relations) == ["P36"]
    assert "relation P30 is left out" in caplog.text
    assert "P36.jsonl:21: is left out, since its subject has no name" in caplog.text
    assert sum(len(data.relations["P36"].facts[split]) for split in SPLITS) == len(CAPITALS) + len(MORE_CAPITALS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": []}, '"templates" of P36 is no list of texts; mend it'),
        ({"templates": [1]}, '"templates" of P36 is no list of texts; mend it'),
        ({"answer_space_labels": "Paris"}, '"answer_space_labels" of P36 is no list of texts; mend it'),
        ({"answer_space_labels": []}, "P36 has an empty answer space; list its answers"),
    ],
)
def test_malformed_metadata_is_told_when_it_is_read(bear, changes, message):
    change_metadata(bear / "BEAR", "P36", **changes)
    with pytest.raises(MegapromptError, match=message):
        load_data(str(bear))


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_metadata_that_is_no_object_of_relations(bear, text):
    (bear / "BEAR" / "metadata_relations.json").write_text(text)
    with pytest.raises(MegapromptError, match=r"metadata_relations.json: (cannot be read as JSON|expected an object)"):
        load_data(str(bear))


ALL = list(CAPITALS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_space_labels": ALL[1:]}, "answer space lacks 'Paris', the object of a fact; mend"),
        ({"answer_space_labels": [*ALL, "Rome"]}, "answer space has 'Rome' twice; mend"),
        (
            {"answer_space_labels": [*ALL, "Rome "]},
            "has 'Rome' and 'Rome ', which are the same tokens to",
        ),
        ({"templates": ["The capital is [Y]."]}, r"relation P36: template .* has 0 \[X\].*; mend the wording"),
        ({"templates": ["[X] is [Y].", "[X] is it."]}, r"relation P36: template .* has 0 \[Y\].*; mend the wording"),
    ],
)
def test_mistakes_of_a_relation_are_told_when_it_is_asked(bear, make_backbone, changes, message):
    change_metadata(bear / "BEAR", "P36", **changes)
    data, about = load_data(str(bear)), {"splits": ("test",), "limit": None, "seed": 0}
    with pytest.raises(MegapromptError, match=message):
        lama_tasks(data, make_backbone(), AskFor(), names=(), **about)
    assert list(lama_tasks(data, make_backbone(), AskFor(), names=("P30",), **about)) == ["P30"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs BEAR in ../shared/data")
def test_the_published_facts():
    data = load_data(str(SHARED))
    assert len(data.relations) == 48
    for name, relation in data.relations.items():
        assert 5 <= len(relation.answers) <= 60
        assert len(relation.wordings) == 2
        counts = dict.fromkeys(relation.answers, 0)
        for fact in relation.facts["test"]:
            counts[fact.object] += 1
        assert len(set(counts.values())) == 1, f"{name} is balanced"
        assert len(relation.facts["train"]) > 2 * len(relation.facts["dev"]) > 20
        if len(relation.answers) == 60:
            assert not {fact.object for fact in relation.facts["train"] + relation.facts["dev"]} & set(counts)
