"""PPL against the bytes that a decoder keeps, and the Pareto front."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ctxkv_lightning.report.drawing import GREY, INK, PointLabel, Steps, label_points, readable_log, single
from ctxkv_lightning.report.groups import SAMPLES, Group, texts_of
from ctxkv_lightning.report.looks import HEIGHT, WIDTH, Drawn, bar, look, mark
from ctxkv_lightning.report.words import phrases, written

LEAST_SPAN = math.sqrt(2)
"""The right end of the axis of memories, as a multiple of the left one, at least."""


def memory_figures(groups: Sequence[Group], names: Mapping[str, str]) -> list[Drawn]:
    """PPL against bytes kept, a figure for each amount of training text; nothing where there is nothing to compare."""
    drawn = []
    for samples, found in texts_of([group for group in groups if group.runs[0].kept is not None]):
        alone = samples is None
        title = "" if alone else f"{written(samples)} documents: "
        caption = _caption(found, "" if alone else f", of models trained on {written(samples)} documents")
        drawn.append(Drawn("memory" if alone else f"memory-{samples}", memory(found, title, names), caption))
    return drawn


def _caption(groups: Sequence[Group], text: str) -> str:
    bars = " Bars are one standard deviation over seeds." if any(group.val_ppl.spread for group in groups) else ""
    return (
        f"Validation PPL against what a decoder keeps after 10,000 tokens, in fp32{text}. Dashed: the "
        f"Pareto front; those on it are beaten by none that keeps as little.{bars}"
    )


def memory(groups: Sequence[Group], title: str, names: Mapping[str, str]) -> Figure:
    """Mean validation PPL of each group over the kilobytes that a decoder keeps, and the Pareto front."""
    figure, axes = single(WIDTH, HEIGHT)
    points = [(kilobytes(group), group.val_ppl.mean) for group in groups]
    front = pareto(points)
    for group, (x, y) in zip(groups, points, strict=True):
        mark(axes, x, y, look(group.model), group.val_ppl.spread)
    axes.set(xscale="log", yscale="log", xlabel="KB kept after 10,000 tokens (log)", ylabel="validation PPL (log)")
    axes.margins(x=0.12, y=0.12)
    _widen(axes)
    readable_log(axes, lambda value: f"{value:,.8g}")
    kilobyte_ticks(axes)
    stairs = _draw_front(axes, [points[i] for i in front])
    axes.set_title(f"{title}{len(front)} of {len(groups)} on the Pareto front")
    bars = [bar(x, y, group.val_ppl.spread or 0) for group, (x, y) in zip(groups, points, strict=True)]
    label_points(axes, _labels(groups, points, front, names), points, [stairs, *bars])
    return figure


def _widen(axes: Axes) -> None:
    """Memories that are all but equal shall look so: the axis spans half an octave at least."""
    low, high = axes.get_xlim()
    if high < LEAST_SPAN * low:
        middle = math.sqrt(low * high)
        axes.set_xlim(middle / math.sqrt(LEAST_SPAN), middle * math.sqrt(LEAST_SPAN))


def _draw_front(axes: Axes, front: Steps) -> Steps:
    """Draws the steps from the top over the points of the front to the right edge, and shades what they beat."""
    limits = axes.get_xlim(), axes.get_ylim()
    right, top = limits[0][1], limits[1][1]
    stairs = [(front[0][0], top), *front, (right, front[-1][1])]
    x, y = [place for place, _ in stairs], [height for _, height in stairs]
    axes.step(x, y, where="post", color=GREY, linewidth=1.4, dashes=(5, 2), zorder=2)
    axes.fill_between(x[1:], y[1:], top, step="post", color=GREY, alpha=0.09, linewidth=0, zorder=1)
    axes.set(xlim=limits[0], ylim=limits[1])
    return stairs


def _labels(
    groups: Sequence[Group], points: Sequence[tuple[float, float]], front: Sequence[int], names: Mapping[str, str]
) -> list[PointLabel]:
    """The best of each model by its name; where there is but one, the points of the front by their settings."""
    labels: dict[str, PointLabel] = {}
    for group, point in zip(groups, points, strict=True):  # best first
        labels.setdefault(group.model, (*point, group.model, look(group.model).colour))
    if len(labels) > 1:
        return list(labels.values())
    settings = [{key: value for key, value in groups[i].settings.items() if key != SAMPLES} for i in front]
    return [(*points[i], phrases(each, names), INK) for i, each in zip(front, settings, strict=True)]


def kilobytes(group: Group) -> float:
    """KB kept after 10,000 tokens; at least one byte, so that it has a place on a log axis."""
    return max(1, group.runs[0].kept or 0) / 1000


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other, by x ascending."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def kilobyte_ticks(axes: Axes) -> None:
    """Ticks of a log axis of kilobytes, at round numbers, as many as have room."""
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 2.5 else (1, 3) if math.log10(high / low) > 1 else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(inside) if len(inside) > 1 else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 10 else f"{value:,.0f}"))
