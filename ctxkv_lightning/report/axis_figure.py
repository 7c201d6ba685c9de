"""PPL along one swept setting: seeds as spread, a line per combination of the others."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from ctxkv_lightning.report.drawing import GREY, INK, PAPER, Label, count, label_ends, plain, readable_log, single
from ctxkv_lightning.report.groups import Axis, Group, Line, Measured, Swept
from ctxkv_lightning.report.looks import HEIGHT, Drawn, Look, by_model, look, looks, mark, width_for
from ctxkv_lightning.report.words import enumerated, phrases, written

ROOM = 46
"""Characters that fit along the axis."""

TITLE = 54
"""Characters of a title's line."""

Places = Mapping[Any, float]
"""Where each value of an axis lies on it."""


def axis_figure(axis: Axis, swept: Swept, names: Mapping[str, str], samples: Any = None) -> Drawn:
    """PPL along one axis: every seed a dot, their mean and standard deviation, a line per combination of the others.

    `samples` is on how many documents all were trained, if others were trained on more or fewer.
    """
    lines = swept.lines
    texts, styles = _texts_and_styles(lines, names)
    figure, axes = single(width_for([*texts, *(group.model for group in swept.references)]), HEIGHT)
    drawn = {value for line in lines for value, _ in line.points}
    values = [value for value in axis.values if value in drawn]
    places = {value: i if axis.scale == "category" else value for i, value in enumerate(values)}
    axes.set_xscale("log" if axis.scale == "log" else "linear")
    for line, style in zip(lines, styles, strict=True):
        draw_line(axes, line, places, style, joined=axis.scale != "category" or len(lines) > 1)
    axes.set(yscale="log", ylabel="validation PPL (log)", xlabel=_axis_label(axis, names))
    axes.margins(y=0.14)
    value_axis(axes, axis, places)
    readable_log(axes, lambda value: f"{value:,.8g}")
    for group in swept.references:
        axes.axhline(group.val_ppl.mean, color=look(group.model).colour, linewidth=1.2, dashes=(5, 3), zorder=1)
    value, best = _lowest(lines)
    text = "" if samples is None else f", {written(samples)} documents"
    title = f"{names[axis.key]}{text}: lowest PPL {plain(best.val_ppl.mean)}, at {written(value)}"
    axes.set_title("\n".join(textwrap.wrap(title, TITLE)))
    _name_lines(axes, swept, texts, styles, places)
    if len(lines) == 1:
        _write_values(axes, lines[0], places)
    name = "axis-" + axis.key.replace(".", "-") + ("" if samples is None else f"-{samples}")
    return Drawn(name, figure, axis_caption(axis, swept, names, samples), figure.get_size_inches()[0] > 7.2)


def _lowest(lines: Sequence[Line]) -> tuple[Any, Group]:
    return min((point for line in lines for point in line.points), key=lambda point: point[1].val_ppl.mean)


def _as_low(lines: Sequence[Line]) -> list[Any]:
    """The values of the same line that seeds do not tell from the lowest."""
    lowest, best = _lowest(lines)
    line = next(line for line in lines if (lowest, best) in line.points)
    return [value for value, group in line.points if value != lowest and not _apart(best.val_ppl, group.val_ppl)]


def _apart(one: Measured, other: Measured) -> bool:
    """Whether two standard deviations of their difference lie between them, as far as there are seeds to tell."""
    if one.spread is None or other.spread is None:
        return True
    return abs(one.mean - other.mean) > 2 * math.hypot(one.spread, other.spread)


def _texts_and_styles(lines: Sequence[Line], names: Mapping[str, str]) -> tuple[list[str], list[Look]]:
    models, settings = [line.model for line in lines], [line.settings for line in lines]
    if by_model(models, settings):
        return [str(model) for model in models], looks(models, settings)
    return [phrases(each, names) for each in settings], looks(models, settings)


def _name_lines(axes: Axes, swept: Swept, texts: Sequence[str], styles: Sequence[Look], places: Places) -> None:
    labels: list[Label] = []
    ends: list[float] = []
    for line, text, style in zip(swept.lines, texts, styles, strict=True):
        if text:
            value, group = line.points[-1]
            labels.append((group.val_ppl.mean, text, style.colour if line.model else INK))
            ends.append(places[value])
    for group in swept.references:
        labels.append((group.val_ppl.mean, group.model, look(group.model).colour))
        ends.append(axes.get_xlim()[1])
    if labels:
        label_ends(axes, labels, ends)


def draw_line(axes: Axes, line: Line, places: Places, style: Look, joined: bool) -> None:
    """The line, its seeds and their spread; not `joined`: categories, which nothing lies between.

    Where its points are of several models, each looks like its own and the line is grey.
    """
    x = [places[value] for value, _ in line.points]
    if joined:
        means = [group.val_ppl.mean for _, group in line.points]
        axes.plot(x, means, color=style.colour if line.model else GREY, linewidth=1.6, zorder=2)
    for place, (_, group) in zip(x, line.points, strict=True):
        own, measured = style if line.model else look(group.model), group.val_ppl
        mark(axes, place, measured.mean, own, measured.spread)
        if measured.seeds > 1:
            seeds = group.over_seeds(lambda run: run.val_ppl)
            axes.plot([place] * len(seeds), seeds, "o", color=own.colour, markersize=3.5, alpha=0.55, zorder=4)


def _write_values(axes: Axes, line: Line, places: Places) -> None:
    """Writes the mean above each point, but one that would run into the one before."""
    to_axes, before = axes.transData + axes.transAxes.inverted(), -1.0
    box = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"}
    for value, group in line.points:
        mean, spread, _ = group.val_ppl
        x = float(to_axes.transform((places[value], mean))[0])
        if x - before < 0.1:
            continue
        before = x
        at = (places[value], max([*group.over_seeds(lambda run: run.val_ppl), mean + (spread or 0)]))
        axes.annotate(
            plain(mean), at, xytext=(0, 8), textcoords="offset points", ha="center", color=INK, bbox=box, zorder=6
        )


def _axis_label(axis: Axis, names: Mapping[str, str]) -> str:
    also = f" (and with it {', '.join(names[key] for key in axis.companions)})" if axis.companions else ""
    return "\n".join(textwrap.wrap(names[axis.key] + also, 60)) + (" (log)" if axis.scale == "log" else "")


def value_axis(axes: Axes, axis: Axis, places: Places) -> None:
    """Ticks at the values that were tried, but those that would run into the one before."""
    if axis.scale == "category":
        axes.set_xlim(-0.5, len(places) - 0.5)
    else:
        axes.margins(x=0.06)
    to_axes = axes.transData + axes.transAxes.inverted()
    shown: dict[Any, float] = {}
    for value, place in places.items():
        at = float(to_axes.transform((place, axes.get_ylim()[0]))[0])
        if axis.scale == "category" or not shown or at - max(shown.values()) > 0.06:
            shown[value] = at
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator([places[value] for value in shown]))
    axes.set_xticklabels(_ticks(list(shown)))


def _ticks(values: Sequence[Any]) -> list[str]:
    """A label for each value; where even single words are too wide, every other label stands lower."""
    width = max(1, ROOM // len(values))
    texts = [_tick(value, width) for value in values]
    if max(len(line) for text in texts for line in text.splitlines()) <= width:
        return texts
    return ["\n" * (i % 2) + _tick(value, 2 * width - 2) for i, value in enumerate(values)]


def _tick(value: Any, width: int) -> str:
    """A value in lines of about `width`, broken after the underscores of a name and the commas of a list."""
    if not isinstance(value, str | tuple):
        return written(value)
    first, *rest = re.split(r"(?<=[_,])", written(value).strip("[]"))
    lines = [first]
    for piece in rest:
        if len(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece)
    return "\n".join(lines)


def axis_caption(axis: Axis, swept: Swept, names: Mapping[str, str], samples: Any = None) -> str:
    """What the figure shows, and what it leaves out."""
    name = names[axis.key]
    what = f"Validation PPL by {name}" + ("" if samples is None else f" with {written(samples)} documents")
    sentences = [f"{what}."]
    if swept.best_only:
        sentences = [f"{what}: the best of each value, whatever else varies with it."]
    elif len(swept.lines) > 1:
        sentences = [f"{what}, all other settings alike along a line."]
    if swept.own and not swept.best_only:
        own = enumerated([names[key] for key in swept.own])
        sentences.append(f"Where only some have {own}, each point is the best of them.")
    if any(group.val_ppl.seeds > 1 for line in swept.lines for _, group in line.points):
        sentences.append("Small dots are single seeds, bars one standard deviation around their mean.")
    if near := _as_low(swept.lines):
        told = enumerated([written(value) for value in near])
        where = "On the line of the lowest, seeds" if len(swept.lines) > 1 else "Seeds"
        sentences.append(f"{where} do not tell {written(_lowest(swept.lines)[0])} from {told}.")
    if swept.left_out:
        sentences.append(f"Left out: {count(swept.left_out, 'combination')} with only one value of {name}.")
    if swept.references:
        sentences.append(f"Dashed across: the best of each model that has no {name}.")
    if axis.companions:
        also = ", ".join(names[key] for key in axis.companions)
        sentences.append(f"Always changed together with {name}: {also}.")
    return " ".join(sentences)
