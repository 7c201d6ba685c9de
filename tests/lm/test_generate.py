"""A decoder computes what the parallel model computes, and keeps no more than it says."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.lm import generate, prompt
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.lm.rivals import CascadeLM, RecurrenceLM, TransformerLM
from ctxkv_lightning.lm.state import kept_tensors, state_bytes
from ctxkv_lightning.text.ngram import KneserNeyTrigram
from tests import oracles

V, D, C, H = 60, 32, 16, 4
MODELS = {
    "strided": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1),
    "intervals": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1),
    "grid": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1, "grid"),
    "grid_intervals": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1, "grid"),
    "one_context": lambda: ContextKVLM(V, D, C, H, 5, 1, 48, 0.1),
    "one_context_grid": lambda: ContextKVLM(V, D, C, H, 5, 1, 48, 0.1, "grid"),
    "transformer": lambda: TransformerLM(V, D, H, 48, 0.1),
    "sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7),
    "recurrence": lambda: RecurrenceLM(V, D, C, 48, 0.1),
    "cascade": lambda: CascadeLM(V, D, C),
    "recipe": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1, recipe=RECIPE),
    "layers": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1, layers=3),
    "layers_grid_intervals": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1, "grid", layers=2),
    "local": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1, layers=3, local_window=4),
    "local_one": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1, layers=2, local_window=1),
    "local_wide": lambda: ContextKVLM(V, D, C, H, [1, 1, 2, 2], 3, 48, 0.1, layers=2, local_window=30),
    "local_grid": lambda: ContextKVLM(V, D, C, H, [2, 3, 3, 4], 4, 48, 0.1, "grid", layers=3, local_window=5),
    "recipe_local": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1, "strided", RECIPE, 3, 6),
    "recipe_local_grid": lambda: ContextKVLM(V, D, C, H, [2, 3, 3, 4], 4, 48, 0.1, "grid", RECIPE, 2, 6),
    "deep_transformer": lambda: TransformerLM(V, D, H, 48, 0.1, layers=3),
    "deep_sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7, layers=3),
    "deep_recurrence": lambda: RecurrenceLM(V, D, C, 48, 0.1, layers=3),
    "recipe_layers": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 8], 4, 48, 0.1, recipe=RECIPE, layers=3),
    "recipe_deep_transformer": lambda: TransformerLM(V, D, H, 48, 0.1, None, C, RECIPE, layers=2),
    "recipe_deep_sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7, C, RECIPE, layers=3),
    "recipe_deep_recurrence": lambda: RecurrenceLM(V, D, C, 48, 0.1, RECIPE, layers=2),
    "interleaved": lambda: ContextKVLM(V, D, C, H, [1, 8, 1, 8], 4, 48, 0.1),
    "recipe_unordered": lambda: ContextKVLM(V, D, C, H, [3, 1, 8, 1], 4, 48, 0.1, recipe=RECIPE),
    "recipe_short_pointer": lambda: ContextKVLM(
        V, D, C, H, 5, 4, 48, 0.1, recipe={**RECIPE, "pointer_window": 9, "pointer_values": False}
    ),
    "recipe_long_pointer": lambda: ContextKVLM(V, D, C, H, [1, 3, 3, 5], 4, 48, 0.1, recipe=RECIPE, layers=2),
    "recipe_grid": lambda: ContextKVLM(V, D, C, H, 5, 4, 48, 0.1, "grid", {**RECIPE, "norm": "post"}),
    "recipe_transformer": lambda: TransformerLM(V, D, H, 48, 0.1, None, C, RECIPE),
    "recipe_sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7, C, RECIPE),
    "recipe_recurrence": lambda: RecurrenceLM(V, D, C, 48, 0.1, RECIPE),
    "read_transformer": lambda: TransformerLM(V, D, H, 48, 0.1, None, C, {"read_current": True}),
    "read_deep_transformer": lambda: TransformerLM(V, D, H, 48, 0.1, None, C, {"read_current": True}, 3),
    "read_sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7, C, {"read_current": True}),
    "read_deep_sliding_window": lambda: TransformerLM(V, D, H, 48, 0.1, 7, C, {"read_current": True}, 3),
    "trained_embedding": lambda: TransformerLM(V, D, H, 48, 0.1, 7, C, {"train_embedding": True}),
}
RECIPE = {
    "norm": "pre",
    "train_embedding": True,
    "projection": True,
    "read_current": True,
    "pointer_heads": 2,
    "pointer_window": 24,
    "pointer_values": True,
    "ngram": True,
}
"""The pointer's window is also what (M-1) I contexts of the first of these models span."""
TRIGRAM = KneserNeyTrigram(np.random.default_rng(0).geometric(0.1, 400).clip(1, V) - 1, V)


def made(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval().requires_grad_(False)
    if model.output is not None:  # it starts with zeros, which would hide mistakes
        for parameter in [*model.output.parameters(), *model.ffn.parameters(), *model.deeper.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
        if model.output.ngram is not None:
            model.output.ngram.fill(TRIGRAM)
    return model


def parallel_logits(model, tokens, tolerance=1e-5):
    """Logits (N, V) of the whole text at once, over exact contexts or over the embeddings."""
    frozen = model.encoder_input(tokens)
    contexts = [solve_contexts(encoder, frozen, tolerance)[0] for encoder in model.encoders()]
    memory = torch.cat(contexts, dim=1) if contexts else model.embed(tokens)
    hidden = model.states(tokens[None], memory[None], len(tokens))
    if model.output is None:
        return model.logits(hidden)[0]
    parts = model.output.log_probabilities(hidden, model.table, memory[None], tokens[None], None)
    return torch.cat([log_p for _, log_p in parts], dim=1)[0]


@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("name", MODELS)
def test_stepping_equals_the_parallel_pass_at_every_position(name, keep):
    model, tokens = made(name), torch.randint(0, V, (90,))
    decoder = Decoder(model, keep=keep)
    stepped = torch.cat([decoder.step(token[None]) for token in tokens])
    torch.testing.assert_close(stepped, parallel_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 16, 41, 300])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_leaves_the_state_of_stepping_through_it(name, length, keep):
    model, tokens = made(name), torch.randint(0, V, (2, length + 20))
    fast, slow = Decoder(model, 2, keep), Decoder(model, 2, keep)
    logits = fast.read(tokens[:, :length])
    for token in tokens[:, :length].T:
        expected = slow.step(token)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for token in tokens[:, length:].T:  # what is kept is what later steps read
        torch.testing.assert_close(fast.step(token), slow.step(token), atol=1e-4, rtol=0)


class Recorded(TorchDispatchMode):
    """The operations of a block with what they were given; refuses those that ask the host, or take from it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, given=(), options=None):
        name = operation.name()
        assert not re.search("lift_fresh|_local_scalar_dense|nonzero|is_nonzero", name), f"{name} cannot be recorded"
        made = operation(*given, **(options or {}))
        self.calls.append((operation, given, options or {}, made))
        return made


class Replayed:
    """What a CUDA graph does, on any device: it records a step and runs nothing of Python when it is replayed."""

    made = 0

    def __init__(self, step, inputs):
        Replayed.made += 1
        decoder = step.__self__
        self.inputs, kept = [x.clone() for x in inputs], [*decoder.state.values(), decoder._at]
        before = [x.clone() for x in kept]
        with Recorded() as self.tape:
            self.output = step(*self.inputs)
        for x, was in zip(kept, before, strict=True):  # recording runs nothing
            x.copy_(was)

    def __call__(self, *inputs):
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        now = {}

        def current(x):
            return now.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for operation, given, options, made in self.tape.calls:
            again = operation(*tree_map(current, given), **tree_map(current, options))
            outputs, renewed = tree_leaves(made), tree_leaves(again)
            now.update((id(old), new) for old, new in zip(outputs, renewed, strict=True))
        return current(self.output).clone()


NEVER_STEADY = {name for name in MODELS if "grid" in name or name.removeprefix("recipe_").endswith("transformer")}


@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_equal_the_parallel_pass_at_every_position(name, length, keep, monkeypatch):
    """From where the rings are full, over and over; what grows, or is a grid, is never replayed."""
    monkeypatch.setattr(generate, "StepGraph", Replayed)
    monkeypatch.setattr(generate, "GRAPHED", ("cpu",))
    monkeypatch.setattr(generate, "RECORDED_AFTER", 3)
    monkeypatch.setattr(Replayed, "made", 0)
    model, tokens = made(name), torch.randint(0, V, (90,))
    decoder = Decoder(model, keep=keep)
    logits = [decoder.read(tokens[None, :length]), *(decoder.step(token[None]) for token in tokens[length:])]
    torch.testing.assert_close(torch.cat(logits), parallel_logits(model, tokens)[length - 1 :], atol=1e-4, rtol=0)
    assert Replayed.made == (name not in NEVER_STEADY)
    assert decoder.position == 90


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are recorded on a GPU")
@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - NEVER_STEADY))
def test_a_gpu_replays_what_a_cpu_steps(name, keep):
    model, tokens = made(name), torch.randint(0, V, (2, 90))
    slow, fast = Decoder(model, 2, keep), Decoder(made(name).cuda(), 2, keep)
    expected = [slow.read(tokens[:, :30]), *(slow.step(token) for token in tokens[:, 30:].T)]
    found = [fast.read(tokens[:, :30].cuda()), *(fast.step(token) for token in tokens[:, 30:].cuda().T)]
    assert fast._graph is not None
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 7, 24, 40])
@pytest.mark.parametrize("name", ["recipe", "recipe_short_pointer", "recipe_recurrence"])
def test_a_writer_is_not_pointed_at_its_own_words(name, length):
    """From the first word on, until none of the prompt is left in the window."""
    model, tokens = made(name), torch.randint(0, V, (length + 45,))
    contexts = solve_contexts(model.encoders()[0], model.encoder_input(tokens))[0]
    hidden = model.states(tokens[None], contexts[None], len(tokens))[0]
    for replayed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "StepGraph", Replayed)
            patch.setattr(generate, "GRAPHED", ("cpu",) if replayed else ())
            patch.setattr(generate, "RECORDED_AFTER", 1)
            check_writer(model, tokens, length, contexts, hidden)


def check_writer(model, tokens, length, contexts, hidden):
    decoder = Decoder(model, writing=True)
    written = [decoder.read(tokens[None, :length]), *(decoder.step(token[None]) for token in tokens[length:])]
    table = model.table.detach()
    expected = [
        oracles.mixed_probabilities(model.output, hidden[t], table, contexts, tokens, t, TRIGRAM, own=length).log()
        for t in range(length - 1, len(tokens))
    ]
    torch.testing.assert_close(torch.cat(written), torch.stack(expected), atol=1e-3, rtol=0)
    assert {k: x.shape for k, x in decoder.kept().items()} == {k: x.shape for k, x in Decoder(model).kept().items()}


@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_state_are_those_of_a_decoder_that_has_read_so_much(name, keep):
    model = made(name)
    decoder = Decoder(model, keep=keep)
    for n in range(1, 40):
        decoder.step(torch.tensor([1]))
        assert state_bytes(model, n, keep) == sum(x.numel() * 4 for x in decoder.kept().values())
    assert {k: x.shape for k, x in kept_tensors(model, 39, keep).items()} == {
        k: x.shape for k, x in decoder.kept().items()
    }


def test_a_published_decoder_keeps_its_window_and_on_the_grid_exactly_max_contexts():
    strided, grid = ContextKVLM(50, 768), ContextKVLM(50, 768, selection="grid")
    for n in (1, 1_000, 100_000):
        assert state_bytes(strided, n) == 621 * 256 * 4
        assert state_bytes(grid, n) == 32 * 256 * 4
    assert state_bytes(strided, 1, "kv") == 620 * 2 * 768 * 4 + 256 * 4
    assert state_bytes(TransformerLM(50, 768, 8, 8, 0.0), 1_000) == 1_000 * 2 * 768 * 4
    assert state_bytes(TransformerLM(50, 768, 8, 8, 0.0, 103), 10**6) == 102 * 2 * 768 * 4


@pytest.mark.parametrize(("pointed_at", "kept"), [(9, 20), (20, 20), (24, 24)])
def test_a_context_that_attention_and_the_pointer_read_is_kept_once(pointed_at, kept):
    recipe = {"pointer_heads": 1, "pointer_window": pointed_at}
    model = ContextKVLM(V, D, C, H, [1, 3, 3, 5], 5, 48, 0.1, recipe=recipe)
    assert state_bytes(model, 99) == 4 * (C + kept * (C + 1))  # and what followed each of them


def test_the_parts_in_which_a_prompt_is_read_do_not_show(monkeypatch):
    for name in ("DEEP_ROWS", "ROWS_AT_A_TIME", "CHUNK"):
        monkeypatch.setattr(prompt, name, 7 if name == "DEEP_ROWS" else 17)
    for name in ("recipe_deep_transformer", "deep_sliding_window", "recipe_local", "local_grid"):
        model, tokens = made(name), torch.randint(0, V, (60,))
        found = Decoder(model).read(tokens[None])
        torch.testing.assert_close(found[0], parallel_logits(model, tokens)[-1], atol=1e-4, rtol=0)


def test_nothing_is_allocated_for_the_state_while_stepping():
    decoder = Decoder(made("intervals"))
    addresses = {name: tensor.data_ptr() for name, tensor in decoder.state.items()}
    for _ in range(50):
        decoder.step(torch.tensor([3]))
    assert {name: tensor.data_ptr() for name, tensor in decoder.state.items()} == addresses


def test_a_prompt_comes_first_and_has_tokens():
    decoder = Decoder(made("grid"))
    with pytest.raises(ValueError, match="0 tokens"):
        decoder.read(torch.empty(1, 0, dtype=torch.long))
    decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="after 1"):
        decoder.read(torch.tensor([[1, 2]]))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("name", MODELS)
def test_thousands_of_steps_equal_the_parallel_pass(name, keep):
    """5,000; 2,000 where steps take several times as long. No ring here keeps more than 30 positions.

    Deep models in fp64: their layers, whose weights are random, make more of how fp32 rounds the contexts.
    """
    model = made(name)
    tokens = torch.randint(0, V, (2000 if model.deeper or model.output is not None else 5000,))
    tolerance, bound = 1e-5, 1e-4
    if model.deeper:
        model, tolerance = model.double(), 1e-9
        bound = 1e-6 if model.output is None else 1e-4  # what a recipe says is fp32
    decoder = Decoder(model, keep=keep)
    stepped = torch.cat([decoder.step(token[None]) for token in tokens])
    torch.testing.assert_close(stepped, parallel_logits(model, tokens, tolerance), atol=bound, rtol=0)


@pytest.fixture
def one_thread():
    """Several share a tensor out anywhere, and what stands at a seam may be rounded in another way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("keep", ["contexts", "kv"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_neighbours(name, keep):
    model, tokens = made(name), torch.randint(0, V, (3, 60))
    tokens[2] = tokens[0]
    together, alone = Decoder(model, 3, keep), Decoder(model, keep=keep)
    pairs = [(together.read(tokens[:, :25]), alone.read(tokens[1:2, :25]))]
    pairs += [(together.step(column), alone.step(column[1:2])) for column in tokens[:, 25:].T]
    for rows, row in pairs:
        torch.testing.assert_close(rows[1:2], row, atol=1e-4, rtol=0)
        assert torch.equal(rows[0], rows[2])
        assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("length", [8, 9, 23, 24, 60])
@pytest.mark.parametrize("name", ["strided", "grid", "intervals", "one_context", "recurrence", "cascade"])
def test_a_prompt_in_many_chunks_is_the_prompt(name, length, monkeypatch):
    model, tokens = made(name), torch.randint(0, V, (2, length))
    whole = Decoder(model, 2)
    expected = whole.read(tokens)
    monkeypatch.setattr(prompt, "CHUNK", 8)
    chunked = Decoder(model, 2)
    torch.testing.assert_close(chunked.read(tokens), expected, atol=1e-4, rtol=0)
    for key, kept in whole.kept().items():
        torch.testing.assert_close(chunked.kept()[key], kept, atol=1e-4, rtol=0)


def test_a_prompt_that_is_asked_several_times_is_solved_once(monkeypatch):
    solved, calls = prompt.solve_onwards, []
    monkeypatch.setattr(prompt, "solve_onwards", lambda *given: (calls.append(1), solved(*given))[1])
    Decoder(made("strided"), 5).read(torch.randint(0, V, (1, 30)).expand(5, -1))
    assert len(calls) == 1
