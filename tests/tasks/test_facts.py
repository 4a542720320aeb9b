import json
import re
from pathlib import Path

import pytest

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.tasks.lama.facts import load_data, read_vocabulary
from tests.conftest import write_facts

SHARED = Path(__file__).parents[3] / "shared" / "data" / "lama"


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


def test_a_mark_at_the_beginning_of_a_file_is_no_text(data_directory):
    """As Windows puts it there."""
    for path in (data_directory / "relations.jsonl", data_directory / "trex" / "test" / "P36.jsonl"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    (data_directory / "words.txt").write_text("Paris\nRome\n", encoding="utf-8-sig")
    assert load_data(str(data_directory)).relations["P36"].template == "The capital of [X] is [Y] ."
    assert read_vocabulary(data_directory / "words.txt") == ["Paris", "Rome"]


@pytest.mark.parametrize("key", ["label", "type"])
def test_labels_and_types_are_texts(data_directory, key):
    path = data_directory / "relations.jsonl"
    path.write_text(json.dumps({"relation": "P36", key: None}))
    relation = load_data(str(data_directory)).relations["P36"]
    assert (relation.label, relation.type) == ("P36", "")
    path.write_text(json.dumps({"relation": "P36", key: 5}))
    with pytest.raises(MegapromptError, match=f'relations.jsonl:1: "{key}" is not a text'):
        load_data(str(data_directory))


def test_half_of_a_character_is_named(data_directory):
    path = data_directory / "trex" / "test" / "P36.jsonl"
    path.write_text(
        '{"sub_label": "\\ud83d\\ude00", "obj_label": "Paris"}\n{"sub_label": "a", "obj_label": "\\ud800"}\n'
    )
    with pytest.raises(MegapromptError, match=r"P36.jsonl:2: has half of a character"):
        load_data(str(data_directory))


def test_relations_file_and_vocabulary(data_directory, caplog):
    (data_directory / "vocab").mkdir()
    (data_directory / "vocab" / "common.txt").write_text("Paris\n\nRome\n")
    data = load_data(str(data_directory))
    assert data.relations["P36"].template == "The capital of [X] is [Y] ."
    assert data.relations["P36"].type == "N-1"
    assert read_vocabulary(data.vocabulary) == ["Paris", "Rome"]
    (data_directory / "vocab" / "other.txt").write_text("Oslo\n")
    assert load_data(str(data_directory)).vocabulary is None, "two files: the user has to choose"
    assert "several vocabularies (common.txt, other.txt)" in caplog.text


@pytest.mark.parametrize(
    ("row", "template", "wordings"),
    [
        ({"template": "[X] : [Y]", "templates": ["[X] , [Y]", "[X] - [Y]"]}, "[X] : [Y]", ("[X] , [Y]", "[X] - [Y]")),
        ({"template": "[X] : [Y]", "templates": ["[X] : [Y]", "[X] , [Y]"]}, "[X] : [Y]", ("[X] , [Y]",)),
        ({"templates": ["[X] , [Y]", "[X] - [Y]", "[X] - [Y]"]}, "[X] , [Y]", ("[X] - [Y]",)),
        ({"templates": []}, None, ()),
        ({"template": None}, None, ()),
    ],
)
def test_several_wordings(data_directory, row, template, wordings):
    (data_directory / "relations.jsonl").write_text(json.dumps({"relation": "P36", **row}))
    relation = load_data(str(data_directory)).relations["P36"]
    assert (relation.template, relation.wordings) == (template, wordings)


@pytest.mark.parametrize("templates", ["[X] , [Y]", [3], {"a": "b"}, None])
def test_wordings_that_are_no_list_of_texts_name_file_and_line(data_directory, templates):
    path = data_directory / "relations.jsonl"
    path.write_text("\n" + json.dumps({"relation": "P36", "templates": templates}))
    with pytest.raises(MegapromptError, match=re.escape(f"{path}:2: ") + '"templates" is not a list of texts'):
        load_data(str(data_directory))


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
    with pytest.raises(UsageError, match=r"--data geonames: .*give world or a directory"):
        load_data("geonames")  # as the packaged data was called once
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
