"""How far more text would help: the fit `PPL = PPL_min + A n^-a` over the number of training documents n."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from ctxkv_lightning.report.drawing import count
from ctxkv_lightning.report.groups import SAMPLES, Group, telling

EXPONENTS = np.geomspace(0.02, 8, 400)
"""Where the exponent is looked for; the other two parameters follow from it by linear least squares."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """`PPL = floor + scale n^-exponent`."""

    floor: float
    scale: float
    exponent: float
    errors: tuple[float, float, float] | None
    """Standard errors of the three; None where three points determine the curve and nothing is left to judge it by."""

    def at(self, n: float) -> float:
        """PPL at n training documents."""
        return self.floor + self.scale * n**-self.exponent


@dataclass(frozen=True)
class Series:
    """PPL of otherwise equal runs at several numbers of training documents."""

    settings: dict[str, Any]
    """What tells this series from the others."""
    points: tuple[tuple[int, Group], ...]
    """By n, ascending."""
    fit: Fit | None


def saturation(n: Sequence[float], ppl: Sequence[float]) -> Fit | None:
    """The least-squares fit to PPL (P,) at n (P,), each point weighing the same; n distinct.

    None with fewer than three points, and where the points do not level off: they rise, or they bend so little that
    the fit's limit is not a perplexity (below 1) or its exponent not to be told.
    """
    if len(n) < 3:
        return None
    x, y = np.asarray(n, float), np.asarray(ppl, float)
    start = _best_start(x, y)
    if start is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # three points leave no covariance, as is said below
            found, covariance = curve_fit(_curve, x, y, p0=start, maxfev=20_000, xtol=1e-12, ftol=1e-12)
    except RuntimeError:  # it wanders off along a curve that does not level off
        return None
    floor, scale, exponent = map(float, found)
    if floor < 1 or scale <= 0 or not EXPONENTS[0] < exponent < EXPONENTS[-1]:
        return None
    variances = np.diag(covariance)
    certain = len(n) > 3 and bool(np.isfinite(variances).all())
    errors = tuple(map(float, np.sqrt(variances))) if certain else None
    return Fit(floor, scale, exponent, errors)  # type: ignore[arg-type]


def _curve(n: Array, floor: float, scale: float, exponent: float) -> Array:
    with np.errstate(over="ignore"):
        return floor + scale * n**-exponent


def _best_start(x: Array, y: Array) -> tuple[float, float, float] | None:
    """The best of `EXPONENTS` with its floor and scale; None at an end of their range."""
    best, errors = [], []
    for exponent in EXPONENTS:
        power = (x / x[0]) ** -exponent  # relative to the first point, so that both columns are of one size
        columns = np.stack([np.ones_like(x), power], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(columns, y, rcond=None)
        best.append((float(floor), float(scale * x[0] ** exponent), float(exponent)))
        errors.append(float(((columns @ [floor, scale] - y) ** 2).sum()))
    index = int(np.argmin(errors))
    return best[index] if 0 < index < len(best) - 1 else None


def series_of(groups: Iterable[Group]) -> list[Series]:
    """Each set of otherwise equal groups that has several values of `samples`, fitted; the lowest PPL first."""
    found: dict[tuple[tuple[str, Any], ...], dict[int, Group]] = {}
    for group in groups:  # best first
        if SAMPLES in group.settings:
            rest = tuple((key, value) for key, value in group.settings.items() if key != SAMPLES)
            found.setdefault(rest, {})[group.settings[SAMPLES]] = group
    several = {rest: points for rest, points in found.items() if len(points) > 1}
    keys = telling([dict(rest) for rest in several])
    return [_series({k: v for k, v in rest if k in keys}, points) for rest, points in several.items()]


def _series(settings: dict[str, Any], points: dict[int, Group]) -> Series:
    ordered = tuple(sorted(points.items()))
    ppl = [group.val_ppl.mean for _, group in ordered]
    return Series(settings, ordered, saturation([n for n, _ in ordered], ppl))


def verdict(series: Series) -> str:
    """Why this series has the fit it has, or none, in a sentence's end."""
    values = len(series.points)
    if values < 3:
        return f"{values} values of samples: three are needed for a fit"
    if series.fit is None:
        return f"{values} values of samples, which do not level off: no fit"
    if values == 3:
        return "3 values of samples determine the curve exactly: no uncertainty can be given"
    if series.fit.errors is None:
        return f"{values} values of samples, which leave the curve's uncertainty open"
    return f"{values} values of samples, which leave {count(values - 3, 'degree')} of freedom"


def digits(value: float, error: float | None) -> str:
    """A value to the digit that its error allows (two of the error's), or to three of its own."""
    size = error if error else value / 10
    decimals = max(0, 1 - math.floor(math.log10(abs(size)))) if size else 0
    return f"{value:,.{min(decimals, 4)}f}"
