"""Several runs joined: Table 2, means over seeds, the paper's figures beside ours; two methods on the same facts."""

import csv
import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from megaprompt.cli import main
from megaprompt.config import ProbeConfig, to_yaml
from megaprompt.errors import MegapromptError
from megaprompt.report.charts import relations_chart, types_chart
from megaprompt.report.comparison import bootstrap_interval, compare, difference, read_answers
from megaprompt.report.html import write_joint_report, write_report
from megaprompt.report.table2 import (
    CITED,
    Table2,
    as_csv,
    cited_scores,
    join,
    latex,
    legend,
    lines_of,
    markdown,
    paper_vocabulary,
    terminal_table,
)
from megaprompt.report.tables import read_run
from tests.report.test_report import Page, make_results, plain


@pytest.fixture
def make_run(tmp_path):
    """Write a run: `make_run("a", {"manual": {"P36": 0.5}}, seed=1)`; further options go into its config.yaml."""

    def make(name: str, scores: dict, backbone: str = "tiny", vocabulary: str = "all tokens", **options) -> Path:
        results = make_results(scores)
        results["backbone"] |= {"name": backbone, "hidden_size": options.pop("hidden_size", 576)}
        results["data"]["vocabulary"]["name"] = vocabulary
        path = tmp_path / name
        path.mkdir()
        (path / "results.json").write_text(json.dumps(results))
        (path / "config.yaml").write_text(to_yaml(ProbeConfig(backbone=backbone, out=path, **options)))
        return path

    return make


def change(run: Path, edit) -> None:
    """Edit the results of a run."""
    results = json.loads((run / "results.json").read_text())
    edit(results)
    (run / "results.json").write_text(json.dumps(results))


def joined(*runs: Path) -> Table2:
    return join([read_run(run) for run in runs])


def shown(table: Table2, average="macro") -> dict[str, dict[str, str]]:
    """Texts of the table by backbone and heading."""
    headings, lines = lines_of(table, average)
    names = [heading.text for heading in headings[1:]]
    return {line[0].text: dict(zip(names, (cell.text for cell in line[1:]), strict=True)) for line in lines}


def write_predictions(run: Path, relation: str, ranks: dict[str, list[int]], names: list[str] | None = None) -> None:
    """Predictions of methods on the same facts, which are called s0, s1, ... unless they have names."""
    lines = []
    for method, of_method in ranks.items():
        for i, rank in enumerate(of_method):
            subject, p = names[i] if names else f"s{i}", 0.9 - 0.01 * i
            top = [["o", p]] if rank == 1 else [["wrong", p], ["o", 0.01]]
            line = {"method": method, "subject": subject, "object": "o", "rank": rank, "probability": p, "top": top}
            lines.append(json.dumps(line) + "\n")
    (run / "predictions").mkdir(exist_ok=True)
    (run / "predictions" / f"{relation}.jsonl").write_text("".join(lines))


# ------------------------------------------------------------------------------------------------------------- joining


def test_backbones_and_methods_stand_as_in_the_paper(make_run):
    one = make_run("a", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}}, "bert")
    more = {"fine-tuning": {"P36": 0.4, "P30": 0.5}, "lpaqa": {"P36": 0.3, "P30": 0.3}}
    two = make_run("b", more, "bert", methods=("fine-tuning",))
    three = make_run("c", {"manual": {"P36": 0.1, "P30": 0.2}, "p-tuning": {"P36": 0.1, "P30": 0.1}}, "gpt")
    table = joined(one, two, three)
    over = "P-tuning over the best other"
    assert shown(table) == {
        "bert": {"MP": "30.0", "lpaqa": "30.0", "FT": "45.0", "P-tuning": "60.0 (+30.0)", over: "+15.0 (FT)"},
        "gpt": {"MP": "15.0", "lpaqa": "–", "FT": "–", "P-tuning": "10.0 (−5.0)", over: "−5.0 (MP)"},
    }
    _, lines = lines_of(table, "macro")
    assert [[cell.text for cell in line if cell.best] for line in lines] == [["60.0 (+30.0)"], ["15.0"]]
    assert list(table.relations) == ["P36", "P30"]
    assert not table.notes


def test_micro_counts_facts(make_run):
    run = make_run("a", {"manual": {"P36": 0.5, "P30": 1.0}})
    change(run, lambda results: results["methods"]["manual"]["relations"]["P30"].update(facts=120))
    assert shown(joined(run))["tiny"] == {"MP": "75.0"}
    assert shown(joined(run), "micro")["tiny"] == {"MP": "87.5"}  # (40 * 0.5 + 120) / 160


def test_seeds_are_averaged(make_run):
    runs = [
        make_run(f"s{seed}", {"manual": {"P36": 0.25}, "p-tuning": {"P36": score}}, seed=seed)
        for seed, score in enumerate((0.5, 0.6, 0.4))
    ]
    table = joined(*runs)
    assert shown(table) == {"tiny": {"MP": "25.0", "P-tuning": "50.0 ± 10.0 (+25.0)"}}  # not the 8.2 of a population
    assert "±: standard deviation over 3 seeds." in legend(table)
    again = joined(*runs, runs[0])  # the same seed once more is no further evidence
    assert len(again.rows[0].cells["p-tuning"].runs) == 3
    assert shown(joined(runs[0])) == {"tiny": {"MP": "25.0", "P-tuning": "50.0 (+25.0)"}}


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(make_run):
    scores = {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}
    a = make_run("a", scores, seed=0)
    b = make_run("b", scores, seed=1, encoder="mlp", row_tokens=64)
    c = make_run("c", {"fine-tuning": {"P36": 0.5}}, seed=0, max_epochs=3)  # of another method: in the row of a
    d = make_run("d", {"manual": {"P36": 0.5}}, seed=0, limit_facts=10)  # other facts
    table = joined(a, b, c, d)
    assert [row.name for row in table.rows] == [
        "tiny (limit-facts not given, encoder lstm)", "tiny (limit-facts not given, encoder mlp)",
        "tiny (limit-facts 10)",
    ]  # fmt: skip
    assert [list(row.cells) for row in table.rows] == [
        ["manual", "fine-tuning", "p-tuning"], ["manual", "p-tuning"], ["manual"]
    ]  # fmt: skip


def test_settings_of_other_methods_do_not_keep_seeds_apart(make_run):
    scores = {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5}}
    one = make_run("a", scores | {"lpaqa": {"P36": 0.3}}, seed=0, discrete=("lpaqa=mined",))
    two = make_run("b", scores, seed=1, fine_tuning_rate=1e-5)
    assert shown(joined(one, two)) == {"tiny": {"MP": "25.0", "lpaqa": "30.0", "P-tuning": "50.0 (+25.0)"} | {
        "P-tuning over the best other": "+20.0 (lpaqa)"
    }}  # fmt: skip
    assert len(joined(one, two).rows[0].cells["p-tuning"].runs) == 2


def test_no_run_is_lost_behind_one_that_learns_something_else(make_run):
    first = make_run("a", {"fine-tuning": {"P36": 0.4}}, methods=("fine-tuning",))  # --encoder is lstm, but not used
    runs = [make_run(kind, {"p-tuning": {"P36": p}}, encoder=kind) for kind, p in (("mlp", 0.1), ("lstm", 0.9))]
    found = {row.name: {m: cell.mean()[0] for m, cell in row.cells.items()} for row in joined(first, *runs).rows}
    assert found == {
        "tiny (encoder mlp)": {"fine-tuning": 40.0, "p-tuning": 10.0}, "tiny (encoder lstm)": {"p-tuning": 90.0}
    }  # fmt: skip


def test_prompts_of_another_file_are_not_averaged(make_run):
    runs = [
        make_run(path, {"lpaqa": {"P36": p}}, seed=seed, methods=("manual",), discrete=(f"lpaqa={path}",))
        for seed, (path, p) in enumerate((("mined", 0.3), ("paraphrase", 0.9)))
    ]
    assert shown(joined(*runs)) == {
        "tiny (lpaqa mined)": {"lpaqa": "30.0"}, "tiny (lpaqa paraphrase)": {"lpaqa": "90.0"}
    }  # fmt: skip


def test_a_configuration_of_an_older_version_has_the_defaults(make_run):
    runs = [make_run(f"s{seed}", {"p-tuning": {"P36": 0.5}}, seed=seed) for seed in (0, 1)]
    file = runs[0] / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("discrete:", "init:", "limit_facts:"))]
    assert len(kept) == len(lines) - 3
    file.write_text("".join(kept))
    (row,) = joined(*runs).rows
    assert (row.name, len(row.cells["p-tuning"].runs)) == ("tiny", 2)


def test_other_weights_or_no_configuration_make_other_rows(make_run):
    runs = [make_run(name, {"manual": {"P36": 0.25}}) for name in "abc"]
    change(runs[1], lambda results: results["backbone"].update(fingerprint="other"))
    (runs[2] / "config.yaml").unlink()
    change(runs[2], lambda results: results["methods"].update({"p-tuning": results["methods"]["manual"]}))
    change(runs[0], lambda results: results["methods"].update({"p-tuning": results["methods"]["manual"]}))
    names = [row.name for row in joined(*runs).rows]
    assert len(names) == len(set(names)) == 3
    assert "weights ab12" in names[0]
    assert "weights other" in names[1]


def test_only_relations_of_all_runs_count(make_run, tmp_path):
    one = make_run("a", {"manual": {"P36": 0.2, "P30": 0.8, "P47": 1.0}})
    two = make_run("b", {"manual": {"P36": 0.4, "P47": 0.6}}, "gpt")
    change(two, lambda results: results["data"]["relations"]["P47"]["facts"].update(test=0))
    table = joined(one, two)
    assert {name: cells["MP"] for name, cells in shown(table).items()} == {"tiny": "20.0", "gpt": "40.0"}
    assert "Over the 1 relations of all runs. Left out: 2 relations (P30, P47)." in table.notes[0]
    other = make_run("c", {"manual": {"P17": 0.4}}, "gpt")
    with pytest.raises(MegapromptError, match="no relation in common"):
        joined(one, other)


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_missing_scores_are_dashes_and_said(make_run, bad):
    run = make_run("a", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}})

    def damage(results):
        results["methods"]["p-tuning"]["relations"]["P30"]["p_at_1"] = bad
        results["methods"]["majority"] = {"relations": {}}
        results["methods"]["lpaqa"] = None
        results["complete"] = False

    change(run, damage)
    table = joined(run)
    assert shown(table) == {"tiny": {"MP": "30.0"}}
    assert any("p-tuning" in note and "no score of P30" in note for note in table.notes)
    assert any("not complete" in note for note in table.notes)
    whole = make_run("b", {"manual": {"P36": 0.2, "P30": 0.4}, "p-tuning": {"P36": 0.5, "P30": 0.7}}, seed=1)
    assert len(joined(run, whole).rows[0].cells["p-tuning"].runs) == 1


def test_runs_without_any_score_make_a_page(make_run, tmp_path):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]
    for run in runs:
        change(run, lambda results: results.update(methods={}))
    page = Page(write_joint_report(joined(*runs), tmp_path / "out"))
    assert page.rows(0)["a"] == []
    assert not re.search(r"\b(None|nan|Undefined)\b", page.prose())
    Page(write_report(runs[0]))


@pytest.mark.parametrize("what", ["data", "vocabulary"])
def test_runs_on_other_data_are_refused(make_run, what):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]

    def other(results):
        if what == "data":
            results["data"]["name"] = "other"
        else:
            results["data"]["vocabulary"]["name"] = "other"

    change(runs[1], other)
    with pytest.raises(MegapromptError, match=f"its {what} is other"):
        joined(*runs)


def test_other_facts_are_said(make_run):
    runs = [make_run(name, {"manual": {"P36": 0.2}}, name) for name in "ab"]
    change(runs[1], lambda results: results["methods"]["manual"]["relations"]["P36"].update(facts=39))
    assert any("a 40, b 39" in note for note in joined(*runs).notes)


def test_results_of_another_version_are_refused(make_run):
    run = make_run("a", {"manual": {"P36": 0.2}})
    change(run, lambda results: results.update(format=2))
    with pytest.raises(MegapromptError, match="not written by this version"):
        read_run(run)
    (run / "config.yaml").write_text("a: [")
    change(run, lambda results: results.update(format=1))
    with pytest.raises(MegapromptError, match=r"config\.yaml: is damaged"):
        read_run(run)


# ----------------------------------------------------------------------------------------------------------- the paper


def test_the_paper_is_cited_where_model_and_vocabulary_match():
    def scores(name: str, hidden_size: int, vocabulary: str) -> dict:
        return cited_scores({"name": name, "hidden_size": hidden_size}, vocabulary)

    assert scores("bert-base-cased", 768, "29k-vocab.json")["p-tuning"] == 52.3
    assert scores("google-bert/bert-base-cased", 768, "lama-34k.txt")["autoprompt"] == 43.3
    assert scores("checkpoints/megatron_11b", 3072, "LAMA-29K.txt")["fine-tuning"] == "OOM"
    assert not scores("bert-base-cased", 768, "common_vocab_cased.txt")
    assert not scores("bert-base-cased", 768, "all tokens")
    assert not scores("bert-base-uncased", 768, "29k-vocab.json")
    assert not scores("gpt2-xl", 768, "29k-vocab.json")  # a directory that is only called so
    assert not scores("gpt2-xl", 1600, "34k-vocab.json")
    assert paper_vocabulary("129k.txt") is paper_vocabulary("29km.txt") is None


def test_the_gains_that_the_paper_prints_follow_from_its_scores():
    gains = {c.model: round(float(c.scores["p-tuning"]) - float(c.scores["manual"]), 1) for c in CITED["LAMA-29k"]}
    assert list(gains.values()) == [20.6, 21.1, 30.9, 31.4, 26.2, 31.6, 41.1]


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
    assert "Here: 1 relations, 40 test facts." in sentence
    sources = {
        (r["backbone"], r["method"], r["source"].split(":")[0]) for r in csv.DictReader(as_csv(table).splitlines())
    }
    assert ("gpt2-xl", "fine-tuning", "cited") in sources
    assert not any(backbone == "gpt2-large" and source == "cited" for backbone, _, source in sources)
    page = Page(write_joint_report(table, tmp_path / "out"))
    assert {text for row in page.tables[0] for text, kind in row if "cited" in kind} >= {"MP †", "22.8", "54.4 (+31.6)"}


# ------------------------------------------------------------------------------------------------------------- formats


def test_formats_say_the_same(make_run):
    runs = [
        make_run(f"{name}{seed}", {"manual": {"P36": 0.25}, "p-tuning": {"P36": 0.5 + 0.1 * seed}}, name, seed=seed)
        for name in ("a", "b")
        for seed in (0, 1)
    ]
    table = joined(*runs)
    text = markdown(table)
    assert "| a | 25.0 | **55.0 ± 7.1 (+30.0)** |" in text.splitlines()
    assert text.count("| backbone | MP | P-tuning |\n|---|---:|---:|\n") == 2  # macro and micro
    tex = latex(table)
    assert r"a & 25.0 & \textbf{55.0 $\pm$ 7.1 (+30.0)} \\" in tex.splitlines()
    assert r"\begin{tabular}{lrr}" in tex
    rows = list(csv.DictReader(as_csv(table).splitlines()))
    found = {(r["backbone"], r["method"], r["average"]): r for r in rows}
    assert len(found) == len(rows) == 8
    macro = found["a", "p-tuning", "macro"]
    assert float(macro["p_at_1"]) == pytest.approx(55)
    assert float(macro["deviation"]) == pytest.approx(50**0.5, abs=1e-4)
    assert (macro["seeds"], macro["facts"], macro["source"]) == ("2", "40", "measured")
    assert found["a", "manual", "macro"]["deviation"] == ""
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(table))
    assert ["a", "manual", "25.0", "25.0", "2"] in [line.split() for line in plain(console.export_text()).splitlines()]


def test_special_characters_survive(make_run, tmp_path):
    name, method = "a_b|c & 50 % {x} \\ <b>$1$", "m#1 ~^ *s* <i>"
    table = joined(make_run("a", {method: {"P1": 0.5}}, name), make_run("b", {"manual": {"P1": 0.5}}, "other"))
    line = next(line for line in markdown(table).splitlines() if "a\\_b" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 4  # of three cells
    tex = latex(table)
    assert r"a\_b\textbar{}c \& 50 \% \{x\} \textbackslash{} $<$b$>$\$1\$" in tex
    assert not re.search(r"(?<!\\)[#~^]", tex.replace(r"$^\dagger$", ""))
    for line in tex.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 2, line
    assert {row["backbone"] for row in csv.DictReader(as_csv(table).splitlines())} == {name, "other"}
    page = Page(write_joint_report(table, tmp_path / "out"))
    assert not {"b", "i", "script"} & {tag for tag, _ in page.tags}
    assert name in page.rows(0)
    for figure in (relations_chart(table), types_chart(table)):
        FigureCanvasAgg(figure).draw()  # raises for a wrong formula


# -------------------------------------------------------------------------------------------------------------- charts


@pytest.fixture
def wide(make_run) -> Table2:
    """33 relations of three types, 6 methods, 2 backbones, 2 seeds."""
    names = [f"P{100 + i}" for i in range(33)]
    methods = ("majority", "manual", "lpaqa-mined", "fine-tuning", "manual+fine-tuning", "p-tuning")
    runs = []
    for backbone in ("one", "a-backbone-with-a-very-long-name/of-many-parts-and-even-more-of-them-than-fit"):
        for seed in (0, 1):
            shares = {m: {n: (i + k + seed) % 11 / 10 for k, n in enumerate(names)} for i, m in enumerate(methods)}
            run = make_run(f"{backbone[:3]}{seed}", shares, backbone, seed=seed)

            def describe(results):
                for k, about in enumerate(results["data"]["relations"].values()):
                    about["label"] = "located in the administrative territorial entity of a very long name"
                    about["type"] = ("1-1", "N-1", "N-M")[k % 3]

            change(run, describe)
            runs.append(run)
    return joined(*runs)


@pytest.mark.parametrize("chart", [relations_chart, types_chart])
def test_labels_of_charts_do_not_overlap(wide, chart):
    figure = chart(wide)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels())]
    texts += [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    texts += [text for legend_ in figure.legends for text in legend_.get_texts()]
    texts += [axes.xaxis.label for axes in figure.axes]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    assert len(boxes) > 33
    for (name, one), (other, two) in combinations(boxes, 2):
        apart = one.x1 <= two.x0 + 1 or two.x1 <= one.x0 + 1 or one.y1 <= two.y0 + 1 or two.y1 <= one.y0 + 1
        assert apart, f"{name!r} lies on {other!r}"
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y0 >= 0, name
        assert box.y1 <= figure.bbox.y1, name


def test_charts_show_means_and_deviations(make_run):
    shares = [{"manual": {"P36": 0.2}, "p-tuning": {"P36": score}} for score in (0.5, 0.7)]
    table = joined(*(make_run(f"s{i}", scores, seed=i) for i, scores in enumerate(shares)))
    axes = types_chart(table).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if bars.get_label() in table.methods]
    assert heights == [[pytest.approx(20)], [pytest.approx(60)]]
    axes = relations_chart(table).axes[0]
    marks = {marks.get_label(): marks for marks in axes.containers}
    assert marks["p-tuning"].lines[0].get_xdata() == pytest.approx([60])
    (whisker,) = marks["p-tuning"].lines[2][0].get_segments()
    assert np.ptp(whisker[:, 0]) == pytest.approx(2 * 200**0.5)


# ---------------------------------------------------------------------------------------------------------- comparison


def test_bootstrap_agrees_with_drawing_facts_one_by_one():
    generator = np.random.default_rng(1)
    group = np.repeat(["a", "b", "c"], (30, 200, 7))
    values = generator.choice([-100.0, 0.0, 50.0, 100.0], size=len(group))
    low, high = bootstrap_interval(values, group, samples=20_000, seed=0)
    means = np.zeros(20_000)
    for name in "abc":
        mine = values[group == name]
        means += mine[generator.integers(len(mine), size=(20_000, len(mine)))].mean(1) / 3
    expected = np.percentile(means, (2.5, 97.5))
    assert [low, high] == pytest.approx(expected, abs=0.05 * (high - low))
    assert (low, high) == bootstrap_interval(values, group, samples=20_000, seed=0)
    assert (low, high) != bootstrap_interval(values, group, samples=20_000, seed=1)


def test_bootstrap_draws_within_relations_and_in_pairs():
    group = np.repeat(["a", "b"], (10, 1000))
    constant = np.where(group == "a", 100.0, 0.0)  # differs between relations, not within them
    assert bootstrap_interval(constant, group, samples=100, seed=0) == (50.0, 50.0)  # macro: both count the same
    low, high = bootstrap_interval(np.resize([100.0, -100.0], 400), np.repeat("a", 400), samples=10_000, seed=0)
    assert [low, high] == pytest.approx([-2 * 100 / 20, 2 * 100 / 20], abs=0.6)  # 1.96 standard errors


@pytest.fixture
def answered(make_run) -> Path:
    """P36: 2 facts known to both, 3 to p-tuning alone, 1 to manual alone, 2 to neither; P30: one to p-tuning alone."""
    run = make_run("a", {"manual": {"P36": 0.375, "P30": 0.0}, "p-tuning": {"P36": 0.625, "P30": 1.0}})
    ranks = {"manual": [1, 1, 2, 2, 2, 1, 2, 2], "p-tuning": [1, 1, 1, 1, 1, 2, 9, 9]}
    write_predictions(run, "P36", ranks)
    write_predictions(run, "P30", {"manual": [3], "p-tuning": [1]})
    return run


def test_which_facts_are_known(answered):
    table = joined(answered)
    (found,) = compare(table.rows, table.relations)
    assert found.knowledge is not None
    assert (found.knowledge.first, found.knowledge.second) == ("manual", "p-tuning")
    assert found.knowledge.counts == {(True, True): 2, (True, False): 1, (False, True): 4, (False, False): 2}
    only = found.knowledge.examples[False, True]
    assert [(each.label, each.subject) for each in only] == [("p30", "s0"), ("p36", "s2"), ("p36", "s3"), ("p36", "s4")]
    assert [answer.text for answer in only[0].answers] == ["wrong", "o"]
    (gap,) = found.differences
    assert (gap.method, gap.other, gap.relations, gap.facts) == ("p-tuning", "manual", 2, 9)
    assert gap.points == pytest.approx((100 * (3 - 1) / 8 + 100) / 2)
    assert gap.low < gap.points < gap.high


def test_facts_with_the_same_words_are_kept_apart(make_run):
    run = make_run("a", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}})
    write_predictions(run, "P36", {"manual": [1, 2], "p-tuning": [2, 1]}, ["same", "same"])
    table = joined(run)
    (found,) = compare(table.rows, table.relations)
    assert found.knowledge is not None
    assert found.knowledge.counts == {(True, True): 0, (True, False): 1, (False, True): 1, (False, False): 0}


def test_only_facts_that_both_were_asked_are_compared(make_run):
    run = make_run("a", {"manual": {"P36": 0.5}})
    write_predictions(run, "P36", {"manual": [1, 2, 1]})
    other = make_run("b", {"p-tuning": {"P36": 0.5}}, methods=("p-tuning",))
    write_predictions(other, "P36", {"p-tuning": [1, 1]}, ["s1", "elsewhere"])
    table = joined(run, other)
    asked = read_answers(table.rows[0], ["P36"])
    found = difference(asked, "p-tuning", "manual")
    assert found is not None
    assert (found.points, found.facts) == (100.0, 1)
    write_predictions(other, "P36", {"p-tuning": [1]}, ["elsewhere"])
    assert difference(read_answers(table.rows[0], ["P36"]), "p-tuning", "manual") is None
    assert compare(table.rows, table.relations) == []


def test_a_fact_counts_as_the_share_of_the_seeds_that_know_it(make_run):
    runs = [make_run(f"s{i}", {"manual": {"P36": 0.5}, "p-tuning": {"P36": 0.5}}, seed=i) for i in range(4)]
    for i, run in enumerate(runs):
        write_predictions(run, "P36", {"manual": [2, 1], "p-tuning": [1 if i < 3 else 2, 1]})
    asked = read_answers(joined(*runs).rows[0], ["P36"])
    assert asked.known["p-tuning"].tolist() == [0.75, 1.0]
    gap = difference(asked, "p-tuning", "manual")
    assert gap is not None
    assert gap.points == 37.5


def test_without_manual_prompts_the_two_best_are_compared(make_run):
    scores = {"lpaqa": {"P36": 0.5}, "autoprompt": {"P36": 1.0}, "mined": {"P36": 0.0}, "majority": {"P36": 0.9}}
    run = make_run("a", scores)
    write_predictions(run, "P36", {"lpaqa": [1, 2], "autoprompt": [1, 1], "mined": [2, 2]})
    table = joined(run)
    (found,) = compare(table.rows, table.relations)
    assert found.knowledge is not None
    assert (found.knowledge.first, found.knowledge.second) == ("lpaqa", "autoprompt")
    assert [(each.method, each.other) for each in found.differences] == [
        ("autoprompt", "lpaqa"), ("autoprompt", "mined")
    ]  # fmt: skip


def test_damaged_predictions_are_named(answered):
    table = joined(answered)
    for text in ('{"method": "manual"', '{"method": "manual"}\n', "[]\n"):
        (answered / "predictions" / "P36.jsonl").write_text(text)
        with pytest.raises(MegapromptError, match=r"P36\.jsonl: is damaged"):
            compare(table.rows, table.relations)


def test_line_separators_in_names_end_no_line(make_run):
    run = make_run("a", {"manual": {"P36": 1.0}, "p-tuning": {"P36": 1.0}})
    line = {"subject": "a\u2028b\x85c", "object": "o", "rank": 1, "probability": 1.0, "top": []}
    lines = [json.dumps({"method": method, **line}, ensure_ascii=False) + "\n" for method in ("manual", "p-tuning")]
    (run / "predictions").mkdir()
    (run / "predictions" / "P36.jsonl").write_text("".join(lines), encoding="utf-8")
    table = joined(run)
    (found,) = compare(table.rows, table.relations)
    assert found.knowledge is not None
    assert found.knowledge.counts[True, True] == 1
    assert math.isnan(found.knowledge.examples[True, True][0].answers[0].probability)


# ---------------------------------------------------------------------------------------------------- pages and command


def test_the_page_of_several_runs(answered, make_run, tmp_path, capsys):
    other = make_run("b", {"manual": {"P36": 0.1, "P30": 0.2}}, "gpt")
    out = tmp_path / "out"
    assert main(["report", str(answered), str(other), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out / "report.html")
    assert "p-tuning" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "types.png", "relations.png", "table.md", "table.tex", "table.csv"}
    page = Page(out / "report.html")
    assert page.rows(0) == {
        "backbone": ["MP", "P-tuning"], "tiny": ["18.8", "81.2 (+62.5)"], "gpt": ["15.0", "–"]
    }  # fmt: skip
    assert page.rows(2)["P36"] == ["p36", "N-1", "40", "37.5", "62.5"]
    prose = page.prose()
    assert "What tiny and gpt know of facts" in prose
    assert page.rows(6)["p-tuning − manual"][::3] == ["+62.5", "9"]
    assert not re.search(r"https?:|url\(|@import|\b(None|nan|Undefined)\b", page.text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not (answered / "report.html").exists()


def test_one_run_has_the_tables_and_comparison_too(answered, capsys, tmp_path):
    assert main(["report", str(answered)]) == 0
    assert capsys.readouterr().out.strip() == str(answered / "report.html")
    assert "| tiny | 18.8 | **81.2 (+62.5)** |" in (answered / "table.md").read_text()
    assert (answered / "table.tex").exists()
    assert (answered / "table.csv").exists()
    page = Page(answered / "report.html")
    assert page.rows(2) == {
        "": ["p-tuning knows", "does not"],
        "manual knows": ["2", "1"],
        "manual does not": ["4", "2"],
    }
    assert page.rows(4)["p-tuning − manual"][::3] == ["+62.5", "9"]
    assert main(["report", str(answered), "--out", str(tmp_path / "else")]) == 0
    assert (tmp_path / "else" / "report.html").read_text() == (answered / "report.html").read_text()


def test_wrong_use_of_report_is_said(make_run, tmp_path, capsys):
    runs = [str(make_run(name, {"manual": {"P36": 0.2}}, name)) for name in "ab"]
    for args, message in (
        ([], "give the directory of a run"),
        ([str(tmp_path / "none")], "holds no results.json"),
        ([*runs, str(tmp_path / "none")], "holds no results.json"),
        ([*runs, "--out", runs[0]], "holds a run with a report of its own"),
    ):
        assert main(["report", *args]) == 2, args
        assert message in capsys.readouterr().err
