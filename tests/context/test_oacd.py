import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.context import oacd
from tests import oracles

sizes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10_000))


def draw(size):
    n, C, seed = size
    return torch.randn(n, C, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(sizes, st.floats(0, 3))
def test_loss_and_gradient_equal_the_formula(size, weight):
    fast, slow = draw(size).requires_grad_(), draw(size).requires_grad_()
    a, b = oacd.oacd_loss(fast, weight), oracles.oacd_from_formula(slow, weight)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if size[0] > 1:  # the norm of a single centred context is 0 and has no derivative
        a.backward()
        b.backward()
        torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-5)


def test_dispersed_centred_contexts_have_the_lower_loss():
    spread = torch.randn(200, 16)
    assert oacd.oacd_loss(spread) < oacd.oacd_loss(0.1 * spread)
    assert oacd.oacd_loss(spread) < oacd.oacd_loss(spread + 5)


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_effective_rank_equals_the_svd(size):
    assert oacd.effective_rank(draw(size)) == pytest.approx(oracles.effective_rank_by_svd(draw(size)), abs=1e-5)


def test_effective_rank_in_closed_form():
    assert oacd.effective_rank(torch.eye(6).repeat(5, 1)) == pytest.approx(1)
    assert oacd.effective_rank(torch.ones(50, 4)) == pytest.approx(1 / 4)
    assert oacd.effective_rank(torch.eye(8)[:2]) == pytest.approx(2 / 8)
    assert oacd.effective_rank(torch.zeros(5, 3)) == 0


def test_blocks_of_rows_change_nothing(monkeypatch):
    contexts, before = torch.randn(50, 6), torch.randn(50, 6)
    whole = oacd.singular_values(contexts), oacd.convergence_rate(contexts, before, 1.9)
    monkeypatch.setattr(oacd, "ROWS_AT_A_TIME", 7)
    torch.testing.assert_close(oacd.singular_values(contexts), whole[0])
    assert oacd.convergence_rate(contexts, before, 1.9) == whole[1]


@settings(deadline=None, max_examples=40)
@given(sizes, st.floats(0.01, 4))
def test_convergence_rate_counts_still_rows(size, threshold):
    current, previous = draw(size), draw((*size[:2], size[2] + 1))
    expected = oracles.convergence_from_formula(current, previous, threshold)
    assert oacd.convergence_rate(current, previous, threshold) == pytest.approx(expected)
    assert oacd.convergence_rate(current, current, threshold) == 1


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.6, 0.605, 0.606], True),
        ([0.6, 0.59, 0.58], True),
        ([0.6, 0.605, 0.62], False),
        ([0.6, 0.62, 0.621], False),
        ([0.4, 0.405, 0.406], False),
        ([0.499, 0.499, 0.506], False),
        ([0.6, 0.6], False),
        ([0.1, 0.5, 0.8, 0.805, 0.806], True),
        ([], False),
    ],
)
def test_plateau_needs_two_small_gains_in_a_row_above_half(rates, expected):
    assert oacd.has_plateaued(rates) is expected


def test_loss_is_finite_for_a_single_context():
    assert math.isfinite(float(oacd.oacd_loss(torch.randn(1, 8))))
