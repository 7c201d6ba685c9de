"""Train and validation PPL, and how many times the one is the other, of runs that differ only in their seed."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ctxkv_lightning.report.drawing import GREY, INK, PAPER, single
from ctxkv_lightning.report.groups import Group
from ctxkv_lightning.report.looks import Drawn, look

MOST_GROUPS = 25
"""Rows of the figure."""

WIDEST = 58
"""Characters of a label's line."""


class Row(NamedTuple):
    """What is drawn of a group: means over its seeds."""

    group: Group
    label: str
    train: float
    val: float

    @property
    def ratio(self) -> float:
        """Validation over train PPL: what the length of a row shows on an axis of logarithms."""
        return self.val / self.train


def gap_figure(groups: Sequence[Group], labels: Sequence[str]) -> Drawn:
    """Train and validation PPL of each group at its best epochs, the best groups at the top."""
    rows = [_row(group, _broken(label)) for group, label in zip(groups, labels, strict=True)][:MOST_GROUPS]
    longest = max(len(line) for row in rows for line in row.label.splitlines() or [""])
    lines = max(row.label.count("\n") + 1 for row in rows)
    figure, axes = single(max(7.2, min(9.6, 5.4 + 0.075 * longest)), 1.25 + (0.11 + 0.16 * lines) * len(rows))
    for place, row in enumerate(rows):
        colour, marker = look(row.group.model).colour, look(row.group.model).marker
        axes.plot([row.train, row.val], [place, place], color=colour, linewidth=1.6, zorder=2)
        axes.plot(row.train, place, marker, color=colour, markerfacecolor=PAPER, markersize=6.5, zorder=3)
        axes.plot(row.val, place, marker, color=colour, markersize=7.5, zorder=3)
        axes.annotate(
            f"{row.ratio:.2f} ×",
            (max(row.train, row.val), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9.5,
        )
    _gap_axes(axes, rows)
    ratios = dict.fromkeys(f"{choose(row.ratio for row in rows):.2f}" for choose in (min, max))
    axes.set_title(f"Validation PPL is {' to '.join(ratios)} × train PPL", pad=26)
    return Drawn("gap", figure, _caption(groups, len(rows)), wide=True)


def _row(group: Group, label: str) -> Row:
    return Row(group, label, group.measured(lambda run: run.train_ppl).mean, group.val_ppl.mean)


def _caption(groups: Sequence[Group], shown: int) -> str:
    means = ", as means over seeds" if any(group.val_ppl.seeds > 1 for group in groups) else ""
    best = f" The best {shown} of {len(groups)} combinations." if shown < len(groups) else ""
    return f"Train (hollow) and validation PPL (filled) at the best epoch, their ratio beside{means}.{best}"


def _broken(label: str) -> str:
    """A label in lines of at most `WIDEST` characters, broken between two settings."""
    lines: list[str] = []
    for setting in label.split(" · "):
        if lines and len(lines[-1]) + 3 + len(setting) <= WIDEST:
            lines[-1] += f" · {setting}"
        else:
            lines.append(setting)
    return " ·\n".join(lines)


def _gap_axes(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(xscale="log", xlabel="PPL at the best epoch (log)")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    steps = (1, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5) if high < 30 * low else (1,)
    ticks = [step * 10.0**decade for decade in range(-1, 9) for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > 1:
        axes.xaxis.set_major_locator(FixedLocator(inside))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.8g}"))
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.7)
    sides = (("train", rows[0].train), ("validation", rows[0].val))
    for (name, x), aligned in zip(sorted(sides, key=lambda side: side[1]), ("right", "left"), strict=True):
        axes.annotate(name, (x, -0.6), xytext=(0, 5), textcoords="offset points", ha=aligned, color=INK)
