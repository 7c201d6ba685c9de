import math
from typing import Any

import pytest

from ctxkv_lightning.report.groups import Axis, Group, Swept, along, axes_of, differing, grouped, texts_of
from ctxkv_lightning.report.runs import Run, as_run
from ctxkv_lightning.report.words import enumerated, phrases, short_names, written
from tests.report.sample_metrics import model_metrics


def run(val_ppl: float, **choice: Any) -> Run:
    return as_run("x", model_metrics(val_ppl=val_ppl, **choice))


def swept(runs: list[Run], key: str) -> tuple[Axis, Swept]:
    keys = differing(runs)
    groups = grouped(runs, keys)
    axes = axes_of(groups, keys)
    (axis,) = [axis for axis in axes if axis.key == key]
    return axis, along(axis, groups, axes)


def ppls(found: Swept) -> list[list[tuple[Any, float]]]:
    return [[(value, round(group.val_ppl.mean, 6)) for value, group in line.points] for line in found.lines]


def test_only_keys_that_differ_are_named_the_model_first_and_the_seed_last() -> None:
    runs = [run(1, seed=1), run(2, seed=2, interval=50), run(3, model="cascade", seed=1)]
    assert differing(runs) == ["model.name", "interval", "seed"]
    assert differing(runs[:1]) == []


def test_a_key_that_old_metrics_lack_does_not_differ() -> None:
    old = model_metrics()
    del old["config"]["selection"]
    assert differing([as_run("old", old), run(5)]) == []


def test_a_key_that_a_model_does_not_read_does_not_differ() -> None:
    assert differing([run(1, interval=20), run(2, model="transformer", interval=50)]) == ["model.name"]


def test_seeds_are_grouped_as_mean_and_sample_standard_deviation() -> None:
    runs = [run(100, seed=1), run(104, seed=2), run(111, seed=3), run(50, interval=5, seed=1)]
    alone, three = grouped(runs, differing(runs))
    assert alone.settings == {"interval": 5}
    assert (alone.val_ppl.mean, alone.val_ppl.spread, alone.val_ppl.seeds) == (pytest.approx(50), None, 1)
    assert three.val_ppl.mean == pytest.approx(105)
    assert three.val_ppl.spread == pytest.approx(math.sqrt((5**2 + 1**2 + 6**2) / 2))
    assert three.val_ppl.seeds == 3


def test_a_seed_that_ran_twice_counts_once() -> None:
    runs = [run(100, seed=1), run(104, seed=1), run(110, seed=2)]
    (group,) = grouped(runs, differing(runs))
    assert group.val_ppl.mean == pytest.approx(106)
    assert group.val_ppl.spread == pytest.approx(math.sqrt(2 * 4**2))
    assert group.val_ppl.seeds == 2


def test_keys_that_change_together_share_an_axis() -> None:
    runs = [run(1, interval=20, max_contexts=32), run(2, interval=50, max_contexts=16), run(3, samples=200)]
    axes = axes_of(grouped(runs, differing(runs)), differing(runs))
    assert [(axis.key, axis.companions) for axis in axes] == [("interval", ("max_contexts",)), ("samples", ())]


def test_what_the_model_alone_decides_is_no_axis_of_its_own() -> None:
    """Of recurrence with another rate than the rest: both would be compared, at whatever number of documents."""

    def rated(val_ppl: float, rate: float, **choice: Any) -> Run:
        metrics = model_metrics(val_ppl=val_ppl, **choice)
        metrics["config"]["train"]["lr"] = rate
        return as_run("x", metrics)

    runs = [rated(5, 0.1), rated(4, 0.1, samples=200), rated(6, 0.1, model="transformer")]
    runs.append(rated(7, 0.2, model="recurrence"))
    axes = axes_of(grouped(runs, differing(runs)), differing(runs))
    assert [(axis.key, axis.companions) for axis in axes] == [("model.name", ("train.lr",)), ("samples", ())]
    runs.append(rated(3, 0.2))
    axes = axes_of(grouped(runs, differing(runs)), differing(runs))
    assert [axis.key for axis in axes] == ["model.name", "samples", "train.lr"]


@pytest.mark.parametrize(
    ("values", "scale", "order"),
    [
        ([100, 20, 50], "linear", (20, 50, 100)),
        ([16, 160], "linear", (16, 160)),
        ([16, 161], "log", (16, 161)),
        ([20, [5] * 8, 5], "category", (5, 20, (5,) * 8)),
    ],
)
def test_axes_are_numeric_where_they_can_be(values: list[Any], scale: str, order: tuple[Any, ...]) -> None:
    axis, _ = swept([run(10 + i, interval=value) for i, value in enumerate(values)], "interval")
    assert (axis.scale, axis.values) == (scale, order)


def test_a_zero_among_wide_numbers_makes_categories() -> None:
    runs = []
    for decay in (0.1, 0.0, 0.001):
        metrics = model_metrics(val_ppl=100 + decay)
        metrics["config"]["train"]["weight_decay"] = decay
        runs.append(as_run("x", metrics))
    axis, found = swept(runs, "train.weight_decay")
    assert (axis.scale, axis.values) == ("category", (0.0, 0.001, 0.1))
    assert ppls(found) == [[(0.0, 100.0), (0.001, 100.001), (0.1, 100.1)]]


def test_names_are_in_the_order_of_their_best() -> None:
    axis, _ = swept([run(3, model="cascade"), run(1, model="transformer"), run(2)], "model.name")
    assert axis.values == ("transformer", "context_kv", "cascade")


@pytest.mark.parametrize("better", [False, True])
def test_a_switch_is_off_and_then_on_whichever_is_better(better: bool) -> None:
    made = []
    for value in (True, False):
        metrics = model_metrics(val_ppl=1.0 if value is better else 2.0)
        metrics["config"].setdefault("recipe", {})["read_current"] = value
        made.append(as_run("x", metrics))
    assert swept(made, "recipe.read_current")[0].values == (False, True)


def test_one_line_for_each_combination_of_the_others() -> None:
    grid = {(i, m): i + m / 100 for i in (20, 50, 100) for m in (16, 32)}
    _, found = swept([run(ppl, interval=i, max_contexts=m) for (i, m), ppl in grid.items()], "interval")
    assert [line.settings for line in found.lines] == [{"max_contexts": 16}, {"max_contexts": 32}]
    assert ppls(found) == [[(i, grid[i, m]) for i in (20, 50, 100)] for m in (16, 32)]
    assert (found.left_out, found.best_only, found.references) == (0, False, [])


def test_a_combination_with_one_value_is_left_out() -> None:
    _, found = swept([run(1, interval=20), run(2, interval=50), run(3, interval=20, max_contexts=8)], "interval")
    assert ppls(found) == [[(20, 1.0), (50, 2.0)]]
    assert found.lines[0].settings == {}
    assert found.left_out == 1


def test_more_combinations_than_eight_leave_the_best_of_each_value() -> None:
    runs = [run(100 + i + m, interval=i, max_contexts=m) for i in (20, 50) for m in range(1, 10)]
    _, found = swept(runs, "interval")
    assert found.best_only
    assert ppls(found) == [[(20, 121.0), (50, 151.0)]]
    _, eight = swept([each for each in runs if each.settings["max_contexts"] < 9], "interval")
    assert not eight.best_only
    assert len(eight.lines) == 8


def test_models_without_the_key_are_references_by_their_best() -> None:
    runs = [run(1, interval=20), run(2, interval=50), run(8, model="cascade")]
    for ppl, tokens in ((9, 100), (7, 50)):
        metrics = model_metrics(val_ppl=ppl, model="sliding_window")
        metrics["config"]["model"]["window_tokens"] = tokens
        runs.append(as_run("x", metrics))
    _, found = swept(runs, "interval")
    assert [(group.model, group.val_ppl.mean) for group in found.references] == [
        ("sliding_window", pytest.approx(7)),
        ("cascade", pytest.approx(8)),
    ]


def test_references_are_of_the_text_that_the_lines_are_of() -> None:
    """A model that read five times as much is no rival of those along the axis."""
    runs = [run(5, interval=20), run(4, interval=50), run(6, model="transformer"), run(3, model="cascade", samples=500)]
    _, found = swept(runs, "interval")
    assert [(group.model, group.val_ppl.mean) for group in found.references] == [("transformer", 6)]
    _, both = swept([*runs, run(2, interval=20, samples=500), run(1, interval=50, samples=500)], "interval")
    assert [group.model for group in both.references] == ["cascade", "transformer"]


def test_texts_are_apart_the_most_documents_first() -> None:
    runs = [run(5, interval=20), run(4, interval=50), run(9, samples=7)]
    runs += [run(n, interval=i, samples=n) for n in (300, 500, 800, 40) for i in (20, 50)]
    found = texts_of(grouped(runs, differing(runs)))
    assert [text.samples for text in found] == [800, 500, 300, 100], "four at most, and none of one group"
    assert [[group.settings["interval"] for group in text.groups] for text in found[-1:]] == [[50, 20]]
    alike = grouped(runs[:2], differing(runs[:2]))
    assert texts_of(alike) == [(None, alike)]
    assert texts_of(alike[:1]) == []


def test_a_model_with_settings_of_its_own_shows_its_best() -> None:
    runs = [run(5, interval=20), run(4, interval=50), run(6, model="transformer"), run(3, model="cascade")]
    _, found = swept(runs, "model.name")
    assert ppls(found) == [[("cascade", 3.0), ("context_kv", 4.0), ("transformer", 6.0)]]
    assert found.own == ("interval",)
    assert not found.best_only
    assert found.lines[0].model is None


def test_a_line_of_one_model_knows_it() -> None:
    _, found = swept([run(5, interval=20), run(4, interval=50)], "interval")
    assert found.lines[0].model == "context_kv"


def test_groups_are_best_first() -> None:
    runs = [run(100 - i, interval=i) for i in (20, 50, 5)]
    assert [group.settings["interval"] for group in grouped(runs, ["interval"])] == [50, 20, 5]
    assert all(isinstance(group, Group) for group in grouped(runs, ["interval"]))


def test_short_names_stay_clear() -> None:
    names = short_names(["model.name", "tokenizer.source", "data.source", "train.lr", "seed"])
    assert names == {
        "model.name": "model",
        "tokenizer.source": "tokenizer.source",
        "data.source": "data.source",
        "train.lr": "lr",
        "seed": "seed",
    }


def test_settings_read_as_words() -> None:
    names = short_names(["model.name", "interval", "samples", "seed", "train.lr"])
    chosen = {"model.name": "cascade", "interval": (1, 5), "samples": 1000, "train.lr": 1e-05, "seed": 12345}
    assert phrases(chosen, names) == "cascade · interval [1,5] · samples 1,000 · lr 1e-05 · seed 12345"
    assert [written(value) for value in (None, True, 0.5)] == ["null", "true", "0.5"]
    assert [enumerated(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
