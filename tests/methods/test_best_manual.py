"""Wordings of one relation, each with its own score."""

import json

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.errors import MegapromptError
from megaprompt.run.job import probe
from tests.conftest import write_facts

CITIES = [
    ("Paris", "France"), ("Rome", "Italy"), ("Madrid", "Spain"), ("Oslo", "Norway"), ("Tokyo", "Japan"),
    ("Cairo", "Egypt"), ("Lima", "Peru"), ("Havana", "Cuba"), ("Vienna", "Austria"), ("Athens", "Greece"),
]  # fmt: skip

# P17 in Table 1 of "GPT Understands, Too", where P@1 goes from 19.8 to 51.1 with the wording alone.
TABLE_1 = (
    "[X] is located in [Y].",
    "[X] is located in which country or state? [Y].",
    "[X] is located in which country? [Y].",
    "[X] is located in which country? In [Y].",
)


def test_the_wordings_of_table_1_have_a_score_each(backbone_directory, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "dev", "test"):
        write_facts(data / "trex" / split / "P17.jsonl", CITIES)
    row = {"relation": "P17", "label": "country", "type": "N-1"}
    (data / "relations.jsonl").write_text(json.dumps(row | {"template": TABLE_1[0], "templates": TABLE_1[1:]}) + "\n")

    def run(name: str, **options):
        config = ProbeConfig(backbone=str(backbone_directory), data=str(data), out=tmp_path / name, **options)
        return probe(config)["methods"]

    tried = run("all", methods=("best-manual",))["best-manual"]["relations"]["P17"]["tried"]
    found = {each["template"]: each["test_p_at_1"] for each in tried}
    assert set(found) == set(TABLE_1)
    assert tried[0]["mrr"] == max(each["mrr"] for each in tried)
    for i, wording in enumerate(TABLE_1):
        (data / "relations.jsonl").write_text(json.dumps(row | {"template": wording}) + "\n")
        assert run(f"alone {i}", methods=("manual",))["manual"]["relations"]["P17"]["p_at_1"] == found[wording]
    page = (tmp_path / "all" / "report.html").read_text()
    for wording in TABLE_1:
        assert f"<code>{wording}</code>" in page
    assert "mean ± deviation over wordings" in page


def test_wordings_may_be_given(backbone_directory, data_directory, tmp_path):
    given = tmp_path / "more.jsonl"
    given.write_text(json.dumps({"relation": "P36", "template": "[X] has the capital [Y]"}) + "\n")
    config = {"backbone": str(backbone_directory), "data": str(data_directory), "methods": ("best-manual",)}
    methods = probe(ProbeConfig(**config, out=tmp_path / "run", wordings=given))["methods"]
    tried = methods["best-manual"]["relations"]["P36"]["tried"]
    assert {each["template"] for each in tried} == {"[X] has the capital [Y]", "The capital of [X] is [Y] ."}


@pytest.mark.parametrize("line", ['{"relation": "P36", "template": "no place"}', "no JSON"])
def test_a_wrong_file_of_wordings_is_named(backbone_directory, data_directory, tmp_path, line):
    given = tmp_path / "more.jsonl"
    given.write_text(line + "\n")
    config = {"backbone": str(backbone_directory), "data": str(data_directory), "methods": ("best-manual",)}
    with pytest.raises(MegapromptError, match=r"more\.jsonl:1"):
        probe(ProbeConfig(**config, out=tmp_path / "run", wordings=given))
