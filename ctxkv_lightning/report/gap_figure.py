"""Train and validation PPL of each run, and the gap between them."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ctxkv_lightning.report.drawing import GREY, INK, PAPER, plain, single
from ctxkv_lightning.report.looks import Drawn, look
from ctxkv_lightning.report.runs import Run

MOST_RUNS = 25
"""Rows of the figure."""

WIDEST = 58
"""Characters of a label's line."""


def gap_figure(runs: Sequence[Run], labels: Sequence[str]) -> Drawn:
    """Train and validation PPL of each run at its best epoch, the best runs at the top."""
    shown = [(run, _broken(label)) for run, label in zip(runs, labels, strict=True)][:MOST_RUNS]
    longest = max(len(line) for _, label in shown for line in label.splitlines() or [""])
    lines = max(label.count("\n") + 1 for _, label in shown)
    figure, axes = single(max(7.2, min(9.6, 5.4 + 0.075 * longest)), 1.25 + (0.11 + 0.16 * lines) * len(shown))
    for row, (run, _) in enumerate(shown):
        colour, marker = look(run.model).colour, look(run.model).marker
        axes.plot([run.train_ppl, run.val_ppl], [row, row], color=colour, linewidth=1.6, zorder=2)
        axes.plot(run.train_ppl, row, marker, color=colour, markerfacecolor=PAPER, markersize=6.5, zorder=3)
        axes.plot(run.val_ppl, row, marker, color=colour, markersize=7.5, zorder=3)
        axes.annotate(
            f"{run.gap:+,.0f}" if abs(run.gap) >= 10 else f"{run.gap:+.1f}",
            (max(run.train_ppl, run.val_ppl), row),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9.5,
        )
    _gap_axes(axes, [label for _, label in shown], shown[0][0])
    gaps = [plain(choose(run.gap for run, _ in shown)) for choose in (min, max)]
    axes.set_title(f"Gap from {gaps[0]} to {gaps[1]} PPL" if len(shown) > 1 else f"Gap of {gaps[0]} PPL", pad=26)
    best = "" if len(shown) == len(runs) else f" The best {len(shown)} of {len(runs)} runs."
    caption = f"Train (hollow) and validation PPL (filled) at the best epoch, their difference beside.{best}"
    return Drawn("gap", figure, caption, wide=True)


def _broken(label: str) -> str:
    """A label in lines of at most `WIDEST` characters, broken between two settings."""
    lines: list[str] = []
    for setting in label.split(" · "):
        if lines and len(lines[-1]) + 3 + len(setting) <= WIDEST:
            lines[-1] += f" · {setting}"
        else:
            lines.append(setting)
    return " ·\n".join(lines)


def _gap_axes(axes: Axes, labels: Sequence[str], first: Run) -> None:
    axes.set(xscale="log", xlabel="PPL at the best epoch (log)")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(labels)), labels)
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
    sides = (("train", first.train_ppl), ("validation", first.val_ppl))
    for (name, x), aligned in zip(sorted(sides, key=lambda side: side[1]), ("right", "left"), strict=True):
        axes.annotate(name, (x, -0.6), xytext=(0, 5), textcoords="offset points", ha=aligned, color=INK)
