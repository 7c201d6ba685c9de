"""The rivals against their formulas, written out token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.rivals import CascadeLM, RecurrenceLM, TransformerLM, build_model
from tests import oracles

V, D, C, H = 30, 24, 8, 2


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 25),
    S=st.integers(0, 25),
    window=st.none() | st.integers(1, 30),
    missing=st.integers(0, 25),
    seed=st.integers(0, 99),
)
def test_attention_over_tokens_equals_the_loop(T, S, window, missing, seed):
    """Also where the text begins inside the history, which is then as if it were cut off."""
    torch.manual_seed(seed)
    model = TransformerLM(V, D, H, 32, 0.1, window).eval()
    text = torch.randn(S + T, D)
    missing = min(missing, S)
    fast = model.attention(text[None, S:], text[None], torch.tensor([missing]))[0]
    slow = oracles.token_attention(model.attention, text[missing:], window)[S - missing :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_recurrence_reads_the_current_context_alone():
    model = RecurrenceLM(V, D, C, 16, 0.1).eval()
    embeddings, contexts = torch.randn(2, 5, D), torch.randn(2, 8, C)
    for b in range(2):
        for t in range(5):
            hidden = F.layer_norm(embeddings[b, t] + model.read(contexts[b, 3 + t]), (D,))
            hidden = hidden + model.ffn.norm(model.ffn.down(F.gelu(model.ffn.up(hidden))))
            torch.testing.assert_close(model(embeddings, contexts)[b, t], hidden, atol=1e-5, rtol=0)


def test_cascade_equals_its_formula():
    model = CascadeLM(V, D, C).eval()
    embeddings, contexts = torch.randn(1, 4, D), torch.randn(1, 4, 2 * C)
    for t in range(4):
        joined = torch.cat([contexts[0, t, :C], contexts[0, t, C:], embeddings[0, t]])
        expected = F.layer_norm(
            embeddings[0, t] + F.gelu(model.token_layer.weight @ joined + model.token_layer.bias), (D,)
        )
        torch.testing.assert_close(model(embeddings, contexts)[0, t], expected, atol=1e-5, rtol=0)


def test_parameters_of_the_rivals_at_the_published_size():
    with torch.device("meta"):
        counts = {
            name: build_model(name, 50_257, 768, 256, 8, 20, 32, 3072, 0.1, "strided", 103).parameter_counts()
            for name in ("context_kv", "cascade", "transformer", "sliding_window", "recurrence")
        }
    attention, ffn = 4 * (768 * 768 + 768) + 1536, 4_723_968
    assert counts["context_kv"]["trainable"] == 6_301_440
    assert counts["transformer"]["trainable"] == counts["sliding_window"]["trainable"] == attention + ffn
    assert counts["recurrence"]["trainable"] == 256 * 768 + 768 + 1536 + ffn
    assert counts["cascade"]["trainable"] == (512 + 768) * 768 + 768 + 1536
    assert counts["cascade"]["blocks"] == 2 * 262_912


@pytest.mark.parametrize("name", ["context_kv", "cascade", "transformer", "sliding_window", "recurrence"])
def test_every_model_is_built_by_the_module_and_freezes_what_it_does_not_train(name):
    module = ContextKVLMModule(V, D, C, H, 3, 4, 16, model=name, window_tokens=5)
    trained = {key.split(".")[1] for key, p in module.named_parameters() if p.requires_grad}
    assert not trained & {"embedding", "embedding_norm", "encoder", "blocks"}
    assert trained


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model 'mamba'"):
        ContextKVLMModule(V, D, C, H, model="mamba")
