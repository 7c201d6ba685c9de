"""How figures look: style, palette, labels that name themselves, and how they are saved.

They must read in greyscale too: neighbouring lines differ in dash, width or marker, not only in colour, and
each carries its own label instead of a legend. Built without pyplot, so no global state is touched.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

INK, GREY, PAPER = "#222222", "#767676", "#ffffff"

PALETTE = ("#00295b", "#740027", "#71188d", "#026230", "#bd2924", "#087bad", "#c56d00", "#8a9c00")
"""Eight colours whose lightness rises in even steps (L* 17 to 61), so that greyscale keeps them apart."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One for each colour of `PALETTE`."""

STYLE: Any = {
    "font.size": 11.0,
    "text.color": INK,
    "text.parse_math": False,  # a value from the configuration may hold a $
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titlepad": 12.0,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "ctxkv",
}

Label = tuple[float, str, str]
"""Where a line ends (y, in data), what it is, its colour."""


PointLabel = tuple[float, float, str, str]
"""Where a point lies (x and y, in data), what it is, its colour."""

Steps = Sequence[tuple[float, float]]
"""The corners of a step line (x and y, in data), which goes right before it goes up or down."""


@contextmanager
def styled() -> Iterator[None]:
    """Figures made and saved inside look like those of every page."""
    with rc_context(STYLE):
        yield


def save_png(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Writes the figure; equal numbers give equal files, so neither date nor version goes in."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page whose style sheet gives it font and colours.

    Colours of this module become `var(--ink)`, `var(--muted)`, `var(--paper)` and `var(--c0)` to `var(--c7)`, the font
    `var(--sans)`; ids begin with `name`, so that several figures can stand in one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    widest = f'<svg style="max-width: {1.04 * figure.get_size_inches()[0]:.2f}in"'
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', rf"{widest}\1", svg, count=1)
    svg = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    named = {INK: "--ink", GREY: "--muted", PAPER: "--paper", **{c: f"--c{i}" for i, c in enumerate(PALETTE)}}
    return re.sub("|".join(named), lambda found: f"var({named[found[0]]})", svg)


def evenly(count: int) -> list[int]:
    """Indices of `count` colours as far apart in `PALETTE` as it allows; they repeat beyond its length."""
    if count > len(PALETTE):
        return [i % len(PALETTE) for i in range(count)]
    return [round(i * (len(PALETTE) - 1) / max(1, count - 1)) for i in range(count)]


def single(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def dots(points: int) -> dict[str, Any]:
    """Line options: a dot at each point, unless so many would hide the line and its dashes."""
    return {"marker": "o", "markersize": 4.5} if points <= 32 else {}


def readable_log(axes: Axes, text: Callable[[float], str]) -> None:
    """Ticks on y at 1, 2, 5, or at round numbers where the axis spans too little for three of those."""
    low, high = axes.get_ylim()
    locator: LogLocator | MaxNLocator = LogLocator(subs=(1, 2, 5), numticks=20)
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
        locator = MaxNLocator(6, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def label_ends(axes: Axes, labels: Sequence[Label], ends: Sequence[float] | None = None) -> None:
    """Names the lines right of the axes, moved apart where they end too close to each other.

    `ends` has the x at which each line ends, where that is not the right edge.
    """
    axes.get_ylim()  # settles the limits, which the transforms below do not
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    found = sorted(
        (*reversed(to_axes.transform((x, y))), text, colour)
        for (y, text, colour), x in zip(labels, ends or [right] * len(labels), strict=True)
        if math.isfinite(y)
    )
    height = axes.get_window_extent().height / axes.figure.dpi  # inches, before the layout trims them
    heights = spread([y for y, *_ in found], gap=0.22 / height)
    for (end, x, text, colour), y in zip(found, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(
            text,
            xy=(x, end),
            xytext=(1.04, y),
            xycoords="axes fraction",
            color=colour,
            va="center",
            arrowprops=line,
            annotation_clip=False,
        )


def label_points(
    axes: Axes,
    labels: Sequence[PointLabel],
    points: Sequence[tuple[float, float]],
    paths: Sequence[Steps],
) -> None:
    """Names some of the `points` (x, y) beside them, where they hide least of points, names and step lines."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # only now does the layout say where points lie
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in axes.transData.transform(points)]
    for path in paths:
        for (x0, y0), (x1, y1) in pairwise(axes.transData.transform(path)):
            taken += [
                Bbox.from_extents(x0, y0 - 1, x1, y0 + 1),
                Bbox.from_extents(x1 - 1, min(y0, y1), x1 + 1, max(y0, y1)),
            ]
    frame = axes.get_window_extent()
    for x, y, text, colour in labels:
        at = axes.transData.transform((x, y))
        boxes = [_beside(at, dx, dy, text, figure.dpi / 72) for dx, dy in SIDES]
        costs = [_cost(box, taken, frame) + 0.01 * rank for rank, box in enumerate(boxes)]
        side = min(range(len(SIDES)), key=costs.__getitem__)
        taken.append(boxes[side])
        (dx, dy), aligned = SIDES[side], {-1: "right", 0: "center", 1: "left"}
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(9 * dx, 10 * dy),
            textcoords="offset points",
            color=colour,
            ha=aligned[dx],
            va="center",
            annotation_clip=False,
        )


SIDES = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Right, above, below, left, and the corners, the preferred first."""


def _beside(at: Any, dx: int, dy: int, text: str, point: float) -> Bbox:
    width, height = 6.3 * len(text) * point, 13 * point
    x, y = at[0] + 9 * dx * point, at[1] + 10 * dy * point
    left = x - width * (1 - dx) / 2
    return Bbox.from_extents(left, y - height / 2, left + width, y + height / 2)


def _cost(box: Bbox, taken: Sequence[Bbox], frame: Any) -> float:
    hidden = sum(_overlap(box, other) for other in taken)
    outside = max(0.0, box.x1 - frame.x1) / 10 + max(0.0, frame.x0 - box.x0) + max(0.0, box.y1 - frame.y1 - 10)
    return hidden / 20 + outside + 10 * max(0.0, frame.y0 - box.y0)


def _overlap(a: Bbox, b: Bbox) -> float:
    return max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))


def spread(positions: list[float], gap: float) -> list[float]:
    """Ascending `positions` moved as little as a few passes allow until neighbours are `gap` apart."""
    placed = list(positions)
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-6:
                placed[i], placed[i + 1], moved = placed[i] - short / 2, placed[i + 1] + short / 2, True
        if not moved:
            break
    return placed


def number(value: float | None) -> float:
    """NaN, which leaves a gap in a line, for a number that is missing."""
    return math.nan if value is None else value


def count(number: int, noun: str) -> str:
    """The number and its noun: 1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def plain(value: float) -> str:
    """Three digits or a whole number, without an exponent below a million."""
    if abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 99.95 or value == round(value) else f"{value:#.3g}"
