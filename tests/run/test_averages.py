from megaprompt.run.averages import summarize

METRICS = ["p_at_1", "p_at_10", "mrr"]


def test_averages():
    rows = {
        "P1": {"type": "1-1", "facts": 1, "p_at_1": 1.0, "p_at_10": 1.0, "mrr": 1.0, "dev_p_at_1": None},
        "P2": {"type": "N-1", "facts": 3, "p_at_1": 0.0, "p_at_10": 1.0, "mrr": 0.5, "dev_p_at_1": 0.5},
    }
    summary = summarize(rows, METRICS)
    assert summary["macro"]["p_at_1"] == 0.5
    assert summary["micro"]["p_at_1"] == 0.25
    assert summary["macro"]["relations"] == 2
    assert summary["by_type"]["N-1"] == {"relations": 1, "p_at_1": 0.0, "p_at_10": 1.0, "mrr": 0.5, "dev_p_at_1": 0.5}


def test_a_task_without_a_score_is_left_out_and_counted():
    scored = {"type": "", "facts": 3, "p_at_1": 0.5, "p_at_10": 1.0, "mrr": 0.75, "dev_p_at_1": 0.5}
    retired = {"type": "", "facts": 9, **dict.fromkeys([*METRICS, "dev_p_at_1"])}
    summary = summarize({"P1": scored, "P2": retired}, METRICS)
    assert (summary["micro"]["p_at_1"], summary["micro"]["relations"]) == (0.5, 1)
    assert summarize({"P2": retired}, METRICS)["macro"] == {"relations": 0, **dict.fromkeys([*METRICS, "dev_p_at_1"])}
