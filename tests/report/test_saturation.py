import math
import random
from typing import Any

import numpy as np
import pytest

from ctxkv_lightning.report.groups import differing, grouped
from ctxkv_lightning.report.runs import as_run
from ctxkv_lightning.report.saturation import Series, digits, saturation, series_of, verdict
from tests.report.sample_metrics import model_metrics

CASCADE = {200: 258.3, 400: 187.6, 800: 150.5, 1600: 127.4, 3200: 114.8}


def squared_error(floor: float, scale: float, exponent: float) -> float:
    return sum((floor + scale * n**-exponent - ppl) ** 2 for n, ppl in CASCADE.items())


@pytest.mark.parametrize("known", [(95.4, 10_000.0, 0.778), (20.0, 500.0, 0.3), (300.0, 9e6, 2.5)])
def test_known_parameters_are_found_again(known: tuple[float, float, float]) -> None:
    n = [50, 100, 250, 500, 1000]
    fit = saturation(n, [known[0] + known[1] * each ** -known[2] for each in n])
    assert fit is not None
    assert (fit.floor, fit.scale, fit.exponent) == pytest.approx(known, rel=1e-4)
    assert fit.errors is not None
    assert max(error / value for error, value in zip(fit.errors, known, strict=True)) < 1e-4


def test_the_published_series_is_fitted_better_than_by_the_published_curve() -> None:
    fit = saturation(list(CASCADE), list(CASCADE.values()))
    assert fit is not None
    # Published: 95.4 + 10,000 n^-0.778, whose A is round. Free of that, the three move together along a valley.
    assert fit.floor == pytest.approx(95.4, rel=0.05)
    assert fit.exponent == pytest.approx(0.778, abs=0.06)
    assert squared_error(fit.floor, fit.scale, fit.exponent) < squared_error(95.4, 10_000, 0.778)
    for n in CASCADE:
        assert fit.at(n) == pytest.approx(95.4 + 10_000 * n**-0.778, rel=0.01)


def test_no_other_curve_nearby_is_closer_to_the_published_series() -> None:
    fit = saturation(list(CASCADE), list(CASCADE.values()))
    assert fit is not None
    least = squared_error(fit.floor, fit.scale, fit.exponent)
    for exponent in np.linspace(0.5, 1.2, 71):  # for each exponent the best of the other two by hand
        power = np.array([n**-exponent for n in CASCADE])
        ppl = np.array(list(CASCADE.values()))
        scale = np.cov(power, ppl, bias=True)[0, 1] / power.var()
        assert squared_error(ppl.mean() - scale * power.mean(), scale, exponent) >= least - 1e-9


def test_standard_errors_are_the_scatter_of_repeated_experiments() -> None:
    n = [50, 100, 200, 400, 800, 1600, 3200, 6400]
    noise, true = random.Random(3), [95.4 + 10_000 * each**-0.778 for each in n]
    fits = [saturation(n, [ppl + noise.gauss(0, 0.5) for ppl in true]) for _ in range(200)]
    found = [fit for fit in fits if fit is not None and fit.errors is not None]
    assert len(found) == 200
    scatter = np.std([(fit.floor, fit.scale, fit.exponent) for fit in found], axis=0)
    said = np.sqrt(np.mean([np.square(fit.errors or ()) for fit in found], axis=0))
    assert said == pytest.approx(scatter, rel=0.15)


def test_three_points_determine_the_curve_and_leave_no_uncertainty() -> None:
    n = [100, 500, 1000]
    fit = saturation(n, [95.4 + 10_000 * each**-0.778 for each in n])
    assert fit is not None
    assert (fit.floor, fit.scale, fit.exponent) == pytest.approx((95.4, 10_000, 0.778), rel=1e-4)
    assert fit.errors is None


@pytest.mark.parametrize(
    "ppl",
    [
        [300.0, 200.0],  # two points
        [100.0, 200.0, 300.0, 400.0],  # it rises
        [400.0, 390.0, 360.0, 250.0],  # it falls ever faster
        [400.0, 200.0, 80.0, 2.0],  # its limit would lie below 1
        [250.0, 250.0, 250.0, 250.0],
    ],
)
def test_points_that_do_not_level_off_have_no_fit(ppl: list[float]) -> None:
    assert saturation([50, 100, 250, 500][: len(ppl)], ppl) is None


def series(samples: list[int], **choice: Any) -> list[Series]:
    runs = [
        as_run("x", model_metrics(samples=n, seed=seed, val_ppl=95.4 + 10_000 * n**-0.778 + 2 * seed, **choice))
        for n in samples
        for seed in (-1, 0, 1)
    ]
    return series_of(grouped(runs, differing(runs)))


def test_seeds_are_averaged_before_the_fit() -> None:
    (found,) = series([50, 100, 250, 500])
    assert [n for n, _ in found.points] == [50, 100, 250, 500]
    assert found.fit is not None
    assert found.fit.floor == pytest.approx(95.4, rel=1e-4)
    assert verdict(found) == "4 values of samples, which leave 1 degree of freedom"


def test_what_a_fit_rests_on_is_said() -> None:
    assert series([100]) == []
    two, three = series([100, 500])[0], series([100, 250, 500])[0]
    assert two.fit is None
    assert verdict(two) == "2 values of samples: three are needed for a fit"
    assert three.fit is not None
    assert three.fit.errors is None
    assert "determine the curve exactly: no uncertainty can be given" in verdict(three)


def test_each_configuration_is_a_series_of_its_own() -> None:
    runs = [
        as_run("x", model_metrics(model, samples=n, interval=i))
        for model, i in (("context_kv", 20), ("context_kv", 50), ("transformer", 20))
        for n in (50, 100, 250, 500)
    ]
    runs.append(as_run("x", model_metrics("cascade", samples=500)))
    found = series_of(grouped(runs, differing(runs)))
    assert sorted(str(each.settings) for each in found) == [
        "{'model.name': 'context_kv', 'interval': 20}",
        "{'model.name': 'context_kv', 'interval': 50}",
        "{'model.name': 'transformer'}",
    ]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (99.2522, 2.069, "99.3"),
        (12981.5, 1747.9, "12,982"),
        (0.83111, 0.02715, "0.831"),
        (0.8311, None, "0.831"),
        (12981.5, None, "12,982"),
        (95.4, 1e-12, "95.4000"),
        (0.0, None, "0"),
    ],
)
def test_numbers_have_the_digits_that_their_error_allows(value: float, error: float | None, text: str) -> None:
    assert digits(value, error) == text


def test_at_infinity_a_curve_is_its_floor() -> None:
    fit = saturation(list(CASCADE), list(CASCADE.values()))
    assert fit is not None
    assert math.isclose(fit.at(1e30), fit.floor)
