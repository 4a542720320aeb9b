"""SuperGLUE's files: what becomes of rows, splits, and mistakes; and the real files where they are."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.reading import read_superglue
from tests.tasks.superglue.made_up import ROWS, write_rows, write_superglue

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def root(tmp_path):
    return write_superglue(tmp_path / "data")


def change(path: Path, line: int, **values: object) -> None:
    """Change fields of a line, counted from 1; None takes a field away."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line - 1] = {k: v for k, v in {**rows[line - 1], **values}.items() if v is not None}
    write_rows(path, rows)


def test_each_task_in_its_fields(root):
    found = read_superglue(root, "few-shot")
    assert list(found) == list(KINDS)
    first = {name: data.examples["train"][0] for name, data in found.items()}
    assert first["BoolQ"].fields == {"passage": "The cat is old .", "question": "is the cat old"}
    assert (first["BoolQ"].answer, first["BoolQ"].gold) == ("True", 1)
    assert (first["CB"].answer, first["CB"].gold, first["CB"].key) == ("entailment", 0, (0,))
    assert first["COPA"].candidates == ("it was old", "a dog came in"), "in lower case, without a full stop"
    assert first["COPA"].fields["because/so"] == first["COPA"].fields["because/, so"] == "because"
    assert first["MultiRC"].fields["answer"] == "cat"
    assert (first["MultiRC"].group, first["MultiRC"].key) == ("0/0", (0, 0, 0))
    assert first["WSC"].fields["text"] == "The cat ran *it* was old ."
    assert first["WSC"].given == "The cat"
    assert all(set(kind.fields) <= set(first[name].fields) for name, kind in KINDS.items())


def test_copa_is_learned_from_both_orders(root):
    data = read_superglue(root, "few-shot", ["COPA"])["COPA"]
    assert {split: len(examples) for split, examples in data.examples.items()} == {"train": 12, "dev": 6, "test": 6}
    one, other = data.examples["train"][:2]
    assert (one.fields["choice1"], one.candidates) == (other.fields["choice2"], other.candidates[::-1])
    assert one.candidates[one.gold] == other.candidates[other.gold]
    assert one.answer != other.answer


def test_the_effect_is_asked_for_with_so(root):
    data = read_superglue(root, "few-shot", ["COPA"])["COPA"]
    assert [example.fields["because/, so"] for example in data.examples["dev"][:2]] == [", so", "because"]


def test_a_pronoun_one_word_off_or_with_a_comma_is_found(root):
    path = root / "WSC" / "train.jsonl"
    target = {"span1_text": "The cat", "span1_index": 0, "span2_text": "it", "span2_index": 4}
    change(path, 1, target=target)
    change(path, 2, text="The cat ran it, was old .", target={**target, "span2_index": 3})
    change(path, 3, text="The cat's ran was it .", target={**target, "span2_index": 4, "span1_text": "The cat"})
    texts = [each.fields["text"] for each in read_superglue(root, "few-shot", ["WSC"])["WSC"].examples["train"]]
    assert texts[:3] == ["The cat ran *it* was old .", "The cat ran *it* , was old .", "The cat's ran was *it* ."]


def test_full_training_data_keep_a_tenth_to_choose_on(root):
    write_rows(root / "RTE" / "train.jsonl", [{"idx": i, **ROWS["RTE"](i)} for i in range(40)])
    (root / "RTE" / "dev32.jsonl").unlink()
    examples = read_superglue(root, "full", ["RTE"], seed=1)["RTE"].examples
    assert {split: len(each) for split, each in examples.items()} == {"train": 36, "dev": 4, "test": 6}
    assert {each.key for split in ("train", "dev") for each in examples[split]} == {(i,) for i in range(40)}
    assert examples == read_superglue(root, "full", ["RTE"], seed=1)["RTE"].examples
    assert examples != read_superglue(root, "full", ["RTE"], seed=2)["RTE"].examples


def test_a_limit_keeps_questions_whole(root):
    data = read_superglue(root, "few-shot", ["MultiRC", "RTE"], limit=5)
    for split in ("train", "dev", "test"):
        groups = Counter(example.group for example in data["MultiRC"].examples[split])
        assert list(groups.values()) == [2, 2]
        assert len(data["RTE"].examples[split]) == 5
    assert data["MultiRC"].left_out == {"over the limit": 3 * 20}
    keys = [example.key for example in data["RTE"].examples["test"]]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("BoolQ", {"label": 1}, '"label" is 1; the labels of BoolQ are false, true'),
        ("BoolQ", {"passage": " "}, '"passage" is missing or not text'),
        ("CB", {"label": "maybe"}, "'maybe'; the labels of CB are entailment, contradiction, neutral"),
        ("CB", {"label": None}, '"label" is missing'),
        ("COPA", {"question": "why"}, "\"question\" is 'why', neither cause nor effect"),
        ("COPA", {"label": True}, '"label" is True; the labels of COPA are 0, 1'),
        ("RTE", {"idx": "3"}, '"idx" is missing or no number'),
        ("MultiRC", {"passage": "text"}, '"passage" is missing or no JSON object'),
        ("MultiRC", {"passage": {"text": "a", "questions": []}}, '"passage.questions" is missing or no list'),
        (
            "MultiRC",
            {"passage": {"text": "a", "questions": [{"idx": 0, "question": "b", "answers": [{"idx": 0, "text": 1}]}]}},
            '"passage.questions[0].answers[0].text" is missing or not text',
        ),
        ("WSC", {"target": None}, '"target" is missing or no JSON object'),
        (
            "WSC",
            {"target": {"span1_text": "The cow", "span1_index": 1, "span2_text": "it", "span2_index": 3}},
            "\"target.span1_text\" 'The cow' does not stand at word 1",
        ),
        (
            "WSC",
            {"target": {"span1_text": "The", "span1_index": 0, "span2_text": "they", "span2_index": 3}},
            "\"target.span2_text\" 'they' does not stand at word 3",
        ),
    ],
)
def test_mistakes_are_named_with_file_line_and_field(root, name, values, message):
    path = root / name / "val.jsonl"
    change(path, 2, **values)
    with pytest.raises(MegapromptError) as error:
        read_superglue(root, "few-shot", [name])
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named_with_a_remedy(root, tmp_path):
    with pytest.raises(UsageError, match=r"--data .*nowhere: there is no such directory"):
        read_superglue(tmp_path / "nowhere", "few-shot")
    (root / "BoolQ" / "train.jsonl").unlink()
    with pytest.raises(MegapromptError, match=r"BoolQ/train.jsonl: there is no such file; leave BoolQ out"):
        read_superglue(root, "few-shot")
    (root / "CB" / "dev32.jsonl").unlink()
    with pytest.raises(MegapromptError, match=r"CB/dev32.jsonl: there is no such file; take FewGLUE .* --setting full"):
        read_superglue(root, "few-shot", ["CB"])
    (root / "RTE" / "val.jsonl").write_text("\n")
    with pytest.raises(MegapromptError, match=r"RTE/val.jsonl: has no examples"):
        read_superglue(root, "few-shot", ["RTE"])
    write_rows(root / "WiC" / "train.jsonl", [{"idx": 0, **ROWS["WiC"](0)}])
    with pytest.raises(MegapromptError, match=r"WiC: no examples are left for train"):
        read_superglue(root, "full", ["WiC"])


@pytest.mark.skipif(not (SHARED / "fewglue").is_dir(), reason="FewGLUE is not beside the repository")
def test_fewglue_as_it_is():
    data = read_superglue(SHARED / "fewglue", "few-shot")
    sizes = {name: [len(examples) for examples in each.examples.values()] for name, each in data.items()}
    assert sizes == {
        "BoolQ": [32, 32, 3270], "CB": [32, 32, 56], "COPA": [64, 32, 100], "MultiRC": [154, 167, 4848],
        "RTE": [32, 32, 277], "WiC": [32, 32, 638], "WSC": [32, 32, 104],
    }  # fmt: skip
    labels = {name: Counter(each.answer for each in data[name].examples["test"]) for name in data}
    assert labels["CB"] == {"contradiction": 28, "entailment": 23, "neutral": 5}
    assert labels["WSC"] == {"False": 66, "True": 38}
    assert len({each.group for each in data["MultiRC"].examples["test"]}) == 953
    assert {each.answer for each in data["WSC"].examples["train"]} == {"True"}


@pytest.mark.skipif(not (SHARED / "superglue").is_dir(), reason="SuperGLUE is not beside the repository")
def test_superglue_as_it_is():
    data = read_superglue(SHARED / "superglue", "full", [name for name in KINDS if name != "BoolQ"])
    sizes = {name: len(each.examples["train"]) + len(each.examples["dev"]) for name, each in data.items()}
    mirrored = len(data["COPA"].examples["train"]) // 2
    assert sizes == {
        "CB": 250, "COPA": 400 + mirrored, "MultiRC": 27243, "RTE": 2490, "WiC": 5428, "WSC": 554,
    }  # fmt: skip
    passages = {split: {each.key[0] for each in data["MultiRC"].examples[split]} for split in ("train", "dev")}
    assert not passages["train"] & passages["dev"]
