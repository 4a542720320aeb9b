import hashlib

import pytest

from megaprompt.backbone import load_backbone
from megaprompt.backbone.load import load_tokenizer
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.facts import SPLITS, Fact, load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary, usable_facts

FACTS = {  # train, dev, test
    "P36": (81, 56, 89),
    "P30": (300, 110, 110),
    "P17": (300, 110, 110),
    "P47": (92, 57, 110),
    "P37": (72, 53, 85),
    "P38": (81, 62, 95),
    "P131": (300, 110, 110),
    "P421": (178, 104, 110),
    "P1376": (88, 37, 100),
    "P2341": (146, 91, 110),
    "P297": (84, 63, 98),
    "P246": (43, 32, 43),
}
FINGERPRINT = "a12f902c7b6b4168"


@pytest.fixture(scope="module")
def data():
    return load_data("world")


@pytest.fixture(scope="module")
def facts(data):
    """The facts of each relation, in all splits."""
    return {name: [f for split in SPLITS for f in each.facts[split]] for name, each in data.relations.items()}


def test_the_facts_are_the_same_everywhere(data):
    """With the pinned versions. Other versions of the packages know other facts."""
    counts = {name: tuple(len(each.facts[split]) for split in SPLITS) for name, each in data.relations.items()}
    assert counts == FACTS
    everything = [[name, split, *f] for name, r in data.relations.items() for split in SPLITS for f in r.facts[split]]
    assert hashlib.sha256(repr(everything).encode()).hexdigest()[:16] == FINGERPRINT


@pytest.mark.parametrize(
    ("relation", "known"),
    [
        ("P36", [("Denmark", "Copenhagen"), ("Peru", "Lima"), ("Curacao", "Willemstad")]),
        ("P30", [("Denmark", "Europe"), ("Brno", "Europe"), ("Mumbai", "Asia")]),
        ("P17", [("Novosibirsk", "Russia"), ("Domodedovo International Airport", "Russia")]),
        ("P47", [("Denmark", "Germany"), ("Portugal", "Spain"), ("Canada", "United States")]),
        ("P37", [("Denmark", "Danish"), ("Brazil", "Portuguese"), ("China", "Chinese"), ("Serbia", "Serbian")]),
        ("P38", [("Denmark", "krone"), ("Japan", "yen"), ("Bulgaria", "euro"), ("China", "yuan")]),
        ("P131", [("Chicago", "Illinois"), ("Oakland", "California")]),
        ("P421", [("Chicago", "Central"), ("Seattle", "Pacific"), ("Toronto", "Eastern"), ("Phoenix", "Mountain")]),
        ("P1376", [("Copenhagen", "Denmark"), ("Lima", "Peru")]),
        ("P2341", [("Danish", "Denmark"), ("Tamil", "India"), ("Yoruba", "Nigeria")]),
        ("P297", [("Denmark", "DK"), ("Netherlands", "NL")]),
        ("P246", [("Hydrogen", "H"), ("Gold", "Au"), ("Oganesson", "Og")]),
    ],
)  # fmt: skip
def test_what_everybody_knows(facts, relation, known):
    assert {Fact(*each) for each in known} <= set(facts[relation])


@pytest.mark.parametrize(
    ("relation", "subject"),
    [
        ("P36", "Mexico"),  # Mexico City names it
        ("P36", "Netherlands Antilles"),  # dissolved
        ("P30", "Istanbul"),  # on two continents
        ("P30", "Antarctica"),  # nobody's home
        ("P17", "Mexico City"),
        ("P47", "China"),  # fourteen neighbours
        ("P37", "Belgium"),  # Dutch and French
        ("P38", "Panama"),  # balboa and dollar
        ("P131", "Springfield"),  # in too many states
        ("P2341", "Spanish"),  # most of its speakers live elsewhere
        ("P297", "Kosovo"),  # not in ISO 3166-1
        ("P246", "N"),  # the neutron
    ],
)  # fmt: skip
def test_what_has_no_one_answer_is_left_out(facts, relation, subject):
    assert subject not in {fact.subject for fact in facts[relation]}


def test_most_relations_have_a_hundred_test_facts(data):
    many = [name for name, each in data.relations.items() if len(each.facts["test"]) >= 100]
    nearly = [name for name, each in data.relations.items() if len(each.facts["test"]) >= 80]
    assert len(many) >= 6
    assert len(nearly) >= 10
    assert all(len(each.facts["test"]) >= 40 for each in data.relations.values())


def test_a_subject_is_in_one_split_for_all_relations_and_no_fact_is_there_twice(data, facts):
    split_of: dict[str, str] = {}
    for name, relation in data.relations.items():
        assert len(facts[name]) == len(set(facts[name]))
        for split in SPLITS:
            for fact in relation.facts[split]:
                assert split_of.setdefault(fact.subject, split) == split


def test_names_are_clean_and_none_is_part_of_the_other(facts):
    for fact in (fact for each in facts.values() for fact in each):
        for text in fact:
            assert text
            assert text == " ".join(text.split())
        subject, object_ = (f" {text} ".lower() for text in fact)
        assert subject not in object_
        assert object_ not in subject


def test_only_borders_have_several_objects_for_a_subject(data, facts):
    for name, each in facts.items():
        unique = len({fact.subject for fact in each}) == len(each)
        assert unique == (data.relations[name].type != "N-M"), name


def test_every_relation_has_several_wordings_that_can_be_read(data):
    for relation in data.relations.values():
        wordings = (relation.template, *relation.wordings)
        assert len(set(wordings)) == len(wordings) >= 5
        for text in wordings:
            Template.parse(text)
            assert text.endswith(" .")


@pytest.mark.parametrize("relation", ["P36", "P30", "P17", "P47", "P37", "P131", "P1376"])
def test_the_manual_prompt_has_lamas_words(data, relation):
    located, capital = "[X] is located in [Y] .", "The capital of [X] is [Y] ."
    words = {
        "P36": capital, "P30": located, "P17": located, "P131": located, "P47": "[X] shares border with [Y] .",
        "P37": "The official language of [X] is [Y] .", "P1376": "[X] is the capital of [Y] .",
    }  # fmt: skip
    assert data.relations[relation].template == words[relation]


def test_the_packaged_model_can_be_asked(data):
    tokenization = load_tokenizer("smollm2-135m")
    vocabulary = load_vocabulary("auto", data, tokenization)
    usable = {name: usable_facts(each, tokenization, vocabulary)[0] for name, each in data.relations.items()}
    assert all(len(each["train"]) >= 12 and len(each["dev"]) >= 8 for each in usable.values())
    assert sum(len(each["test"]) >= 75 for each in usable.values()) >= 7
    assert sum(len(each["test"]) for each in usable.values()) >= 800


def test_wordings_reach_the_task(data, backbone_directory):
    backbone = load_backbone(str(backbone_directory))
    everything = load_vocabulary("none", data, backbone.tokenization)
    tasks = lama_tasks(data, backbone, AskFor(everything), names=(), splits=(), limit=None, seed=0)
    for name, task in tasks.items():
        relation = data.relations[name]
        assert task.wordings == (relation.template, *relation.wordings)
