import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from ctxkv_lightning.report.axis_figure import axis_figure
from ctxkv_lightning.report.drawing import PALETTE, styled
from ctxkv_lightning.report.gap_figure import MOST_GROUPS, gap_figure
from ctxkv_lightning.report.groups import along, axes_of, differing, grouped
from ctxkv_lightning.report.looks import Drawn, look
from ctxkv_lightning.report.memory_figure import memory_figures, pareto
from ctxkv_lightning.report.runs import Run, as_run
from ctxkv_lightning.report.saturation import series_of
from ctxkv_lightning.report.saturation_figure import saturation_figure
from ctxkv_lightning.report.words import short_names
from tests.report.sample_metrics import model_metrics

PER_HEAD = [1, 1, 5, 5, 20, 20, 80, 80]


def run(val_ppl: float | None = None, **choice: Any) -> Run:
    return as_run("x", model_metrics(val_ppl=val_ppl, **choice))


def memory(runs: list[Run]) -> list[Drawn]:
    keys = differing(runs)
    with styled():
        return memory_figures(grouped(runs, keys), short_names(keys))


def axis(runs: list[Run], key: str) -> Drawn:
    keys = differing(runs)
    groups = grouped(runs, keys)
    axes = axes_of(groups, keys)
    (found,) = [each for each in axes if each.key == key]
    with styled():
        return axis_figure(found, along(found, groups, axes), short_names(keys))


def points(axes: Axes) -> list[tuple[float, float]]:
    """What is drawn as a rimmed mark."""
    rimmed = [
        line for line in axes.lines if line.get_markeredgewidth() == 0.8 and line.get_marker() not in ("None", "_")
    ]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in rimmed]


@given(st.lists(st.tuples(st.integers(1, 9).map(float), st.integers(1, 9).map(float)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(found: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    front = [found[i] for i in pareto(found)]
    assert front == sorted({point for point in found if not any(beats(other, point) for other in found)})


def test_memory_shows_every_group_at_its_bytes() -> None:
    runs = [run(150, model="transformer"), run(200, seed=1), run(210, seed=2), run(300, model="recurrence")]
    (drawn,) = memory(runs)
    (axes,) = drawn.figure.axes
    assert drawn.name == "memory"
    assert points(axes) == [
        pytest.approx((10_000 * 2 * 768 * 4 / 1000, 150)),
        pytest.approx((621 * 256 * 4 / 1000, 205)),
        pytest.approx((256 * 4 / 1000, 300)),
    ]
    assert [text.get_text() for text in axes.texts] == ["transformer", "context_kv", "recurrence"]
    assert axes.get_xscale() == "log"
    assert axes.get_title("left") == "3 of 3 on the Pareto front"
    assert "one standard deviation" in drawn.caption
    (bar,) = [line for line in axes.lines if line.get_marker() == "_"]
    assert list(bar.get_ydata()) == [pytest.approx(205 - 5 * math.sqrt(2)), pytest.approx(205 + 5 * math.sqrt(2))]


def test_memories_that_are_all_but_equal_look_so_on_an_axis_with_numbers() -> None:
    others = model_metrics("recurrence", val_ppl=240)
    others["decode_state"]["bytes"]["10000"] = 640_000
    (drawn,) = memory([run(200), as_run("y", others)])
    (axes,) = drawn.figure.axes
    low, high = axes.get_xlim()
    assert high / low == pytest.approx(math.sqrt(2))
    assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) >= 2


def test_each_amount_of_text_has_a_front_of_its_own() -> None:
    runs = [
        run(100 + n, model=model, samples=n) for n in (50, 100, 250, 500, 800) for model in ("cascade", "transformer")
    ]
    drawn = memory([*runs, run(7, model="cascade", samples=9)])
    assert [each.name for each in drawn] == ["memory-800", "memory-500", "memory-250", "memory-100"]
    assert drawn[0].figure.axes[0].get_title("left") == "800 documents: 1 of 2 on the Pareto front"


def test_of_one_model_the_front_is_named_by_its_settings() -> None:
    (drawn,) = memory([run(300, max_contexts=8), run(200, max_contexts=16), run(250, max_contexts=32)])
    assert [text.get_text() for text in drawn.figure.axes[0].texts] == ["max_contexts 8", "max_contexts 16"]


def test_memory_needs_two_configurations_that_say_their_bytes() -> None:
    silent = model_metrics("cascade")
    del silent["decode_state"]
    assert memory([run(1), as_run("x", silent)]) == []


def test_a_line_ends_at_its_name_and_a_seed_is_a_dot() -> None:
    runs = [
        run(i + 100 * m, interval=i, max_contexts=m, seed=seed)
        for i in (20, 50, 300)
        for m in (1, 2)
        for seed in (1, 2)
    ]
    drawn = axis(runs, "interval")
    (axes,) = drawn.figure.axes
    assert drawn.name == "axis-interval"
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["max_contexts 1", "max_contexts 2"]
    assert [text.get_color() for text in axes.texts] == [PALETTE[0], PALETTE[-1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "50", "300"]
    assert sorted(points(axes)) == [(float(i), pytest.approx(i + 100 * m)) for i in (20, 50, 300) for m in (1, 2)]
    assert sum(line.get_markersize() == 3.5 for line in axes.lines) == 6
    assert "all other settings alike along a line. Small dots are single seeds" in drawn.caption


def test_a_line_alone_has_its_values_written() -> None:
    drawn = axis([run(200, interval=20), run(150, interval=30)], "interval")
    assert [text.get_text() for text in drawn.figure.axes[0].texts] == ["200", "150"]
    assert drawn.caption == "Validation PPL by interval."


def test_the_caption_names_what_seeds_do_not_tell_from_the_lowest() -> None:
    runs = [run(ppl + seed, interval=i, seed=seed) for i, ppl in ((20, 200), (50, 202), (80, 210)) for seed in (1, 2)]
    assert axis(runs, "interval").caption.endswith("Seeds do not tell 20 from 50.")
    assert "Seeds do not tell" not in axis([each for each in runs if each.settings["seed"] == 1], "interval").caption


def test_a_long_title_has_a_second_line_and_no_tick_is_without_a_point() -> None:
    runs = [run(200, interval=20), run(150, interval=PER_HEAD), run(120, interval=7, max_contexts=8)]
    keys = differing(runs)
    groups = grouped(runs, keys)
    axes = axes_of(groups, keys)
    (found,) = [each for each in axes if each.key == "interval"]
    with styled():
        drawn = axis_figure(found, along(found, groups, axes), short_names(keys), samples=1000)
    (panel,) = drawn.figure.axes
    assert panel.get_title("left") == "interval, 1,000 documents: lowest PPL 150, at\n[1,1,5,5,20,20,80,80]"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["20", "1,1,5,5,20,20,80,80"]
    assert drawn.name == "axis-interval-1000"
    assert drawn.caption.startswith("Validation PPL by interval with 1,000 documents.")


def test_lists_are_categories_and_models_without_the_key_lines_across() -> None:
    runs = [run(200, interval=20), run(150, interval=PER_HEAD), run(120, model="transformer")]
    drawn = axis(runs, "interval")
    (axes,) = drawn.figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "1,1,5,5,20,20,80,80"]
    assert points(axes) == [(0.0, pytest.approx(200)), (1.0, pytest.approx(150))]
    assert "transformer" in [text.get_text() for text in axes.texts]
    assert "Dashed across: the best of each model that has no interval." in drawn.caption


def test_many_names_stand_on_two_levels() -> None:
    runs = [run(model=model) for model in ("context_kv", "cascade", "transformer", "sliding_window", "recurrence")]
    labels = [label.get_text() for label in axis(runs, "model.name").figure.axes[0].get_xticklabels()]
    assert [label.startswith("\n") for label in labels] == [False, True, False, True, False]
    assert sorted(label.strip() for label in labels) == sorted(str(each.settings["model.name"]) for each in runs)


def test_captions_own_up_to_what_is_left_out() -> None:
    many = [run(100 + i + m, interval=i, max_contexts=m) for i in (20, 50) for m in range(1, 10)]
    assert "the best of each value, whatever else varies with it" in axis(many, "interval").caption
    few = [run(1, interval=20), run(2, interval=50), run(3, interval=20, max_contexts=8)]
    assert "Left out: 1 combination with only one value of interval." in axis(few, "interval").caption
    both = [run(1, interval=20, max_contexts=8), run(2, interval=50, max_contexts=9)]
    assert "Always changed together with interval: max_contexts." in axis(both, "interval").caption
    own = [run(1, interval=20), run(2, interval=50), run(3, model="cascade")]
    assert "Where only some have interval, each point is the best of them." in axis(own, "model.name").caption


def gap(runs: list[Run], labels: list[str]) -> Drawn:
    with styled():
        return gap_figure(grouped(runs, differing(runs)), labels)


@pytest.mark.parametrize("count", [1, 3, MOST_GROUPS + 5])
def test_the_gap_is_drawn_from_train_to_validation(count: int) -> None:
    runs = [run(200 + i, interval=i) for i in range(1, count + 1)]
    drawn = gap(runs, [f"run {i}" for i in range(count)])
    (axes,) = drawn.figure.axes
    shown = min(count, MOST_GROUPS)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"run {i}" for i in range(shown)]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in lines] == [[each.train_ppl, each.val_ppl] for each in runs[:shown]]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    ratios = [f"{each.val_ppl / each.train_ppl:.2f} ×" for each in runs[:shown]]
    assert [text.get_text() for text in axes.texts][:shown] == ratios
    assert (f"The best {MOST_GROUPS} of {count} combinations." in drawn.caption) == (count > MOST_GROUPS)
    assert "means" not in drawn.caption


def test_the_gap_of_seeds_is_drawn_once_as_their_mean() -> None:
    runs = [run(200.0, interval=5, seed=1), run(240.0, interval=5, seed=2), run(300.0, interval=9, seed=1)]
    drawn = gap(runs, ["five", "nine"])
    (axes,) = drawn.figure.axes
    first, second = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert list(first.get_xdata()) == pytest.approx([(runs[0].train_ppl + runs[1].train_ppl) / 2, 220.0])
    assert second.get_xdata()[1] == 300.0
    assert drawn.caption.endswith("beside, as means over seeds.")


def test_long_labels_of_the_gap_are_broken_between_settings() -> None:
    label = "context_kv · samples 500 · interval [1,1,5,5,20,20,80,80] · strided · max_contexts 32 · seed 42"
    drawn = gap([run(200)], [label])
    with styled():
        drawn.figure.draw_without_rendering()
    (axes,) = drawn.figure.axes
    lines = axes.get_yticklabels()[0].get_text().splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(lines) == label
    assert axes.get_position().width > 0.4


def test_a_curve_is_drawn_over_its_points() -> None:
    runs = [run(95.4 + 10_000 * n**-0.778, model="cascade", samples=n) for n in (200, 400, 800, 1600)]
    keys = differing(runs)
    with styled():
        drawn = saturation_figure(series_of(grouped(runs, keys)), short_names(keys))
    (axes,) = drawn.figure.axes
    assert axes.get_title("left").startswith("PPL = 95.4")
    curves = [line for line in axes.lines if len(line.get_xdata()) == 61]
    for curve in curves:
        for n, ppl in zip(curve.get_xdata(), curve.get_ydata(), strict=True):
            assert ppl == pytest.approx(95.4 + 10_000 * n**-0.778, rel=1e-5)
    assert [curve.get_xdata()[-1] for curve in curves] == pytest.approx([1600, 3200])
    assert {curve.get_color() for curve in curves} == {look("cascade").colour}
    assert sorted(points(axes)) == [(float(each.settings["samples"]), pytest.approx(each.val_ppl)) for each in runs]


def test_series_without_a_fit_are_drawn_all_the_same() -> None:
    runs = [run(300, samples=50), run(200, samples=500), run(320, model="cascade", samples=50), run(9, model="cascade")]
    keys = differing(runs)
    with styled():
        drawn = saturation_figure(series_of(grouped(runs, keys)), short_names(keys))
    assert sorted(text.get_text() for text in drawn.figure.axes[0].texts) == ["cascade", "context_kv"]
