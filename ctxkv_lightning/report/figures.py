"""The figures of one run's report, drawn from a metrics dict alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from ctxkv_lightning.report.drawing import (
    GREY,
    INK,
    PALETTE,
    Label,
    count,
    dots,
    evenly,
    label_ends,
    number,
    plain,
    readable_log,
    save_png,
    single,
    styled,
)

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito: safe for colour-blind readers


def draw_all(metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Writes each figure that `metrics` has numbers for as `folder/<name>.png`; returns their paths.

    Names: `pretrain`, `spectrum`, `perplexity`, `attention`, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        with styled():
            figure = draw(metrics)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            save_png(figure, path)
        drawn.append(path)
    return drawn


def encoders(phase: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What `pretrain` says of each encoder of the run, none, one or several."""
    return [] if phase is None else phase.get("encoders") or [phase]


def pretrain(metrics: dict[str, Any]) -> Figure | None:
    """Convergence rate, with its target, and loss over the iterations of Phase 1, of the first encoder."""
    each = encoders(metrics["pretrain"])
    history = each[0]["history"] if each else []
    if not history:
        return None
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = [row["iteration"] for row in history]
    rate = [number(row["convergence_rate"]) for row in history]
    target = metrics["config"]["pretrain"]["target_rate"]
    which = "Phase 1" if len(each) == 1 else "Phase 1, first encoder"
    above.set_title(f"{which}: {_percent(rate[-1])} of the positions have settled after {count(x[-1], 'iteration')}")
    above.axhline(target, color=GREY, linewidth=1.2, dashes=(4, 3))
    above.plot(x, rate, color=BLUE, clip_on=False, **dots(len(x)))
    above.set(ylabel="convergence rate", ylim=(0, 1))
    above.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    reached = (rate[-1], f"reached {_percent(rate[-1])}", BLUE)
    label_ends(above, [(target, f"target {_percent(target)}", GREY), reached])
    below.plot(x, [number(row["loss"]) for row in history], color=ORANGE, clip_on=False, **dots(len(x)))
    below.set(ylabel="OACD loss", xlabel="iteration")
    below.yaxis.set_major_locator(MaxNLocator(4))
    _whole_numbers(below, x)
    figure.align_ylabels()
    return figure


def spectrum(metrics: dict[str, Any]) -> Figure | None:
    """Singular values of the first encoder's contexts, as shares of their sum."""
    each = encoders(metrics["pretrain"])
    values = (each[0].get("singular_values") or []) if each else []
    # Values from a Gram matrix are exact to about 1e-8 of the largest; below that is rounding.
    shares = [value / sum(values) for value in values if value > 1e-8 * values[0]]
    if not shares:
        return None
    figure, axes = single()
    C = len(values)
    which = "Contexts" if len(each) == 1 else "Contexts of the first encoder"
    axes.set_title(f"{which}: effective rank {_percent(each[0]['effective_rank'])} of {count(C, 'dimension')}")
    axes.axhline(1 / C, color=GREY, linewidth=1.2, dashes=(4, 3))
    axes.plot(range(1, len(shares) + 1), shares, color=BLUE, linewidth=2.4, marker="o" if len(shares) == 1 else None)
    axes.set(yscale="log", ylabel="share of the sum (log)", xlabel="singular value, largest first")
    readable_log(axes, lambda share: f"{100 * share:.3g} %")
    axes.set_xlim(min(1, C - 0.5), C)
    labels = [(1 / C, f"equal, 1/{C}", GREY)]
    if len(shares) == C:
        labels.append((shares[-1], "measured", BLUE))
    else:
        axes.text(len(shares) + 0.02 * C, shares[-1], f"zero after {len(shares)}", color=BLUE, va="center")
    label_ends(axes, labels)
    return figure


def perplexity(metrics: dict[str, Any]) -> Figure | None:
    """Train and validation PPL by epoch beside the footing, on the validation tokens."""
    epochs = metrics["train"]["epochs"]
    if not epochs:
        return None
    figure, axes = single(height=4.8)
    x = [row["epoch"] for row in epochs]
    labels = _draw_footing(axes, metrics["footing"])
    for key, name, colour, dashes in (("train_ppl", "train", ORANGE, (5, 1.6)), ("val_ppl", "validation", BLUE, ())):
        y = [number(row[key]) for row in epochs]
        axes.plot(x, y, color=colour, dashes=dashes, clip_on=False, zorder=3, **dots(len(x)))
        labels.append((y[-1], f"{name}  {plain(y[-1])}", colour))
    axes.set(yscale="log", ylabel="perplexity (log)", xlabel="epoch")
    readable_log(axes, lambda ppl: f"{ppl:,.8g}")
    _whole_numbers(axes, x)
    _mark_best(axes, metrics)
    label_ends(axes, labels)
    return figure


def attention(metrics: dict[str, Any]) -> Figure | None:
    """Mean attention weight by how many tokens back the context lies, per head and over heads of one interval."""
    heads = (metrics.get("attention") or {}).get("slot_weights") or []
    if not heads:
        return None
    figure, axes = single()
    back, label = _distances(metrics, heads)
    M, groups = len(heads[0]), sorted(set(back))
    axes.set_title("Where attention looks" + (" (thin lines: single heads)" if len(heads) > len(groups) else ""))
    axes.axhline(1 / M, color=GREY, linewidth=1.2, dashes=(4, 3))
    labels = [(1 / M, f"uniform 1/{M}", GREY)]
    colours = [INK] if len(groups) == 1 else [PALETTE[i] for i in evenly(len(groups))]
    for group, colour in zip(groups, colours, strict=True):
        members = [weights for weights, distances in zip(heads, back, strict=True) if distances == group]
        end = _draw_heads(axes, group, members, colour, f"{count(len(members), 'head')}, {_interval(group)}")
        if len(groups) == 1:
            labels.append((end, f"mean of {len(members)} heads" if len(members) > 1 else "the one head", colour))
    axes.set(ylabel="mean attention weight", xlabel=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    _distance_axis(axes, groups)
    label_ends(axes, labels)
    if len(groups) > 1:  # lines that end at distances of their own, often side by side
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=9.5)
    return figure


def _distances(metrics: dict[str, Any], heads: list[list[float]]) -> tuple[list[tuple[float, ...]], str]:
    """Tokens back of each head's slots, and what that axis is called."""
    window, given = metrics["window"], metrics["attention"].get("distances")
    if given is None:
        given = [[slot * window["interval"] for slot in range(len(weights))] for weights in heads]
    if window.get("selection") == "grid":
        label = "tokens back, on average"
    else:
        label = "tokens back" + ("" if isinstance(window["interval"], list) else f" (slot × {window['interval']})")
    return [tuple(distances) for distances in given], label


def _draw_heads(axes: Axes, back: tuple[float, ...], heads: list[list[float]], colour: str, name: str) -> float:
    """Draws heads that look at the same distances, thin, and their mean; returns where that ends."""
    mean = [sum(weights) / len(heads) for weights in zip(*heads, strict=True)]
    if len(heads) > 1:
        for weights in heads:
            axes.plot(back, weights, color=BLUE if colour == INK else colour, linewidth=0.8, alpha=0.55)
    axes.plot(back, mean, color=colour, linewidth=2.6, **dots(len(back)), clip_on=False, zorder=3, label=name)
    return mean[-1]


def _interval(back: tuple[float, ...]) -> str:
    return f"every {back[-1] / (len(back) - 1):g}" if len(back) > 1 else "now"


def _distance_axis(axes: Axes, groups: list[tuple[float, ...]]) -> None:
    M, far = len(groups[0]), max(back[-1] for back in groups)
    if len(groups) > 1:
        # From 0 to its smallest step the axis is linear, beyond that logarithmic: near and far in one picture.
        axes.set_xscale("symlog", linthresh=min(back[1] for back in groups))
        axes.set_xlim(0, far)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return
    axes.set_xlim(-0.02 * far if M > 1 else -1, far)
    axes.xaxis.set_major_locator(FixedLocator(groups[0]) if M <= 8 else MaxNLocator(8, integer=True))


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
        labels.append((footing[key], f"{name}  {plain(footing[key])}", GREY))
    return labels


def _mark_best(axes: Axes, metrics: dict[str, Any]) -> None:
    best = metrics["train"]["best_epoch"]
    ppl = {row["epoch"]: row["val_ppl"] for row in metrics["train"]["epochs"]}[best]
    axes.plot([best], [ppl], "o", markersize=12, markerfacecolor="none", color=BLUE, clip_on=False, zorder=4)
    axes.set_title(f"Best at epoch {best}: validation PPL {plain(ppl)}")


def _whole_numbers(axes: Axes, x: list[int]) -> None:
    # Lines end at the right edge, where their labels are; a single point stands there too.
    axes.set_xlim(x[0] - 0.5, x[-1])
    axes.xaxis.set_major_locator(
        FixedLocator(x) if len(x) <= 12 else MaxNLocator(10, steps=[1, 2, 5, 10], integer=True)
    )


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.3g} %"
