"""Layers after the first, against their formulas: all over the same contexts, or over what the one before them made."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.build import build_module, reach
from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.rivals import RecurrenceLM, TransformerLM, build_model
from ctxkv_lightning.lm.state import state_bytes
from ctxkv_lightning.metrics import describe_attention
from tests import oracles

V, D, C, H = 30, 24, 8, 2
NORMS = st.sampled_from(["post", "pre"])


def shaken(model):
    """Layers that start as the identity would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 12),
    S=st.integers(0, 25),
    window=st.none() | st.integers(1, 9),
    layers=st.integers(1, 3),
    missing=st.integers(0, 25),
    norm=NORMS,
    seed=st.integers(0, 99),
)
def test_deeper_attention_over_tokens_equals_the_loop(T, S, window, layers, missing, norm, seed):
    """A text that begins inside the history is as if that were cut off, and no gradient is lost to what is before."""
    torch.manual_seed(seed)
    model = shaken(TransformerLM(V, D, H, 32, 0.1, window, recipe={"norm": norm}, layers=layers))
    text, missing = torch.randn(S + T, D), min(missing, S)
    fast = model(text[None, S:], text[None], torch.tensor([missing]))[0]
    slow = oracles.transformer_layers(model, text[missing:], window)[S - missing :]
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    fast.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_window_of_history_for_each_layer_is_enough(layers):
    model = shaken(TransformerLM(V, D, H, 32, 0.1, 5, layers=layers))
    text, S = torch.randn(1, 60, D), layers * (5 - 1)
    whole = model(text, text)[:, -10:]
    torch.testing.assert_close(model(text[:, -10:], text[:, -10 - S :]), whole, atol=1e-5, rtol=0)
    less = model(text[:, -10:], text[:, -9 - S :])
    assert not torch.allclose(less, whole, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(N=st.integers(2, 30), interval=st.integers(1, 9), layers=st.integers(1, 3), seed=st.integers(0, 99))
def test_all_layers_read_the_same_contexts(N, interval, layers, seed):
    torch.manual_seed(seed)
    model = shaken(ContextKVLM(V, D, C, H, interval, 4, 16, layers=layers))
    tokens = torch.randint(0, V, (N,))
    embeddings = model.embed(tokens)
    contexts = oracles.contexts_step_by_step(model.encoder, embeddings)
    hidden = model(embeddings[None], contexts[None])[0]
    fast = oracles.full_logit_loss(hidden[:-1], model.table, tokens[1:])
    torch.testing.assert_close(fast, oracles.step_by_step_nll(model, tokens), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 40),
    interval=st.integers(1, 6),
    window=st.integers(1, 9),
    layers=st.integers(1, 3),
    norm=NORMS,
    selection=st.sampled_from(["strided", "grid"]),
    seed=st.integers(0, 99),
)
def test_local_layers_attend_to_what_the_layer_before_made_of_the_last_tokens(
    N, interval, window, layers, norm, selection, seed
):
    torch.manual_seed(seed)
    recipe = {"norm": norm}
    model = shaken(ContextKVLM(V, D, C, H, interval, 4, 16, 0.1, selection, recipe, layers, window))
    embeddings, contexts = torch.randn(N, D), torch.randn(N, C)
    first = model.ffn(model.attention(embeddings[None], contexts[None]))[0]
    slow = oracles.transformer_layers(model, first, window, begun=True)
    torch.testing.assert_close(model(embeddings[None], contexts[None])[0], slow, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 60),
    asked=st.integers(1, 30),
    window=st.integers(1, 9),
    layers=st.integers(1, 3),
    selection=st.sampled_from(["strided", "grid"]),
    trained=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_window_with_its_history_has_the_states_of_the_whole_text(N, asked, window, layers, selection, trained, seed):
    """What stands before the text is padding, as a loader pads it, and says nothing."""
    torch.manual_seed(seed)
    recipe = {"train_embedding": trained}
    model = shaken(ContextKVLM(V, D, C, H, [2, 3], 4, 16, 0.1, selection, recipe, layers, window))
    tokens, contexts = torch.randint(0, V, (1, N)), torch.randn(1, N, C)
    whole = model.states(tokens, contexts, N)
    start = max(0, N - asked) // model.alignment * model.alignment
    T, missing = N - start, max(0, model.history - start)
    reach = torch.arange(start - model.history, N).clamp_min(0)
    part = model.states(tokens[:, reach], contexts[:, reach], T, torch.tensor([missing]))
    torch.testing.assert_close(part, whole[:, start:], atol=1e-4, rtol=1e-4)


def test_history_is_what_the_data_module_is_asked_for():
    for words in ("interval=3 max_contexts=5", "interval=[2,3] heads=2 selection=grid", "max_contexts=1"):
        for more in ("", "model.layers=3", "model.layers=3 model.local_window=9"):
            (config,) = check_command_line([*words.split(), *more.split()])
            module = build_module(config, 300)
            assert reach(config) == (module.model.history, module.model.alignment)


def test_history_of_a_sliding_window_is_one_window_for_each_layer():
    (config,) = check_command_line(["model=sliding_window", "model.layers=3", "model.window_tokens=9"])
    assert reach(config) == (3 * 8, 1)


def test_a_local_layer_keeps_its_window_and_no_more():
    one, three = (state_bytes(ContextKVLM(V, D, C, H, 5, 4, 16, layers=n, local_window=7), 99) for n in (1, 3))
    assert three - one == 2 * 6 * 2 * D * 4


def test_deeper_layers_of_the_recurrence_read_the_current_context_again():
    model = shaken(RecurrenceLM(V, D, C, 16, 0.1, layers=3))
    hidden, contexts = torch.randn(2, 5, D), torch.randn(2, 8, C)
    found = model(hidden, contexts)
    for layer in model.layers:
        hidden = layer.ffn(layer.norm(hidden + layer.read(contexts[:, 3:])))
    torch.testing.assert_close(found, hidden)
    assert len({id(layer.read) for layer in model.layers}) == 3


def test_layers_cost_no_bytes_over_contexts_and_each_its_own_over_tokens():
    for tokens in (1, 1_000):
        assert len({state_bytes(ContextKVLM(V, D, C, H, 5, 4, 16, layers=n), tokens) for n in (1, 4)}) == 1
        one, four = (state_bytes(TransformerLM(V, D, H, 16, 0.1, layers=n), tokens) for n in (1, 4))
        assert four == 4 * one
    one, four = (state_bytes(TransformerLM(V, D, H, 16, 0.1, 7, layers=n), 99) for n in (1, 4))
    assert four == 4 * one


@pytest.mark.parametrize("name", ["context_kv", "transformer", "sliding_window", "recurrence"])
def test_the_first_layer_is_the_one_of_a_model_that_has_no_more(name):
    """So that its parts are called what they are called in checkpoints of one layer."""
    one, two = (
        build_model(name, V, D, C, H, 3, 4, 16, 0.1, "strided", 5, None, layers).state_dict() for layers in (1, 2)
    )
    assert set(one) < set(two)
    assert {key.split(".")[0] for key in set(two) - set(one)} == {"deeper"}


def test_slot_weights_are_those_of_every_layers_heads():
    model = shaken(ContextKVLM(V, D, C, H, 3, 4, 16, layers=2))
    embeddings, contexts = torch.randn(1, 20, D), torch.randn(1, 20, C)
    weights = model.slot_weights(embeddings, contexts)
    assert weights.shape == (2 * H, 4)
    (second,) = model.deeper
    hidden = model.ffn(model.attention(embeddings, contexts))
    torch.testing.assert_close(weights[H:], second.attention.slot_weights(hidden, contexts))


def test_local_layers_have_no_slots():
    model = shaken(ContextKVLM(V, D, C, H, 3, 4, 16, layers=3, local_window=5))
    embeddings, contexts = torch.randn(1, 20, D), torch.randn(1, 20, C)
    weights = model.slot_weights(embeddings, contexts)
    assert weights.shape == (H, 4)
    torch.testing.assert_close(weights, model.attention.slot_weights(embeddings, contexts))


def test_the_weights_that_are_reported_are_those_without_dropout():
    module = ContextKVLMModule(V, D, C, H, 3, 4, 16, layers=2, dropout=0.5)
    shaken(module.model)
    memory = torch.randn(1, 30, C)
    windows = SimpleNamespace(
        tokens=torch.randint(V, (1, 30)), embeddings=torch.empty(1, 20, D), memory=memory, first=None
    )
    data = SimpleNamespace(val_dataloader=lambda: [windows])
    quiet = describe_attention(module, data)
    module.train()
    assert describe_attention(module, data) == quiet
