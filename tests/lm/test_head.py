import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.lm import head
from tests.oracles import full_logit_loss


def draw(N, V, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    return hidden, torch.randn(V, D, generator=generator), torch.randint(0, V, (N,), generator=generator)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 40), V=st.integers(1, 50), D=st.integers(1, 9), chunk=st.integers(1, 15), seed=st.integers(0, 99)
)
def test_loss_and_gradient_equal_full_logits(N, V, D, chunk, seed):
    hidden, table, targets = draw(N, V, D, seed)
    fast, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK", chunk)
        patch.setattr(head, "CPU_BLOCK", 3 * V)
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
    plain = head._normalise
    monkeypatch.setattr(head, "_normalise", lambda logits, *rest: rows.append(len(logits)) or plain(logits, *rest))
    head.frozen_cross_entropy(*draw(10, 6, 3))
    assert rows == [4, 4, 2]


def test_the_table_gets_no_gradient():
    hidden, table, targets = draw(5, 6, 3)
    table.requires_grad_()
    head.frozen_cross_entropy(hidden.requires_grad_(), table, targets).sum().backward()
    assert table.grad is None
