"""The figures of recall show each run where it is, with its chance level."""

import pytest

from ctxkv_lightning.report.drawing import styled
from ctxkv_lightning.report.recall_figure import by_lag, by_state
from ctxkv_lightning.report.recall_tables import tables


def estimate(value, count=10):
    return {"value": value, "error": 0.1, "count": count}


def evaluation(model, near, far, state, raised=None):
    lags = [
        {
            "first": lag,
            "last": lag,
            "recall": estimate(recall),
            "without": estimate(0.1),
            "gain": estimate(-0.001),
            "raised": None if raised is None else estimate(raised),
            "rank": None,
        }
        for lag, recall in ((1, near), (100, far))
    ]
    copy = {"chance": 0.1, "tokens": 150, "lags": lags, "state_bytes": state}
    return {"model": model, "suites": {"copy": copy}}


EVALUATIONS = {
    "ours": evaluation("context_kv", 1.0, 0.5, 4_000, 0.7),
    "theirs": evaluation("transformer", 0.4, 0.2, 8e6, 0.6),
}


def test_points_stand_at_their_bytes_and_their_recall():
    with styled():
        (axes,) = by_state(EVALUATIONS, ["copy"]).axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in "os"]
    assert points == [(4.0, pytest.approx(0.75)), (8000.0, pytest.approx(0.3))]
    assert axes.get_xscale() == "log"
    assert [0.1, 0.1] in [list(line.get_ydata()) for line in axes.lines]
    assert {"ours", "theirs", "chance"} <= {text.get_text() for text in axes.texts}


def test_lines_go_through_what_was_recalled_and_what_was_raised():
    with styled():
        recalled, raised = by_lag(EVALUATIONS, ["copy"]).axes
    drawn = [list(line.get_ydata()) for line in recalled.lines if line.get_marker() in "os"]
    assert drawn == [[1.0, 0.5], [0.4, 0.2]]
    assert [list(line.get_ydata()) for line in raised.lines if line.get_marker() in "os"] == [[0.7, 0.7], [0.6, 0.6]]
    assert len({line.get_marker() for line in recalled.lines if line.get_marker() in "os"}) == 2


def test_tables_have_a_row_for_each_lag_and_no_minus_before_a_zero():
    (title, recall), (_, gain) = tables(EVALUATIONS)
    assert "chance 10 %" in title
    cells = [list(column.cells) for column in recall.columns]
    assert cells[0] == ["1", "100", "mean", "never said", "state, bytes"]
    assert cells[2] == ["100.0 ± 10.0", "50.0 ± 10.0", "75.0", "10.0 ± 10.0", "4,000"]
    assert list(gain.columns[2].cells) == ["0.00 ± 0.10 (70 %)"] * 2


def test_sizes_of_one_model_are_joined_and_the_best_bears_the_name():
    sizes = {"small": (0.2, 1_000), "large": (0.6, 9_000), "middle": (0.9, 3_000)}
    runs = {name: evaluation("context_kv", recall, recall, state) for name, (recall, state) in sizes.items()}
    with styled():
        curves = {**dict.fromkeys(sizes, "ours"), "theirs": "theirs", "deep": "deep"}
        others = {"theirs": EVALUATIONS["theirs"], "deep": evaluation("context_kv", 0.5, 0.5, 0)}
        (axes,) = by_state({**runs, **others}, ["copy"], curves).axes
    joined = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) == 3]
    assert joined == [([1.0, 3.0, 9.0], [pytest.approx(0.2), pytest.approx(0.9), pytest.approx(0.6)])]
    assert {text.get_text() for text in axes.texts} == {"chance", "middle", "theirs", "deep"}
    assert axes.get_xticklabels()[0].get_text() == "0"
    assert axes.get_xticks()[0] == 0.125, "left of the least that is kept"
