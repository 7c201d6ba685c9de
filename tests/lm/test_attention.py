from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.lm import attention, banded
from ctxkv_lightning.lm.attention import strided_attention
from tests import oracles


def draw(T, S, seed, B=2, H=2, d=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, d), (B, H, S + T, d), (B, H, S + T, d)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@contextmanager
def going(way):
    """Attention as a CPU computes it, in parts of a size or in the smallest ones, or as other devices do."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "smallest parts":
            patch.setattr(banded, "CACHED", 1)
        if way == "folded":
            patch.setattr(attention, "goes_by_parts", lambda query: False)
        yield


WAYS = ["parts", "smallest parts", "folded"]


def assert_same(fast, slow, inputs):
    """Values and gradients, the latter under a random projection."""
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    weights = torch.randn(slow.shape, generator=torch.Generator().manual_seed(0))
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (fast, slow))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=150)
@given(
    T=st.integers(1, 70),
    S=st.integers(0, 65),
    interval=st.integers(1, 80),
    max_contexts=st.integers(1, 12),
    seed=st.integers(0, 999),
    way=st.sampled_from(WAYS),
    side_by_side=st.booleans(),
)
def test_folded_attention_equals_gathering(T, S, interval, max_contexts, seed, way, side_by_side):
    inputs = draw(T, S, seed)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) if side_by_side else x for x in inputs]
    with going(way):
        fast = strided_attention(*given, interval, max_contexts)
    assert_same(fast, oracles.gather_attention(*inputs, interval, max_contexts), inputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("T", "S", "interval", "max_contexts"),
    [
        (1, 0, 20, 32),
        (19, 0, 20, 32),
        (20, 0, 20, 32),
        (21, 620, 20, 32),
        (97, 3, 1, 1),
        (50, 49, 7, 1),
        (45, 0, 1, 32),
        (64, 0, 1, 33),  # two blocks of 32, each reading all of the one before
        (65, 7, 1, 32),
        (130, 31, 2, 9),
        (333, 40, 3, 40),
    ],
)
def test_awkward_sizes(T, S, interval, max_contexts, way):
    inputs = draw(T, S, 7)
    with going(way):
        fast = strided_attention(*inputs, interval, max_contexts)
    assert_same(fast, oracles.gather_attention(*inputs, interval, max_contexts), inputs)


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(1, 40),
    interval=st.integers(1, 15),
    max_contexts=st.integers(1, 6),
    seed=st.integers(0, 99),
    way=st.sampled_from(WAYS),
)
def test_contexts_before_the_first_do_not_exist(T, interval, max_contexts, seed, way):
    """Row b with first[b] missing contexts equals that row with its history cut off, whatever stands there."""
    S = (max_contexts - 1) * interval
    query, key, value = draw(T, S, seed)
    first = torch.tensor([S, S // 2])
    with going(way):
        fast = strided_attention(query, key, value, interval, max_contexts, first)
    for b in range(2):
        row = slice(b, b + 1)
        cut = [query[row], key[row, :, first[b] :], value[row, :, first[b] :]]
        torch.testing.assert_close(fast[row], oracles.gather_attention(*cut, interval, max_contexts), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(fast.sum(), value)[0]
    assert not gradient[0, :, :S].any()
    assert not gradient[1, :, : S // 2].any()


@pytest.mark.parametrize("way", WAYS)
def test_bf16_products_on_the_cpu_agree_with_fp32(way):
    inputs = draw(70, 40, 3)
    exact = strided_attention(*inputs, 7, 5)
    with going(way):
        rounded = strided_attention(*(x.bfloat16() for x in inputs), 7, 5)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max().item() < 0.05
    weights = torch.randn(exact.shape)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (exact, rounded))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max().item() < 0.1


@pytest.mark.parametrize("way", WAYS)
def test_fp64_stays_fp64(way):
    inputs = [x.detach().double().requires_grad_() for x in draw(70, 40, 3)]
    with going(way):
        fast = strided_attention(*inputs, 7, 5)
    slow = oracles.gather_attention(*inputs, 7, 5)
    torch.testing.assert_close(fast, slow, atol=1e-13, rtol=0)
    gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (fast, slow))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_autocast_does_not_round_what_is_given_in_fp32():
    inputs = draw(70, 40, 3)
    with torch.autocast("cpu", torch.bfloat16):
        fast = strided_attention(*inputs, 7, 5)
    assert_same(fast, oracles.gather_attention(*inputs, 7, 5), inputs)


def test_the_gradient_is_right_where_only_some_are_asked_for():
    query, key, value = draw(70, 40, 3)
    slow = oracles.gather_attention(query, key, value, 7, 5)
    fast = strided_attention(query.detach(), key, value.detach(), 7, 5)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), key)[0] for x in (fast, slow)))


def test_both_kernels_of_other_devices_agree_in_fp32(monkeypatch):
    inputs = draw(70, 40, 3)
    with going("folded"):
        fused = strided_attention(*inputs, 7, 5)
        with torch.autocast("cpu", enabled=False):
            monkeypatch.setattr(attention, "uses_plain_products", lambda query: True)
            plain = strided_attention(*inputs, 7, 5)
    assert_same(plain, fused, inputs)


def test_no_queries_give_no_output():
    query, key, value = draw(0, 5, 0)
    assert strided_attention(query, key, value, 3, 2).shape == (2, 2, 0, 4)


SELECTIONS = st.sampled_from(["strided", "grid"])


@settings(deadline=None, max_examples=120)
@given(
    T=st.integers(1, 45),
    S=st.integers(0, 50),
    intervals=st.tuples(st.integers(1, 50), st.integers(1, 12)),
    max_contexts=st.integers(1, 9),
    selection=SELECTIONS,
    seed=st.integers(0, 999),
)
def test_every_selection_with_an_interval_for_each_head_equals_gathering(
    T, S, intervals, max_contexts, selection, seed
):
    inputs = draw(T, S, seed)
    first = torch.tensor([0, S // 3])
    fast = attention.attend(*inputs, intervals, max_contexts, selection, first)
    assert_same(fast, oracles.gather_slots(*inputs, intervals, max_contexts, selection, first), inputs)


@pytest.mark.parametrize("selection", ["strided", "grid"])
@pytest.mark.parametrize("T", [1, 2, 20, 21, 300])
def test_selections_at_awkward_lengths(T, selection):
    inputs = draw(T, 57, 5, B=1, H=3)
    intervals = (20, 1, 20)
    fast = attention.attend(*inputs, intervals, 4, selection)
    assert_same(fast, oracles.gather_slots(*inputs, intervals, 4, selection), inputs)


def test_queries_between_two_grid_positions_read_the_same_grid():
    """Only the query's own context changes inside (I, 2I], so what else is read must come from M-1 positions."""
    query, key, value = (x.detach() for x in draw(41, 0, 1, B=1))
    for t in range(21, 41):
        read = [
            j
            for j in range(41)
            if not torch.equal(
                attention.grid_attention(query, key, value, 20, 3)[0, :, t],
                attention.grid_attention(query, key, value + (torch.arange(41) == j)[:, None], 20, 3)[0, :, t],
            )
        ]
        assert read == sorted({0, 20, t})


@pytest.mark.parametrize("selection", ["strided", "grid"])
def test_mean_distances_of_slots(selection):
    distances = attention.slot_distances((1, 4), 3, selection)
    expected = {"strided": [[0, 1, 2], [0, 4, 8]], "grid": [[0, 1, 2], [0, 2.5, 6.5]]}[selection]
    assert distances.tolist() == expected


@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(1, 30),
    S=st.integers(0, 30),
    intervals=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    max_contexts=st.integers(1, 6),
    selection=SELECTIONS,
)
def test_slot_weights_equal_the_loop_and_sum_to_one(T, S, intervals, max_contexts, selection):
    query, key, _ = (x.detach() for x in draw(T, S, T))
    weights = attention.slot_weights(query, key, intervals, max_contexts, selection)
    slow = oracles.slot_weights(query, key, intervals, max_contexts, selection)
    torch.testing.assert_close(weights, slow, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(1), torch.ones(2), atol=1e-5, rtol=0)
