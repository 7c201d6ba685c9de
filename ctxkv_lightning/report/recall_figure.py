"""Recall against the bytes of state that it takes, and against how long ago the answer was read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ctxkv_lightning.report.drawing import GREY, PointLabel, label_ends, label_points, save_png, styled
from ctxkv_lightning.report.looks import HEIGHT, SIZES, WIDTH, look, mark, width_for
from ctxkv_lightning.report.memory_figure import kilobyte_ticks
from ctxkv_lightning.report.recall_tables import ASKED, Evaluation, mean_recall

DASHES = ((), (5, 2), (1, 1.5), (7, 2, 1, 2))
"""Of lines whose models look alike, one after the other."""

MEASURES = {"recall": "found likeliest", "raised": "made likelier than any other"}
"""What is drawn by lag, and what it is called."""


def write_figures(evaluations: Mapping[str, Evaluation], folder: Path) -> list[Path]:
    """Writes `recall.png` and `recall_by_lag.png` into a folder; nothing where no recall was asked for."""
    suites = [suite for suite in ASKED if _asked(evaluations, suite)]
    if not suites:
        return []
    paths = [folder / "recall.png", folder / "recall_by_lag.png"]
    with styled():
        for path, draw in zip(paths, (by_state, by_lag), strict=True):
            save_png(draw(evaluations, suites), path)
    return paths


def by_state(
    evaluations: Mapping[str, Evaluation], suites: Sequence[str], curves: Mapping[str, str] | None = None
) -> Figure:
    """Recall over all lags by the bytes that a decoder keeps when it is asked, a panel for each suite.

    `curves` says of each run what it is a size of: a line joins the sizes, and the best bears its name. Without it
    many may lie side by side, at chance: their names stand in a column.
    """
    figure, panels = _panels(len(suites), 1.6 * WIDTH if curves else width_for(evaluations) + 0.6)
    for axes, suite in zip(panels, suites, strict=True):
        chance = _frame(axes, evaluations, suite, MEASURES["recall"])
        points, nothing = [], _place_of_nothing(evaluations, suite)
        for name, each in _asked(evaluations, suite):
            x, y = each["suites"][suite]["state_bytes"] / 1000 or nothing, mean_recall(each["suites"][suite])
            mark(axes, x, y, look(each["model"]))
            points.append((x, y, name, look(each["model"]).colour))
        places = [(x, y) for x, y, *_ in points]
        axes.set(xscale="log", xlabel="KB of state when asked (log)")
        beside = 20 if curves else 3  # room for the name of chance, and for those of points at the right
        axes.set_xlim(min(places)[0] / beside, max(places)[0] * beside)
        kilobyte_ticks(axes)
        if nothing in [x for x, _ in places]:
            _tick_nothing(axes, nothing)
        if curves:
            figure.draw_without_rendering()
            line = [(x, _chance(evaluations, suite)) for x in axes.get_xlim()]
            label_points(axes, _joined(axes, points, curves), places, [line, _middle(axes, chance)])
        else:
            label_ends(axes, [(y, name, colour) for _, y, name, colour in points], [x for x, *_ in points])
    return figure


def _place_of_nothing(evaluations: Mapping[str, Evaluation], suite: str) -> float:
    """KB, left of all others, where a run is drawn that keeps no byte."""
    kept = [each["suites"][suite]["state_bytes"] for _, each in _asked(evaluations, suite)]
    return min(filter(None, kept), default=1000) / 8000


def _tick_nothing(axes: Axes, place: float) -> None:
    """A tick "0" at this place, and none between it and the least that is kept."""
    ticks = [place, *(tick for tick in axes.get_xticks() if tick > 4 * place)]
    axes.set_xticks(ticks, ["0", *(f"{tick:,g}" if tick < 10 else f"{tick:,.0f}" for tick in ticks[1:])])


def _joined(axes: Axes, points: Sequence[PointLabel], curves: Mapping[str, str]) -> list[PointLabel]:
    """Draws a line through the points of each curve, by x; returns the highest of each."""
    found: dict[str, list[PointLabel]] = {}
    for point in sorted(points):
        found.setdefault(curves[point[2]], []).append(point)
    for curve in found.values():
        axes.plot([x for x, *_ in curve], [y for _, y, *_ in curve], color=curve[0][3], linewidth=1.2, zorder=2)
    return [max(curve, key=lambda point: point[1]) for curve in found.values()]


def _middle(axes: Axes, text: Annotation) -> list[tuple[float, float]]:
    """The line along a text that has been laid out, which other texts shall not cross."""
    box = axes.transData.inverted().transform_bbox(text.get_window_extent())
    return [(x, (box.y0 + box.y1) / 2) for x in (box.x0, box.x1)]


def by_lag(evaluations: Mapping[str, Evaluation], suites: Sequence[str]) -> Figure:
    """What was found, and what reading it changed, by the tokens between answer and question, a line for each run."""
    shown = [
        (suite, measure)
        for measure in MEASURES
        for suite in suites
        if _asked(evaluations, suite)[0][1]["suites"][suite]["lags"][0][measure] is not None
    ]
    figure, panels = _panels(len(shown), width_for(evaluations) + 0.6)
    for axes, (suite, measure) in zip(panels, shown, strict=True):
        _frame(axes, evaluations, suite, MEASURES[measure])
        _draw_lines(axes, _asked(evaluations, suite), suite, measure)
    return figure


def _draw_lines(axes: Axes, asked: Sequence[tuple[str, Evaluation]], suite: str, measure: str) -> None:
    ends, labels, seen = [], [], list[str]()
    for name, each in asked:
        style, lags = look(each["model"]), each["suites"][suite]["lags"]
        x = [math.sqrt(lag["first"] * lag["last"]) for lag in lags]
        y = [lag[measure]["value"] for lag in lags]
        dashes = DASHES[seen.count(each["model"]) % len(DASHES)]
        seen.append(each["model"])
        size = 0.7 * SIZES.get(style.marker, 7.5)
        axes.plot(x, y, color=style.colour, marker=style.marker, markersize=size, linewidth=1.6, dashes=dashes)
        labels.append((y[-1], name, style.colour))
        ends.append(x[-1])
    axes.set(xscale="log", xlabel="tokens ago (log)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    label_ends(axes, labels, ends)


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    """So many panels, at most two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, HEIGHT * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def _frame(axes: Axes, evaluations: Mapping[str, Evaluation], suite: str, measured: str) -> Annotation:
    """The panel of a suite, from nothing to everything, with its chance level, whose name it returns."""
    chance = _chance(evaluations, suite)
    axes.set(ylim=(-0.08, 1.05), ylabel=measured, title=ASKED[suite].format(K=round(1 / chance)))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.axhline(chance, color=GREY, linewidth=1.2, dashes=(5, 2), zorder=1)
    return axes.annotate(
        "chance",
        (0.01, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        color=GREY,
        fontsize=9,
    )


def _asked(evaluations: Mapping[str, Evaluation], suite: str) -> list[tuple[str, Evaluation]]:
    return [(name, each) for name, each in evaluations.items() if suite in each["suites"]]


def _chance(evaluations: Mapping[str, Evaluation], suite: str) -> float:
    return float(_asked(evaluations, suite)[0][1]["suites"][suite]["chance"])
