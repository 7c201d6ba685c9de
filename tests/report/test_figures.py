from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import pytest

from ctxkv_lightning.report import figures
from ctxkv_lightning.report.figures import draw_all
from tests.report.sample_metrics import model_metrics, sample_metrics

NAMES = ["pretrain", "spectrum", "perplexity", "attention"]


def test_every_figure_is_drawn_at_the_size_of_a_page(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    paths = draw_all(sample_metrics(), tmp_path / "deep" / "figures")
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 1080
        assert 600 <= height <= 750
    assert dict(matplotlib.rcParams) == before


def test_equal_numbers_give_equal_files(tmp_path: Path) -> None:
    first, second = (draw_all(sample_metrics(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    "sizes",
    [
        {"epochs": 1, "iterations": 1, "heads": 1, "max_contexts": 1},
        {"epochs": 2, "iterations": 60, "heads": 16, "max_contexts": 2, "interval": 1},
        {"heads": 1, "max_contexts": 200},
    ],
)
def test_degenerate_runs_have_all_figures(tmp_path: Path, sizes: dict[str, int]) -> None:
    assert [path.stem for path in draw_all(sample_metrics(**sizes), tmp_path)] == NAMES


def _no_attention(metrics: dict[str, Any]) -> None:
    del metrics["attention"]


def _no_history(metrics: dict[str, Any]) -> None:
    metrics["pretrain"]["history"] = []


def _no_spectrum(metrics: dict[str, Any]) -> None:
    metrics["pretrain"]["singular_values"] = [0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "missing"), [(_no_attention, "attention"), (_no_history, "pretrain"), (_no_spectrum, "spectrum")]
)
def test_a_figure_without_numbers_is_left_out_and_its_old_file_removed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], missing: str
) -> None:
    metrics = sample_metrics()
    change(metrics)
    (tmp_path / f"{missing}.png").touch()
    assert [path.stem for path in draw_all(metrics, tmp_path)] == [name for name in NAMES if name != missing]
    assert not (tmp_path / f"{missing}.png").exists()


def test_awkward_numbers_are_drawn(tmp_path: Path) -> None:
    metrics = sample_metrics()
    metrics["pretrain"]["singular_values"][-3:] = [1e-300, 0.0, 0.0]
    metrics["pretrain"]["history"][0]["convergence_rate"] = None
    metrics["train"]["epochs"][0].update(train_ppl=1e30, val_ppl=1e12)
    assert len(draw_all(metrics, tmp_path)) == 4


def test_a_collapsed_encoder_has_one_singular_value(tmp_path: Path) -> None:
    metrics = sample_metrics()
    metrics["pretrain"]["singular_values"] = [3.0]
    assert len(draw_all(metrics, tmp_path)) == 4


def test_perplexity_ticks_are_plain_numbers_even_on_a_narrow_axis() -> None:
    metrics = sample_metrics()
    for row in metrics["train"]["epochs"]:
        row.update(train_ppl=100.0 + row["epoch"], val_ppl=110.0 + row["epoch"])
    metrics["footing"].update(unigram_ppl=115.0, kneser_ney_ppl=112.0, kneser_ney_cache_ppl=104.0)
    figure = figures.perplexity(metrics)
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
    assert all("e" not in text.get_text() for text in axes.get_yticklabels())


def test_lines_name_themselves_and_the_best_epoch() -> None:
    figure = figures.perplexity(sample_metrics())
    assert figure is not None
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.texts]
    assert said == ["train  59.8", "Kneser-Ney + cache  128", "Kneser-Ney  407", "validation  484", "unigram  982"]
    assert axes.get_title() == "Best at epoch 5: validation PPL 361"


PER_HEAD = [1, 1, 5, 5, 20, 20, 80, 80]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, NAMES),
        ({"selection": "grid"}, NAMES),
        ({"interval": PER_HEAD}, NAMES),
        ({"interval": PER_HEAD, "max_contexts": 1}, NAMES),
        ({"model": "cascade"}, NAMES[:3]),
        ({"model": "recurrence"}, NAMES[:3]),
        ({"model": "transformer"}, ["perplexity"]),
        ({"model": "sliding_window"}, ["perplexity"]),
    ],
)
def test_each_model_has_the_figures_that_it_has_numbers_for(
    tmp_path: Path, choice: dict[str, Any], names: list[str]
) -> None:
    assert [path.stem for path in draw_all(model_metrics(**choice), tmp_path)] == names


def test_attention_lies_at_the_distances_that_are_given() -> None:
    figure = figures.attention(model_metrics(selection="grid", max_contexts=3))
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "tokens back, on average"
    assert list(figure.axes[0].lines[-1].get_xdata()) == [0, 20, 40]


def test_heads_of_one_interval_share_a_line() -> None:
    metrics = model_metrics(interval=PER_HEAD, max_contexts=4)
    figure = figures.attention(metrics)
    assert figure is not None
    (axes,) = figure.axes
    thick = [line for line in axes.lines if line.get_linewidth() == 2.6]
    assert [list(line.get_xdata()) for line in thick] == [[k * i for k in range(4)] for i in (1, 5, 20, 80)]
    weights = metrics["attention"]["slot_weights"]
    assert list(thick[1].get_ydata()) == [
        pytest.approx((a + b) / 2) for a, b in zip(weights[2], weights[3], strict=True)
    ]
    legend = axes.get_legend()
    assert legend is not None
    said = [text.get_text() for text in (*legend.get_texts(), *axes.texts)]
    assert said == ["2 heads, every 1", "2 heads, every 5", "2 heads, every 20", "2 heads, every 80", "uniform 1/4"]
    colours = [(text.get_color(), line.get_color()) for text, line in zip(legend.get_texts(), thick, strict=True)]
    assert all(one == other for one, other in colours)


def test_two_encoders_are_told_apart() -> None:
    figure = figures.pretrain(model_metrics("cascade"))
    assert figure is not None
    assert figure.axes[0].get_title().startswith("Phase 1, first encoder: 92 %")
