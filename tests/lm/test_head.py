import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.lm import head, normalise
from tests.oracles import full_logit_loss


def draw(N, V, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    return hidden, torch.randn(V, D, generator=generator), torch.randint(0, V, (N,), generator=generator)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), V=st.integers(1, 9), block=st.integers(1, 60), seed=st.integers(0, 99))
def test_column_sums_are_those_of_fp64_however_many_rows_there_are(n, V, block, seed):
    logits = (100 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalise, "CPU_BLOCK", block)
        sums = normalise.column_sums(logits)
    torch.testing.assert_close(sums, logits.double().sum(dim=0).float(), rtol=1e-5, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(0, 40),
    V=st.integers(1, 50),
    D=st.integers(1, 9),
    chunk=st.integers(1, 15),
    width=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_equal_full_logits(N, V, D, chunk, width, seed):
    hidden, table, targets = draw(N, V, D, seed)
    fast, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK", chunk)
        patch.setattr(normalise, "CPU_BLOCK", 3 * V)
        patch.setitem(head.WIDTH, "cpu", width)
        a = head.frozen_cross_entropy(fast, table, targets)
        scored, hits = head.score(hidden, table, targets)
    b = full_logit_loss(slow, table, targets)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(hits, (hidden @ table.T).argmax(1) == targets)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-5)


def test_the_loss_is_fp32_under_autocast_and_close_to_exact():
    hidden, table, targets = draw(300, 500, 64)
    exact = full_logit_loss(hidden, 0.05 * table, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.frozen_cross_entropy(hidden.requires_grad_(), 0.05 * table, targets)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean().item() < 0.01
    assert len(rounded.detach().unique()) > 250  # not rounded to bf16, which has few values near ln V
    rounded.mean().backward()
    assert hidden.grad.dtype == torch.float32


def test_a_hopeless_target_has_a_finite_loss():
    hidden, table = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert float(head.frozen_cross_entropy(hidden, table, torch.tensor([1]))) == pytest.approx(400)


def test_logits_are_never_all_held_at_once(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 4)
    rows = []
    plain = normalise.normalise
    monkeypatch.setattr(head, "normalise", lambda logits, *rest: rows.append(len(logits)) or plain(logits, *rest))
    head.frozen_cross_entropy(*draw(10, 6, 3))
    assert rows == [4, 4, 2]


def test_the_table_gets_no_gradient():
    hidden, table, targets = draw(5, 6, 3)
    table.requires_grad_()
    head.frozen_cross_entropy(hidden.requires_grad_(), table, targets).sum().backward()
    assert table.grad is None


def test_a_kernel_that_cannot_be_built_is_found_out_once_and_done_without(caplog):
    asked = []

    def broken(*_):
        asked.append(1)
        raise RuntimeError("Failed to find C compiler")

    with caplog.at_level("WARNING"):
        assert not normalise.works(broken, "cpu")
        assert not normalise.works(broken, "cpu")
    assert asked == [1]
    assert "Failed to find C compiler" in caplog.text
    assert normalise.works(normalise.normalise_plainly, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "V", "P"), [(1, 1, 1), (3, 5, 64), (7, 8192, 8192), (5, 50_257, 50_304), (300, 99, 128)])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel_equals_softmax(dtype, n, V, P, gradient):
    generator = torch.Generator().manual_seed(n)
    logits = (5 * torch.randn(n, P, generator=generator)).to("cuda", dtype)
    targets = torch.randint(0, V, (n,), generator=generator).cuda()
    slow, fast = logits.clone(), logits.clone()
    losses = normalise.normalise_plainly(slow, targets, V, gradient)
    torch.testing.assert_close(normalise.normalise(fast, targets, V, gradient), losses, atol=1e-4, rtol=1e-5)
    assert normalise.normalise_rows is not None
    torch.testing.assert_close(fast, slow, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-5)
    if not gradient:
        assert torch.equal(fast, logits)
