import math

import numpy as np
import pytest

from ctxkv_lightning.remember.estimates import Estimate, mean, perplexity, share


def test_the_error_of_a_share_is_that_of_many_draws_and_is_never_zero():
    draws = np.random.default_rng(0).binomial(200, 0.3, 20_000) / 200
    assert share([1.0] * 60 + [0.0] * 140).value == pytest.approx(0.3)
    assert share([1.0] * 60 + [0.0] * 140).error == pytest.approx(draws.std(), rel=0.02)
    assert share([0.0] * 10).error == pytest.approx(0.5 / 11)
    assert share([1.0] * 10).count == 10


def test_the_error_of_a_mean():
    assert mean([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert mean([1.0]).error is None


def test_perplexity_is_exact_and_its_error_counts_documents_not_tokens():
    rng = np.random.default_rng(0)
    level = rng.normal(5, 0.3, 400)
    losses, groups = np.repeat(level, 7), np.repeat(np.arange(400), 7)
    found = perplexity(losses, groups, seed=1)
    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-12)
    assert found.error == pytest.approx(found.value * 0.3 / math.sqrt(400), rel=0.15)
    assert found.count == 2800
    assert found == perplexity(losses, groups, seed=1)
    assert perplexity(losses[:7], groups[:7], 1).error is None
