import json
import re
from pathlib import Path

import pytest

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.tasks.lama.facts import SPLITS, Fact, load_data, read_vocabulary
from megaprompt.tasks.lama.geonames import geonames
from tests.conftest import write_facts

SHARED = Path(__file__).parents[3] / "shared" / "data" / "lama"


@pytest.fixture(scope="module")
def geo():
    return geonames()


def test_geonames_has_the_five_relations(geo):
    assert list(geo.relations) == ["P36", "P30", "P17", "P47", "P37"]
    facts = {name: {f for split in SPLITS for f in relation.facts[split]} for name, relation in geo.relations.items()}
    assert Fact("Denmark", "Copenhagen") in facts["P36"]
    assert Fact("Denmark", "Europe") in facts["P30"]
    assert Fact("Lyon", "France") in facts["P17"]
    assert {Fact("Denmark", "Germany"), Fact("France", "Spain"), Fact("Spain", "France")} <= facts["P47"]
    assert Fact("Denmark", "Danish") in facts["P37"]


def test_geonames_is_split_by_subject_without_duplicates(geo):
    for relation in geo.relations.values():
        everything = [fact for split in SPLITS for fact in relation.facts[split]]
        assert len(everything) == len(set(everything))
        subjects = [{fact.subject for fact in relation.facts[split]} for split in SPLITS]
        assert not subjects[0] & subjects[1]
        assert not subjects[0] & subjects[2]
        assert not subjects[1] & subjects[2]
        shares = [len(s) / sum(map(len, subjects)) for s in subjects]
        assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.08)


def test_a_subject_is_in_one_split_for_all_relations(geo):
    split_of: dict[str, str] = {}
    for relation in geo.relations.values():
        for split in SPLITS:
            for fact in relation.facts[split]:
                assert split_of.setdefault(fact.subject, split) == split


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("trex/dev/P36.jsonl", "dev"),
        ("TREx/P36.jsonl", "test"),
        ("P36/train.jsonl", "train"),
        ("fact-retrieval/original/P36/test.jsonl", "test"),
        ("autoprompt_data/P36/dev.jsonl", "dev"),
    ],
)
def test_layouts(tmp_path, file, split):
    write_facts(tmp_path / file, [("Peru", "Lima"), ("Japan", "Tokyo")])
    # What packing on a Mac leaves behind.
    hidden = file.replace("P36", "._P36")
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_bytes(b"\0\xff")
    assert list(load_data(str(tmp_path)).relations) == ["P36"]
    relation = load_data(str(tmp_path)).relations["P36"]
    assert relation.facts[split] == [("Peru", "Lima"), ("Japan", "Tokyo")]
    assert relation.template is None
    assert relation.label == "P36"


def test_relations_file_and_vocabulary(data_directory):
    (data_directory / "vocab").mkdir()
    (data_directory / "vocab" / "common.txt").write_text("Paris\n\nRome\n")
    data = load_data(str(data_directory))
    assert data.relations["P36"].template == "The capital of [X] is [Y] ."
    assert data.relations["P36"].type == "N-1"
    assert read_vocabulary(data.vocabulary) == ["Paris", "Rome"]
    (data_directory / "vocab" / "other.txt").write_text("Oslo\n")
    assert load_data(str(data_directory)).vocabulary is None, "two files: the user has to choose"


def test_vocabularies_as_p_tuning_published_them(tmp_path):
    path = tmp_path / "29k-vocab.json"
    path.write_text(json.dumps({"gpt2-xl": {"ĠRome": 5}, "bert-base-cased": {"Rome": 1, "##s": 2}}))
    assert read_vocabulary(path) == ["Rome"]
    path.write_text(json.dumps({"gpt2-xl": ["ĠRome", "ĠOslo"]}))
    assert read_vocabulary(path) == ["Rome", "Oslo"]
    for text in ("{", "[]", "{}", '{"gpt2-xl": 3}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="no tokens by model"):
            read_vocabulary(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"sub_label": "Peru"}', '"obj_label" is missing'),
        ('{"sub_label": 3, "obj_label": "x"}', '"sub_label" is missing or not text'),
    ],
)
def test_malformed_lines_name_file_and_line(data_directory, line, message):
    path = data_directory / "trex" / "dev" / "P36.jsonl"
    path.write_text(json.dumps({"sub_label": "a", "obj_label": "b"}) + "\n\n" + line + "\n")
    with pytest.raises(MegapromptError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(message)):
        load_data(str(data_directory))


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no such directory"):
        load_data(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="no facts found"):
        load_data(str(tmp_path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_vocabulary(tmp_path / "words.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the LAMA data is not part of the project")
def test_real_lama_data():
    data = load_data(str(SHARED))
    assert len(data.relations) == 33
    assert all(len(r.facts["test"]) > 100 and r.template for r in data.relations.values())
    assert data.relations["P103"].facts["train"]
