"""The figures of a report, drawn from a metrics dict alone.

They must read in greyscale too: neighbouring lines differ in dash or width, not only in colour, and
each carries its own label instead of a legend. Built without pyplot, so no global state is touched.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

INK, GREY, BLUE, ORANGE = "#222222", "#767676", "#0072B2", "#D55E00"  # Okabe and Ito: safe for colour-blind readers

STYLE: Any = {
    "font.size": 11.0,
    "text.color": INK,
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
}

Label = tuple[float, str, str]
"""Where a line ends (y, in data), what it is, its colour."""


def draw_all(metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Writes each figure that `metrics` has numbers for as `folder/<name>.png`; returns their paths.

    Names: `pretrain`, `spectrum`, `perplexity`, `attention`, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        with rc_context(STYLE):
            figure = draw(metrics)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            # Without the date and the version, equal numbers give equal files.
            figure.savefig(path, metadata={"Software": None})
        drawn.append(path)
    return drawn


def pretrain(metrics: dict[str, Any]) -> Figure | None:
    """Convergence rate, with its target, and loss over the iterations of Phase 1."""
    history = metrics["pretrain"]["history"]
    if not history:
        return None
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = [row["iteration"] for row in history]
    rate = [_number(row["convergence_rate"]) for row in history]
    target = metrics["config"]["pretrain"]["target_rate"]
    above.set_title(f"Phase 1: {_percent(rate[-1])} of the positions have settled after {_count(x[-1], 'iteration')}")
    above.axhline(target, color=GREY, linewidth=1.2, dashes=(4, 3))
    above.plot(x, rate, color=BLUE, clip_on=False, **_dots(len(x)))
    above.set(ylabel="convergence rate", ylim=(0, 1))
    above.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    reached = (rate[-1], f"reached {_percent(rate[-1])}", BLUE)
    _label_ends(above, [(target, f"target {_percent(target)}", GREY), reached])
    below.plot(x, [_number(row["loss"]) for row in history], color=ORANGE, clip_on=False, **_dots(len(x)))
    below.set(ylabel="OACD loss", xlabel="iteration")
    below.yaxis.set_major_locator(MaxNLocator(4))
    _whole_numbers(below, x)
    figure.align_ylabels()
    return figure


def spectrum(metrics: dict[str, Any]) -> Figure | None:
    """Singular values of the contexts, as shares of their sum."""
    values = metrics["pretrain"].get("singular_values") or []
    # Values from a Gram matrix are exact to about 1e-8 of the largest; below that is rounding.
    shares = [value / sum(values) for value in values if value > 1e-8 * values[0]]
    if not shares:
        return None
    figure, axes = _single()
    C = len(values)
    rank = metrics["pretrain"]["effective_rank"]
    axes.set_title(f"Contexts: effective rank {_percent(rank)} of {_count(C, 'dimension')}")
    axes.axhline(1 / C, color=GREY, linewidth=1.2, dashes=(4, 3))
    axes.plot(range(1, len(shares) + 1), shares, color=BLUE, linewidth=2.4, marker="o" if len(shares) == 1 else None)
    axes.set(yscale="log", ylabel="share of the sum (log)", xlabel="singular value, largest first")
    _readable_log(axes, lambda share: f"{100 * share:.3g} %")
    axes.set_xlim(min(1, C - 0.5), C)
    labels = [(1 / C, f"equal, 1/{C}", GREY)]
    if len(shares) == C:
        labels.append((shares[-1], "measured", BLUE))
    else:
        axes.text(len(shares) + 0.02 * C, shares[-1], f"zero after {len(shares)}", color=BLUE, va="center")
    _label_ends(axes, labels)
    return figure


def perplexity(metrics: dict[str, Any]) -> Figure | None:
    """Train and validation PPL by epoch beside the footing, on the validation tokens."""
    epochs = metrics["train"]["epochs"]
    if not epochs:
        return None
    figure, axes = _single(height=4.8)
    x = [row["epoch"] for row in epochs]
    labels = _draw_footing(axes, metrics["footing"])
    for key, name, colour, dashes in (("train_ppl", "train", ORANGE, (5, 1.6)), ("val_ppl", "validation", BLUE, ())):
        y = [_number(row[key]) for row in epochs]
        axes.plot(x, y, color=colour, dashes=dashes, clip_on=False, zorder=3, **_dots(len(x)))
        labels.append((y[-1], f"{name}  {_plain(y[-1])}", colour))
    axes.set(yscale="log", ylabel="perplexity (log)", xlabel="epoch")
    _readable_log(axes, lambda ppl: f"{ppl:,.8g}")
    _whole_numbers(axes, x)
    _mark_best(axes, metrics)
    _label_ends(axes, labels)
    return figure


def attention(metrics: dict[str, Any]) -> Figure | None:
    """Mean attention weight by how many tokens back the context lies, per head and over heads."""
    heads = metrics.get("attention", {}).get("slot_weights") or []
    if not heads:
        return None
    figure, axes = _single()
    M, interval = len(heads[0]), metrics["window"]["interval"]
    back = [slot * interval for slot in range(M)]
    mean = [sum(weights) / len(heads) for weights in zip(*heads, strict=True)]
    axes.set_title("Where attention looks" + (" (thin lines: single heads)" if len(heads) > 1 else ""))
    axes.axhline(1 / M, color=GREY, linewidth=1.2, dashes=(4, 3))
    if len(heads) > 1:
        for weights in heads:
            axes.plot(back, weights, color=BLUE, linewidth=0.8, alpha=0.55)
    axes.plot(back, mean, color=INK, linewidth=2.6, **_dots(M), clip_on=False, zorder=3)
    axes.set(ylabel="mean attention weight", xlabel=f"tokens back (slot × {interval})")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlim(-0.02 * back[-1] if M > 1 else -1, back[-1])
    axes.xaxis.set_major_locator(FixedLocator(back) if M <= 8 else MaxNLocator(8, integer=True))
    name = f"mean of {len(heads)} heads" if len(heads) > 1 else "the one head"
    _label_ends(axes, [(1 / M, f"uniform 1/{M}", GREY), (mean[-1], name, INK)])
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "pretrain": pretrain,
    "spectrum": spectrum,
    "perplexity": perplexity,
    "attention": attention,
}


def _draw_footing(axes: Axes, footing: dict[str, Any]) -> list[Label]:
    lines = (
        ("unigram_ppl", "unigram", (1, 2)),
        ("kneser_ney_ppl", "Kneser-Ney", (6, 3)),
        ("kneser_ney_cache_ppl", "Kneser-Ney + cache", (6, 2, 1, 2)),
    )
    labels = []
    for key, name, dashes in lines:
        axes.axhline(footing[key], color=GREY, linewidth=1.2, dashes=dashes)
        labels.append((footing[key], f"{name}  {_plain(footing[key])}", GREY))
    return labels


def _mark_best(axes: Axes, metrics: dict[str, Any]) -> None:
    best = metrics["train"]["best_epoch"]
    ppl = {row["epoch"]: row["val_ppl"] for row in metrics["train"]["epochs"]}[best]
    axes.plot([best], [ppl], "o", markersize=12, markerfacecolor="none", color=BLUE, clip_on=False, zorder=4)
    axes.set_title(f"Best at epoch {best}: validation PPL {_plain(ppl)}")


def _single(height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots()


def _dots(points: int) -> dict[str, Any]:
    # Many dots would hide the line and its dashes.
    return {"marker": "o", "markersize": 4.5} if points <= 32 else {}


def _whole_numbers(axes: Axes, x: list[int]) -> None:
    # Lines end at the right edge, where their labels are; a single point stands there too.
    axes.set_xlim(x[0] - 0.5, x[-1])
    axes.xaxis.set_major_locator(
        FixedLocator(x) if len(x) <= 12 else MaxNLocator(10, steps=[1, 2, 5, 10], integer=True)
    )


def _readable_log(axes: Axes, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2, 5, or at round numbers where the axis spans too little for three of those."""
    low, high = axes.get_ylim()
    locator: LogLocator | MaxNLocator = LogLocator(subs=(1, 2, 5), numticks=20)
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
        locator = MaxNLocator(6, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _label_ends(axes: Axes, labels: list[Label]) -> None:
    """Names the lines right of the axes, moved apart where they end too close to each other."""
    axes.get_ylim()  # settles the limits, which the transforms below do not
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    ends = [(to_axes.transform((right, y))[1], text, colour) for y, text, colour in labels if math.isfinite(y)]
    found = sorted(ends)
    height = axes.get_window_extent().height / axes.figure.dpi  # inches, before the layout trims them
    heights = [y for y, _, _ in found]
    for (end, text, colour), y in zip(found, spread(heights, gap=0.22 / height), strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            text,
            xy=(1, end),
            xytext=(1.04, y),
            xycoords="axes fraction",
            color=colour,
            va="center",
            arrowprops=line,
            annotation_clip=False,
        )


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


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.3g} %"


def _plain(value: float) -> str:
    if value >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"
