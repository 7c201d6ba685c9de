"""PPL by number of training documents, and the fitted curves."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ctxkv_lightning.report.axis_figure import draw_line, value_axis
from ctxkv_lightning.report.drawing import PALETTE, Label, label_ends, readable_log, single
from ctxkv_lightning.report.groups import Axis, Line
from ctxkv_lightning.report.looks import HEIGHT, Drawn, looks, width_for
from ctxkv_lightning.report.saturation import SAMPLES, Series, digits
from ctxkv_lightning.report.words import phrases

RAISED = str.maketrans("0123456789.,", "⁰¹²³⁴⁵⁶⁷⁸⁹·,")


def saturation_figure(series: Sequence[Series], names: Mapping[str, str]) -> Drawn:
    """PPL over training documents with the fitted curves, dashed where they go beyond the data; the best series."""
    shown = list(series)[: len(PALETTE)]
    lines = [Line(each.settings, each.points) for each in shown]
    styles = looks([line.model for line in lines], [line.settings for line in lines])
    texts = [_text(each, names) for each in shown]
    figure, axes = single(width_for(texts), HEIGHT)
    far = 2 * max(n for each in shown for n, _ in each.points)
    labels: list[Label] = []
    ends: list[float] = []
    for each, line, text, style in zip(shown, lines, texts, styles, strict=True):
        places = {n: float(n) for n, _ in each.points}
        draw_line(axes, line, places, style, joined=each.fit is None)
        end, y = _draw_fit(axes, each, far, style.colour)
        if text:
            labels.append((y, text, style.colour))
            ends.append(end)
    axes.set(xscale="log", yscale="log", xlabel="training documents n (log)", ylabel="validation PPL (log)")
    axes.margins(y=0.1)
    values = sorted({n for each in shown for n, _ in each.points})
    value_axis(axes, Axis(SAMPLES, (), tuple(values), "log"), {n: float(n) for n in values})
    readable_log(axes, lambda value: f"{value:,.8g}")
    axes.set_title(_title(shown))
    label_ends(axes, labels, ends)
    more = "" if len(shown) == len(series) else f" The best {len(shown)} of {len(series)} configurations."
    caption = (
        "Validation PPL by training documents n, and the fit PPL = PPL_min + A n^-a, dashed beyond the data; "
        f"the arrow points to its limit PPL_min.{more}"
    )
    return Drawn("saturation", figure, caption, figure.get_size_inches()[0] > 7.2)


def _text(series: Series, names: Mapping[str, str]) -> str:
    """What the series is, and where its curve ends."""
    limit = ""
    if series.fit is not None:
        limit = f"→ {digits(series.fit.floor, series.fit.errors[0] if series.fit.errors else None)}"
    return " ".join(part for part in (phrases(series.settings, names), limit) if part)


def _title(series: Sequence[Series]) -> str:
    if len(series) != 1 or series[0].fit is None:
        return "PPL by training documents"
    fit = series[0].fit
    errors = fit.errors or (None, None, None)
    values = (fit.floor, fit.scale, fit.exponent)
    floor, scale, exponent = (digits(value, error) for value, error in zip(values, errors, strict=True))
    return f"PPL = {floor} + {scale} n⁻{exponent.translate(RAISED)}"


def _draw_fit(axes: Axes, series: Series, far: float, colour: str) -> tuple[float, float]:
    """Draws the curve, if there is one; returns where this series ends."""
    first, last = series.points[0][0], series.points[-1][0]
    if series.fit is None:
        return last, series.points[-1][1].val_ppl.mean
    for start, stop, dashes in ((first, last, ()), (last, far, (4, 2))):
        n = [start * (stop / start) ** (i / 60) for i in range(61)]
        axes.plot(n, [series.fit.at(each) for each in n], color=colour, linewidth=1.8, dashes=dashes, zorder=2)
    return far, series.fit.at(far)
