"""Numbers with how far they may be off, and of how many observations they are made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]

RESAMPLES = 1000
"""Of a bootstrap: its own error is then some 2 % of what it estimates."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error (None where one observation cannot tell), and the observations behind it."""

    value: float
    error: float | None
    count: int


def share(hits: Sequence[float]) -> Estimate:
    """The mean of hits in [0, 1]; its error is half of Wilson's interval (1927) at one sigma, so never 0."""
    n, p = len(hits), sum(hits) / len(hits)
    return Estimate(p, math.sqrt(p * (1 - p) / n + 1 / (4 * n * n)) / (1 + 1 / n), n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with its standard error."""
    n = len(values)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def perplexity(losses: Reals, groups: Sequence[int] | NDArray[np.int64], seed: int) -> Estimate:
    """exp of the mean of losses (n,) in nats; its error by a bootstrap over whole groups (n,), seeded.

    Tokens of one document are alike, so documents are what is drawn (Efron & Tibshirani, 1993).
    """
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, losses), np.bincount(index)
    value = math.exp(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(value, None, len(losses))
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    resampled = np.exp(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return Estimate(value, float(resampled.std(ddof=1)), len(losses))
