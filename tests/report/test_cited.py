"""The paper's figures beside ours."""

import csv

from megaprompt.report.cited import CITED, RELATIONS, cited_scores, paper_vocabulary
from megaprompt.report.html import write_joint_report
from megaprompt.report.table2_formats import as_csv, legend, lines_of
from tests.report.made_up import (
    Page,
    change,
    joined,
)


def test_the_paper_is_cited_where_model_and_vocabulary_match():
    def scores(name: str, hidden_size: int, vocabulary: str, relations=("P36", "P1412")) -> dict:
        return cited_scores({"name": name, "hidden_size": hidden_size}, vocabulary, relations)

    assert scores("bert-base-cased", 768, "29k-vocab.json")["p-tuning"] == 52.3
    assert scores("google-bert/bert-base-cased", 768, "lama-34k.txt")["autoprompt"] == 43.3
    assert scores("bert-base-cased", 768, "lama-34k.txt")["e-bert"] == 36.2
    assert scores("bert-base-cased", 768, "29k-vocab.json")["autoprompt"] == 45.2
    assert scores("roberta-base", 768, "29k-vocab.json")["autoprompt"] == 40.0
    assert scores("checkpoints/megatron_11b", 3072, "LAMA-29K.txt")["fine-tuning"] == "OOM"
    assert not scores("bert-base-cased", 768, "common_vocab_cased.txt")
    assert not scores("bert-base-cased", 768, "all tokens")
    assert not scores("bert-base-cased", 768, "29k-vocab.json", ("P36", "P297"))  # other data
    assert len(RELATIONS) == 41
    assert not scores("bert-base-uncased", 768, "29k-vocab.json")
    assert not scores("gpt2-xl", 768, "29k-vocab.json")  # a directory that is only called so
    assert not scores("gpt2-xl", 1600, "34k-vocab.json")
    assert paper_vocabulary("129k.txt") is paper_vocabulary("29km.txt") is None


def test_the_gains_that_the_paper_prints_follow_from_its_scores():
    gains = {c.model: round(float(c.scores["p-tuning"]) - float(c.scores["manual"]), 1) for c in CITED["LAMA-29k"]}
    assert list(gains.values()) == [20.6, 21.1, 30.9, 31.4, 26.2, 31.6, 41.1]


def test_nothing_is_cited_beside_random_weights(make_run):
    run = make_run("a", {"manual": {"P36": 0.1}}, "gpt2-xl", "29k.txt", hidden_size=1600)
    assert joined(run).rows[0].cited
    change(run, lambda results: results["backbone"].update(control="random-weights"))
    assert not joined(run).rows[0].cited


def test_cited_figures_stand_beside_ours_and_are_marked(make_run, tmp_path):
    scores = {"manual": {"P36": 0.99}, "p-tuning": {"P36": 0.1}}
    cited = make_run("a", scores, "gpt2-xl", "lama-29k.txt", hidden_size=1600)
    other = make_run("b", scores, "gpt2-large", "lama-29k.txt", hidden_size=1280)
    table = joined(cited, other)
    headings, lines = lines_of(table, "macro")
    assert [h.text for h in headings] == [
        "backbone", "MP", "MP †", "FT †", "MP+FT †", "P-tuning", "P-tuning †"
    ]  # fmt: skip
    assert [cell.text for cell in lines[0]] == [
        "gpt2-xl",
        "99.0",
        "22.8",
        "44.9",
        "46.5",
        "10.0 (−89.0)",
        "54.4 (+31.6)",
    ]
    assert [cell.text for cell in lines[1]] == ["gpt2-large", "99.0", "–", "–", "–", "10.0 (−89.0)", "–"]
    assert not any(cell.best for cell in lines[0] if cell.cited)
    assert not any("†" in heading.text for heading in lines_of(table, "micro")[0])
    sentence = next(text for text in legend(table) if "†" in text)
    assert "Cited, not measured here" in sentence
    assert "2103.10385" in sentence
    assert "41 relations" in sentence
    assert "Here: facts, 1 relation, 40 test facts." in sentence
    sources = {
        (r["backbone"], r["method"], r["source"].split(":")[0]) for r in csv.DictReader(as_csv(table).splitlines())
    }
    assert ("gpt2-xl", "fine-tuning", "cited") in sources
    assert not any(backbone == "gpt2-large" and source == "cited" for backbone, _, source in sources)
    page = Page(write_joint_report(table, tmp_path / "out"))
    assert {text for row in page.tables[0] for text, kind in row if "cited" in kind} >= {
        "MP\u00a0†",
        "22.8",
        "54.4 (+31.6)",
    }
