"""Recall against the bytes of state that it takes, and against how long ago the answer was read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ctxkv_lightning.report.drawing import GREY, label_ends, label_points, save_png, styled
from ctxkv_lightning.report.looks import HEIGHT, SIZES, WIDTH, look, mark, width_for
from ctxkv_lightning.report.recall_tables import ASKED, Evaluation, mean_recall

DASHES = ((), (5, 2), (1, 1.5), (7, 2, 1, 2))
"""Of lines whose models look alike, one after the other."""


def write_figures(evaluations: Mapping[str, Evaluation], folder: Path) -> list[Path]:
    """Writes `recall.png` and `recall_by_lag.png` into a folder; nothing where no recall was asked for."""
    suites = [name for name in ASKED if any(name in each["suites"] for each in evaluations.values())]
    if not suites:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "recall.png", folder / "recall_by_lag.png"]
    with styled():
        for path, draw in zip(paths, (by_state, by_lag), strict=True):
            save_png(draw(evaluations, suites), path)
    return paths


def by_state(evaluations: Mapping[str, Evaluation], suites: Sequence[str]) -> Figure:
    """Mean recall over the lags by the bytes that a decoder keeps when it is asked, a panel for each suite."""
    figure, panels = _panels(evaluations, suites, WIDTH)
    for axes, suite in zip(panels, suites, strict=True):
        points = []
        for name, each in _asked(evaluations, suite):
            x, y = each["suites"][suite]["state_bytes"] / 1000, mean_recall(each["suites"][suite])
            mark(axes, x, y, look(each["model"]))
            points.append((x, y, name, look(each["model"]).colour))
        axes.set(xscale="log", xlabel="KB of state when asked (log)")
        axes.margins(x=0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        low, high = axes.get_xlim()
        label_points(axes, points, [(x, y) for x, y, *_ in points], [(low, _chance(evaluations, suite))] * 2)
        axes.set_xlim(low, high)
    return figure


def by_lag(evaluations: Mapping[str, Evaluation], suites: Sequence[str]) -> Figure:
    """Recall by the tokens between the answer and the question, a line for each run."""
    figure, panels = _panels(evaluations, suites, width_for(evaluations) + 0.6)
    for axes, suite in zip(panels, suites, strict=True):
        ends, seen = [], list[str]()
        for name, each in _asked(evaluations, suite):
            style, lags = look(each["model"]), each["suites"][suite]["lags"]
            x = [math.sqrt(lag["first"] * lag["last"]) for lag in lags]
            y = [lag["recall"]["value"] for lag in lags]
            dashes = DASHES[seen.count(each["model"]) % len(DASHES)]
            seen.append(each["model"])
            size = 0.7 * SIZES.get(style.marker, 7.5)
            axes.plot(x, y, color=style.colour, marker=style.marker, markersize=size, linewidth=1.6, dashes=dashes)
            ends.append(((y[-1], name, style.colour), x[-1]))
        axes.set(xscale="log", xlabel="tokens ago (log)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        label_ends(axes, [label for label, _ in ends], [x for _, x in ends])
    return figure


def _panels(evaluations: Mapping[str, Evaluation], suites: Sequence[str], width: float) -> tuple[Figure, list[Axes]]:
    """A panel for each suite, from nothing recalled to everything, with its chance level."""
    figure = Figure(figsize=(width * len(suites), HEIGHT), layout="constrained")
    panels = list(figure.subplots(1, len(suites), squeeze=False)[0])
    for axes, suite in zip(panels, suites, strict=True):
        chance = _chance(evaluations, suite)
        axes.axhline(chance, color=GREY, linewidth=1.2, dashes=(5, 2), zorder=1)
        axes.annotate(
            f"chance {chance:.1%}",
            (0.99, chance),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=9,
        )
        axes.set(ylim=(-0.03, 1.05), ylabel="recalled", title=ASKED[suite].format(K=round(1 / chance)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure, panels


def _asked(evaluations: Mapping[str, Evaluation], suite: str) -> list[tuple[str, Evaluation]]:
    return [(name, each) for name, each in evaluations.items() if suite in each["suites"]]


def _chance(evaluations: Mapping[str, Any], suite: str) -> float:
    return float(_asked(evaluations, suite)[0][1]["suites"][suite]["chance"])
