"""How models and lines look in the figures that compare runs: one colour and one marker each, the same everywhere."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctxkv_lightning.report.drawing import MARKERS, PALETTE, PAPER, Steps, evenly

WIDTH, HEIGHT = 5.8, 4.1
"""Inches of an ordinary figure: two stand side by side on a wide screen."""

MODELS = (
    "context_kv",
    "transformer",
    "context_kv, per head",
    "sliding_window",
    "recurrence",
    "context_kv, grid",
    "cascade",
    "context_kv, grid, per head",
)
"""`Run.model` in the order of `PALETTE` and `MARKERS`."""

SIGNS = (
    "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "M-4.5-4.5H4.5V4.5H-4.5Z",
    "M0-5.5L5.5 4.5H-5.5Z",
    "M0-5.8L5.8 0L0 5.8L-5.8 0Z",
    "M0 5.5L5.5-4.5H-5.5Z",
    "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "M-5.5-3L-3-5.5L0-2.5L3-5.5L5.5-3L2.5 0L5.5 3L3 5.5L0 2.5L-3 5.5L-5.5 3L-2.5 0Z",
    "M0-6L1.7-2.2L5.8-1.8L2.7.9L3.6 5L0 2.8L-3.6 5L-2.7.9L-5.8-1.8L-1.7-2.2Z",
)
"""`MARKERS` as SVG paths of 12 by 12 around the origin."""


SIZES = {"P": 9, "X": 9, "*": 11, "D": 7, "^": 8.5, "v": 8.5}
"""Points of the markers that would look smaller or larger than a circle of 7.5."""


@dataclass(frozen=True)
class Look:
    """The colour and marker of a model or line, as their number in `PALETTE` and `MARKERS`."""

    index: int

    @property
    def colour(self) -> str:
        """As a figure wants it."""
        return PALETTE[self.index]

    @property
    def marker(self) -> str:
        """As matplotlib wants it."""
        return MARKERS[self.index]


class Drawn(NamedTuple):
    """A figure, the name of its file, and what stands below it."""

    name: str
    figure: Figure
    caption: str
    wide: bool = False


def look(model: str) -> Look:
    """The look of a model, of one that is not in `MODELS` too."""
    return Look(MODELS.index(model) if model in MODELS else sum(map(ord, model)) % len(MODELS))


def mark(axes: Axes, x: float, y: float, style: Look, spread: float | None = None) -> None:
    """One point with its spread, rimmed so that it stands out from what lies below."""
    if spread:  # not as an errorbar, whose bars have a log axis reach down to 1
        ends = list(zip(*bar(x, y, spread), strict=True))
        axes.plot(*ends, marker="_", color=style.colour, linewidth=1.4, markersize=9, zorder=3)
    axes.plot(
        x,
        y,
        style.marker,
        color=style.colour,
        markersize=SIZES.get(style.marker, 7.5),
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        zorder=5,
    )


def bar(x: float, y: float, spread: float) -> Steps:
    """The two ends of the bar that shows a point's spread."""
    return [(x, max(y - spread, y / 10)), (x, y + spread)]


def width_for(labels: Iterable[str]) -> float:
    """Inches of a figure that has these names right of its axes."""
    return min(9.6, WIDTH + 0.085 * max(0, max(map(len, labels), default=0) - 10))


def by_model(models: Sequence[str | None], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether lines of these models are told apart by them and by nothing else."""
    names = set(models)
    own = all(set(each) <= {"model.name", "selection"} for each in settings)
    return len(names) == len(models) > 1 and None not in names and own


def looks(models: Sequence[str | None], settings: Sequence[Mapping[str, Any]]) -> list[Look]:
    """The looks of lines: those of their models where these tell them apart, else as far apart as can be."""
    if by_model(models, settings) or len(models) == 1:
        return [look(model or MODELS[0]) for model in models]
    return [Look(index) for index in evenly(len(models))]
