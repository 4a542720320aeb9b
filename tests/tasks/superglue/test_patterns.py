"""Patterns as data: the packaged ones, how causal and masked models read them, and files of the user's."""

import pytest

from megaprompt.errors import UsageError
from megaprompt.tasks.superglue.kinds import KINDS
from megaprompt.tasks.superglue.patterns import read_patterns


@pytest.fixture(scope="module")
def packaged():
    return read_patterns(None)


def test_every_task_has_its_patterns(packaged):
    assert list(packaged) == list(KINDS)
    counts = {
        name: [sum(key.startswith(kind) for key in each.patterns) for kind in ("p-tuning", "searched", "pet", "table6")]
        for name, each in packaged.items()
    }
    assert counts == {
        "BoolQ": [1, 3, 6, 0], "CB": [1, 4, 5, 0], "COPA": [1, 4, 2, 0], "MultiRC": [1, 2, 4, 0],
        "RTE": [1, 3, 5, 4], "WiC": [4, 3, 3, 0], "WSC": [2, 4, 3, 0],
    }  # fmt: skip


def test_learned_tokens_as_in_the_original_code(packaged):
    counts = {name: each.learned.template(causal=False).num_pseudo_tokens for name, each in packaged.items()}
    assert counts == {**dict.fromkeys(KINDS, 1), "WSC": 2}
    wic = packaged["WiC"].patterns
    assert [wic[f"p-tuning-{n}"].template(causal=False).num_pseudo_tokens for n in (2, 3, 4)] == [2, 3, 4]
    for each in packaged.values():
        for name, pattern in each.patterns.items():
            learned = pattern.template(causal=False).num_pseudo_tokens > 0
            assert learned == name.startswith(("p-tuning", "searched"))


def test_words(packaged):
    assert packaged["CB"].learned.words == {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}
    assert packaged["RTE"].manual.words == {"entailment": "true", "not_entailment": "false"}
    assert packaged["WiC"].patterns["pet-2"].words == {"False": "2", "True": "b"}
    assert packaged["COPA"].manual.words == {}


def test_a_causal_model_stops_at_the_answer(packaged):
    rte = packaged["RTE"].patterns
    assert rte["p-tuning"].template(True).text == "[premise...] Question: [hypothesis~] ? <1> Answer: [Y]"
    assert rte["p-tuning"].template(False).text == "[premise...] Question: [hypothesis~] ? <1> Answer: [Y] ."
    assert rte["pet-1"].template(True).text == "[hypothesis~] ?\n[Y] , [premise...]", "what it cannot read is kept"
    assert packaged["WiC"].patterns["pet-0"].template(True).text.endswith('"[word]"? [Y]')


def test_texts_are_parted_by_the_models_separator(packaged):
    cb = packaged["CB"].learned
    assert cb.template(True).text == "[premise...]\n[hypothesis] ? <1> answer: [Y]"
    assert cb.template(False, " </s> ").text == "[premise...] </s> [hypothesis] ? <1> answer: [Y]"


def test_patterns_of_the_users_own(tmp_path, packaged):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[RTE]\nmanual = "mine"\nmax_tokens = 99\n[RTE.patterns]\nmine = "[premise...] So [hypothesis] [Y]"\n'
        'p-tuning = { template = "[premise...]<2>[Y]", words = { entailment = "so", not_entailment = "no" } }\n'
    )
    found = read_patterns(path)
    assert found["RTE"].manual.template(False).text == "[premise...] So [hypothesis] [Y]"
    assert found["RTE"].manual.words == {"entailment": "Yes", "not_entailment": "No"}
    assert found["RTE"].learned.words["entailment"] == "so"
    assert found["RTE"].max_tokens == 99
    assert "pet-0" in found["RTE"].patterns
    assert found["CB"] == packaged["CB"]
    assert [pattern.name for pattern in packaged["RTE"].compared] == [f"pet-{i}" for i in range(5)]
    path.write_text('[RTE]\ncompared = ["table6-2", "pet-4"]\n')
    assert [pattern.name for pattern in read_patterns(path)["RTE"].compared] == ["table6-2", "pet-4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RTE", "cannot be read as TOML"),
        ("[MNLI]", "MNLI is no task; give tables"),
        ("[RTE]\nprompt = 'x'", "[RTE] has prompt; it may have manual, learned"),
        ("[RTE]\npatterns = 3", "[RTE] patterns has to be a table"),
        ("[RTE]\nmanual = 'pet-9'", "manual = 'pet-9' is no pattern; choose from p-tuning"),
        ("[RTE]\nmanual = 'p-tuning'", "manual = 'p-tuning' has learned tokens"),
        ("[RTE]\ncompared = ['pet-0', 'pet-9']", "compared: 'pet-9' is no pattern; choose from p-tuning"),
        ("[RTE]\ncompared = ['p-tuning']", "compared: 'p-tuning' has learned tokens"),
        ("[RTE]\ncompared = 'pet-0'", "compared: give a list of patterns"),
        ("[RTE]\nmax_tokens = '9'", "max_tokens has to be a number above 0"),
        ("[RTE.patterns]\nmine = 3", "[RTE] mine: give a pattern, or {"),
        ("[RTE.patterns]\nmine = '[premise...] [hypothesys] [Y]'", "[hypothesys] is no field of RTE; it has premise, "),
        ("[RTE]\nmanual = ['pet-0']", "[RTE] manual = ['pet-0'] is no pattern"),
        ("[RTE]\ncompared = [['pet-0']]", "compared: ['pet-0'] is no pattern"),
        ("[RTE.patterns]\nmine = '[premise] [hypothesis]'", "[RTE] mine: template '[premise] [hypothesis]' has 0 [Y]"),
        ("[RTE.patterns]\nmine = { template = '[premise][Y]', words = { yes = 'a' } }", "one for each of entailment, "),
        ("[RTE]\nwords = { entailment = 'a', not_entailment = 'a' }", "two answers have the same word"),
        ("[COPA]\nwords = { 0 = 'a', 1 = 'b' }", "words has to have one for each of none"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_patterns(path)
    assert str(error.value).startswith(f"--patterns {path}: ")
    assert message in str(error.value)
