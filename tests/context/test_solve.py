import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ctxkv_lightning.context import parts, solve
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import create_array
from tests.oracles import contexts_step_by_step


def normalised(N, D, seed=0):
    return F.layer_norm(torch.randn(N, D, generator=torch.Generator().manual_seed(seed)), (D,))


def forgetful(C, D, seed=0):
    """A small encoder whose pre-activations are as large as at the published size, so that it forgets as fast."""
    torch.manual_seed(seed)
    encoder = ContextEncoder(C, D).requires_grad_(False)
    torch.nn.init.normal_(encoder.linear.weight, std=0.1 * (1024 / (C + D)) ** 0.5)
    return encoder


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 75), segment=st.integers(1, 20), warm_up=st.integers(1, 30), block=st.integers(1, 90))
def test_contexts_equal_the_loop_at_any_length(N, segment, warm_up, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "SEGMENT", segment)
        patch.setattr(solve, "WARM_UP", warm_up)
        patch.setattr(solve, "BLOCK", block)
        encoder, embeddings = forgetful(32, 64, N), normalised(N, 64, N)
        contexts, error = solve.solve_contexts(encoder, embeddings, tolerance=1e-6)
    assert error <= 1e-6
    torch.testing.assert_close(contexts, contexts_step_by_step(encoder, embeddings), atol=1e-5, rtol=0)


def test_no_tokens_give_no_contexts():
    contexts, error = solve.solve_contexts(ContextEncoder(6, 10), torch.empty(0, 10))
    assert contexts.shape == (0, 6)
    assert error == 0


def test_published_size_is_exact_and_certified():
    torch.manual_seed(1)
    encoder, embeddings = ContextEncoder(256, 768), normalised(1500, 768)
    contexts, error = solve.solve_contexts(encoder, embeddings)
    truth = contexts_step_by_step(encoder, embeddings)
    assert error <= 1e-5
    assert (contexts - truth).abs().max().item() <= 1e-5


def test_an_encoder_that_does_not_forget_is_still_exact():
    """With tiny weights nearly nothing is forgotten, every warm-up misses, and all seams must be run again."""
    torch.manual_seed(2)
    encoder, embeddings = ContextEncoder(8, 12), normalised(1400, 12)
    torch.nn.init.normal_(encoder.linear.weight, std=0.01)
    contexts, error = solve.solve_contexts(encoder, embeddings, tolerance=1e-6)
    assert error <= 1e-6
    torch.testing.assert_close(contexts, contexts_step_by_step(encoder, embeddings), atol=1e-4, rtol=0)


def test_the_certificate_is_honest_about_a_loose_tolerance():
    """Accepting every warm-up must show in the returned error."""
    torch.manual_seed(2)
    encoder, embeddings = ContextEncoder(8, 12), normalised(1400, 12)
    torch.nn.init.normal_(encoder.linear.weight, std=0.01)
    contexts, error = solve.solve_contexts(encoder, embeddings, tolerance=1e9)
    off = (contexts - contexts_step_by_step(encoder, embeddings)).abs().max().item()
    assert off > 1e-3
    assert error > 1e-3


@pytest.mark.parametrize("place", [0, 300, 599])
def test_contexts_that_are_not_finite_are_refused(place):
    encoder, embeddings = forgetful(8, 12), normalised(600, 12)
    embeddings[place, 3] = float("nan")
    with pytest.raises(UserError, match="contexts are not finite"):
        solve.solve_contexts(encoder, embeddings)


def test_a_table_indexed_by_ids_gives_the_same_contexts_and_fills_out():
    encoder, table = forgetful(6, 10), normalised(5, 10)
    ids = torch.randint(0, 5, (700,))
    out = torch.empty(700, 6)
    contexts, _ = solve.solve_contexts(encoder, table, ids=ids, out=out)
    assert contexts is out
    torch.testing.assert_close(out, solve.solve_contexts(encoder, table[ids])[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [512, 1])
def test_parts_solved_by_processes_are_the_whole(tmp_path, monkeypatch, warm_up):
    """Also where the warm-up is too short, so that parts start wrong and are solved again."""
    monkeypatch.setattr(parts, "WARM_UP", warm_up)
    torch.manual_seed(0)
    encoder, table = forgetful(16, 24), F.layer_norm(torch.randn(50, 24), (24,))
    ids = torch.randint(0, 50, (1501,))
    create_array(tmp_path, "contexts", (1501, 16), np.float32)
    error = parts.solve_in_parts(encoder, table, ids, tmp_path / "contexts.npy", "float32", 1e-5, 3)
    expected = contexts_step_by_step(encoder, table[ids])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "contexts.npy")), expected, atol=1e-5, rtol=0)
    assert error <= 1e-5
