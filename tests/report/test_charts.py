"""Charts of one run and of several."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from megaprompt.report.charts import learning_chart, relations_chart, scores_chart, types_chart
from megaprompt.report.sizes_chart import sizes_chart
from megaprompt.report.table2 import Table2
from tests.report.made_up import change, joined, log_line, make_results


def test_dollars_in_labels_are_no_formulas():
    results = make_results({"manual": {"P1": 0.5}}, P1="$a_{$")
    scores, learning = scores_chart(results), learning_chart(results, [log_line("P1", 1, 0.5)])
    for figure in (scores, learning):
        FigureCanvasAgg(figure).draw()  # raises for a wrong formula
    assert scores.axes[0].get_yticklabels()[0].get_text() == learning.axes[0].get_title() == "P1 $a_{$"


def test_learning_curves_mark_what_was_chosen(results):
    log = [
        log_line("P30", 1, 0.1, best=True),
        log_line("P36", 1, 0.25, best=True, loss=3.0),
        log_line("P36", 2, 0.5, best=True, loss=2.0),
        log_line("P36", 3, 0.5, loss=None),
        log_line("P36", 4, None, loss=0.5),
    ]
    figure = learning_chart(results, log)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["P36 capital", "P30 p30"]
    dev, dot = figure.axes[0].lines
    assert dev.get_xydata()[:3].tolist() == [[10, 25], [20, 50], [30, 50]]
    assert dot.get_xydata().tolist() == [[20, 50]]
    loss = figure.axes[1].lines[0].get_ydata()
    assert loss[[0, 1, 3]].tolist() == [3.0, 2.0, 0.5]


def test_bars_have_the_lengths_of_the_scores(results):
    results["methods"]["manual"]["relations"]["P30"]["p_at_1"] = None
    axes = scores_chart(results).axes[0]
    lengths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert list(lengths) == ["majority", "manual", "p-tuning"]
    assert lengths["p-tuning"] == pytest.approx([50, 62.54, 56.27])
    assert lengths["manual"] == pytest.approx([53.8, 0, 51.9])
    assert [text.get_text() for text in axes.texts] == ["0", "25", "12", "54", "–", "52", "50", "63", "56"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["P36 capital", "P30 p30", "macro mean"]


@pytest.mark.parametrize(("relations", "methods"), [(1, 1), (41, 6)])
def test_bar_labels_do_not_overlap(relations, methods):
    names = [f"P{100 + i}" for i in range(relations)]
    labels = dict.fromkeys(names, "located in the administrative territorial entity of a very long name")
    known = ("majority", "manual", "fine-tuning", "p-tuning", "new", "newer")[:methods]
    scores = {m: {n: (i + k) % 10 / 9 for k, n in enumerate(names)} for i, m in enumerate(known)}
    figure = scores_chart(make_results(scores, **labels))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    assert len(axes.texts) == methods * (relations + (relations > 1))
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == methods
    for texts in (axes.texts, axes.get_yticklabels()):
        boxes = sorted((text.get_window_extent(canvas.get_renderer()) for text in texts), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= figure.bbox.x1


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


def of_size(run, parameters):
    change(run, lambda results: results["backbone"].update(parameters=parameters))
    return run


def test_scores_by_the_size_of_the_model(make_run):
    methods = ("majority", "manual", "best", "p-tuning")
    scores = {size: {m: {"P1": 0.1 * i + size / 1e12} for i, m in enumerate(methods)} for size in (135e6, 11e9, 3e8)}
    runs = [
        of_size(make_run(f"{size:.0f}", of, f"hub/a model of {size:.0f}"), int(size)) for size, of in scores.items()
    ]
    figure = sizes_chart(joined(*runs))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    lines = [container.lines[0] for container in axes.containers]
    assert [list(line.get_xdata()) for line in lines] == [[135e6, 3e8, 11e9]] * len(methods)
    assert lines[1].get_ydata() == pytest.approx([10.0135, 10.03, 11.1])
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        "a model of 135000000",
        "a model of 300000000",
        "a model of 11000000000",
        *methods[:2],
        "best",
        "p-tuning",
    ]
    assert {"200M", "10B"} <= {label.get_text() for label in axes.get_xticklabels()}


def test_models_of_one_size_have_no_such_chart(make_run):
    runs = [make_run(name, {"manual": {"P1": 0.5}}, name) for name in ("one", "two")]
    assert sizes_chart(joined(*runs)) is None
    of_size(runs[0], None)  # as versions before wrote
    assert sizes_chart(joined(*runs)) is None


def test_names_of_methods_with_the_same_score_stand_apart(make_run):
    methods = ("manual", "in-context", "p-tuning", "best")
    runs = [of_size(make_run(str(n), {m: {"P1": 0.5} for m in methods}, str(n)), n * 10**8) for n in (1, 2)]
    figure = sizes_chart(joined(*runs))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text() in methods]
    boxes = [Text.get_window_extent(name, canvas.get_renderer()) for name in names]  # without its line
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
