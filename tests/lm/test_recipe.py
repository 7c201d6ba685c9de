"""A recipe's parts against their formulas: the pointer, the output it is mixed into, and the loss of both."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ctxkv_lightning.lm import head
from ctxkv_lightning.lm import pointer as pointer_module
from ctxkv_lightning.lm.head import mixed_cross_entropy
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.lm.output import Asked, Output
from ctxkv_lightning.lm.pointer import NEVER, CachePointer
from ctxkv_lightning.lm.recipe import Recipe
from ctxkv_lightning.lm.rivals import TransformerLM, build_model
from ctxkv_lightning.text.ngram import KneserNeyTrigram
from tests import oracles

V, D, C = 12, 8, 6
ALL = {
    "norm": "pre",
    "train_embedding": True,
    "embedding_dropout": 0.3,
    "context_dropout": 0.3,
    "output_dropout": 0.3,
    "projection": True,
    "pointer_heads": 3,
    "pointer_dim": 4,
    "pointer_window": 7,
    "pointer_values": True,
    "read_current": True,
    "ngram": True,
}
TRIGRAM = KneserNeyTrigram(np.random.default_rng(0).geometric(0.3, 200).clip(1, V) - 1, V)


def shaken(module):
    """Every parameter away from the zeros and ones that it starts with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def made_output(window=7, **changed):
    output = Output(V, D, C, Recipe(**{**ALL, "pointer_window": window, **changed}))
    if output.ngram is not None:
        output.ngram.fill(TRIGRAM)
    return shaken(output)


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 23),
    S=st.integers(0, 20),
    window=st.integers(1, 12),
    block=st.integers(1, 9),
    ngram=st.booleans(),
    data=st.data(),
)
def test_the_mixture_equals_its_formula_at_every_position(T, S, window, block, ngram, data):
    """Whatever the blocks, however much history there is, and also where the text begins inside it."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    missing = data.draw(st.integers(0, S))
    output, table = made_output(window, ngram=ngram), torch.randn(V, D)
    hidden, contexts, tokens = torch.randn(1, T, D), torch.randn(1, S + T, C), torch.randint(0, V, (1, S + T))
    first = torch.tensor([missing]) if missing else None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pointer_module, "BLOCK", block)
        parts = output.log_probabilities(hidden, table, contexts, tokens, first)
        fast = torch.cat([log_p for _, log_p in parts], dim=1)[0].exp()
        text, ids = contexts[0, missing:], tokens[0, missing:]
        slow = [
            oracles.mixed_probabilities(output, hidden[0, t], table, text, ids, S + t - missing, TRIGRAM)
            for t in range(T)
        ]
    torch.testing.assert_close(fast, torch.stack(slow), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.sum(dim=1), torch.ones(T))


def of_counts(tokens, following):
    """What `TRIGRAM` says (B, T, 3) of what follows the last T of tokens (B, S+T)."""
    T = following.shape[1]
    first, second = tokens[:, -T - 1 : -1], tokens[:, -T:]
    p = torch.from_numpy(TRIGRAM.conditional(first, second, following)).float()
    return torch.cat([p[..., None], torch.from_numpy(TRIGRAM.handed_down(first, second)).float()], dim=-1)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("ngram", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_the_loss_is_that_of_the_probabilities(heads, ngram, some):
    """Where what counting says of the text is what the model's own counts say."""
    torch.manual_seed(0)
    B, T, S = 2, 9, 5
    output, table = made_output(4, pointer_heads=heads, ngram=ngram), torch.randn(V, D)
    hidden, contexts, tokens = torch.randn(B, T, D), torch.randn(B, S + T, C), torch.randint(0, V, (B, S + T))
    counted = torch.tensor([0, 3, 4, 11, 17]) if some else None
    targets = torch.randint(0, V, (5 if some else B * T,))
    parts = output.log_probabilities(hidden, table, contexts, tokens, None)
    log_p = torch.cat([log_p for _, log_p in parts], dim=1).flatten(0, 1)
    expected = -(log_p if counted is None else log_p[counted]).gather(1, targets[:, None])[:, 0]
    following = torch.randint(0, V, (B * T,)).scatter(0, torch.arange(B * T) if counted is None else counted, targets)
    said = of_counts(tokens, following.view(B, T)) if ngram else None
    total, nll = output.loss(hidden, table, Asked(contexts, tokens, targets, counted, None, said))
    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(total, expected.sum())


@pytest.mark.parametrize("ngram", [False, True])
def test_apart_the_head_learns_by_its_own_loss(ngram):
    """Its loss is added to the mixture's, which moves neither it nor, for the gate's sake, the state it reads."""
    torch.manual_seed(0)
    T, S = 9, 5
    joint = made_output(4, ngram=ngram, pointer_values=False)
    apart = made_output(4, ngram=ngram, pointer_values=False, apart=True)
    apart.load_state_dict(joint.state_dict())
    tables = [torch.randn(V, D).requires_grad_() for _ in range(3)]
    for table in tables[1:]:
        table.data.copy_(tables[0].data)
    contexts, tokens, targets = torch.randn(2, S + T, C), torch.randint(0, V, (2, S + T)), torch.randint(0, V, (2 * T,))
    said = of_counts(tokens, targets.view(2, T)) if ngram else None
    asked, hidden = Asked(contexts, tokens, targets, None, None, said), torch.randn(2, T, D)
    both, nll = apart.loss(hidden, tables[0], asked)
    mixed, expected = joint.loss(hidden, tables[1], asked)
    wanted = apart.projection(apart.norm(hidden)).flatten(0, 1)
    alone = F.cross_entropy(wanted @ tables[2].T + apart.bias, targets, reduction="sum")
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(both, mixed + alone)
    head = [apart.projection.weight, apart.bias]
    ours = torch.autograd.grad(both, [*head, tables[0]], retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(alone, [*head, tables[2]]), strict=True):
        torch.testing.assert_close(one, other)
    for module, same in ((apart.gate, joint.gate), (apart.pointer, joint.pointer)):
        ours = torch.autograd.grad(both, list(module.parameters()), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(mixed, list(same.parameters()), retain_graph=True, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_apart_counts_do_not_move_the_state():
    """A pointer's queries read the state, and move it; without one the mixture's loss does not."""
    torch.manual_seed(0)
    T, output, table = 9, made_output(4, pointer_heads=0, apart=True), torch.randn(V, D)
    tokens, targets = torch.randint(0, V, (2, T + 5)), torch.randint(0, V, (2 * T,))
    state = torch.randn(2, T, D).requires_grad_()
    asked = Asked(torch.randn(2, T + 5, C), tokens, targets, None, None, of_counts(tokens, targets.view(2, T)))
    both, _ = output.loss(state, table, asked)
    wanted = output.projection(output.norm(state)).flatten(0, 1)
    alone = F.cross_entropy(wanted @ table.T + output.bias, targets, reduction="sum")
    torch.testing.assert_close(*(torch.autograd.grad(each, state)[0] for each in (both, alone)))


def test_apart_a_target_that_no_other_voice_gives_leaves_finite_gradients():
    """At the first position there is nothing to point at."""
    output, table = made_output(4, ngram=False, apart=True), torch.randn(V, D)
    asked = Asked(torch.randn(1, 1, C), torch.zeros(1, 1).long(), torch.tensor([3]), None, None)
    total, nll = output.loss(torch.randn(1, 1, D), table, asked)
    total.backward()
    torch.testing.assert_close(total.detach(), 2 * nll.sum())
    assert all(p.grad.isfinite().all() for p in output.parameters() if p.grad is not None)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 4), m=st.integers(1, 6), scale=st.sampled_from([1.0, 40.0, 6000.0]), seed=st.integers(0, 999))
def test_what_is_pointed_at_and_its_gradient_are_those_of_log_sum_exp(n, m, scale, seed):
    """Also among equal scores, and for a query without any past."""
    torch.manual_seed(seed)
    pointer = CachePointer(D, C, 2, 4, m, values=False)
    exists, hidden = torch.rand(1, 1, n, m) < 0.6, torch.zeros(1, n, D)
    fast = (scale * torch.randint(-2, 3, (1, 2, n, m))).float().requires_grad_()
    slow = fast.detach().double().requires_grad_()
    pointed = pointer.weigh(slice(0, n), hidden, fast, torch.ones(n, m), exists, torch.zeros(1, m), None)
    scores = slow.masked_fill(~exists, NEVER)
    evidence = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - evidence).exp() * exists
    torch.testing.assert_close(pointed.weights, weights.float())
    torch.testing.assert_close(pointed.evidence, evidence[..., 0].transpose(1, 2).float())
    into = torch.randn_like(weights), torch.randn(1, 2, n, 1)
    ((pointed.weights * into[0]).sum() + (pointed.evidence * into[1][..., 0].transpose(1, 2)).sum()).backward()
    ((weights * into[0]).sum() + (evidence * into[1]).sum()).backward()
    torch.testing.assert_close(fast.grad, slow.grad.float())


@pytest.mark.parametrize("width", [1, 64])
def test_every_gradient_of_the_mixed_loss_is_that_of_autograd(width, monkeypatch):
    """In fp64, over more rows than a chunk holds; also with a table that is widened, as for a GPU."""
    monkeypatch.setitem(head.WIDTH, "cpu", width)
    torch.manual_seed(1)
    N = 2100
    hidden, table, bias = torch.randn(N, 3), torch.randn(V, 3), torch.randn(V)
    share, pointed, targets = torch.randn(N).sigmoid().log(), torch.rand(N) * 0.3, torch.randint(0, V, (N,))
    fast = [x.clone().requires_grad_() for x in (hidden, table, bias, share, pointed)]
    slow = [x.double().requires_grad_() for x in (hidden, table, bias, share, pointed)]
    total, _ = mixed_cross_entropy(fast[0], fast[1], fast[2], targets, fast[3], fast[4])
    (0.1 * total).backward()
    own = F.softmax(slow[0] @ slow[1].T + slow[2], dim=1).gather(1, targets[:, None])[:, 0]
    expected = -(slow[3].exp() * own + slow[4]).log().sum()
    (0.1 * expected).backward()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_repeated_text_is_pointed_at():
    """The start is good enough to find what follows a context seen before."""
    torch.manual_seed(0)
    output = Output(50, D, 64, Recipe(pointer_heads=4, pointer_dim=32, pointer_window=40))
    tokens = torch.randperm(50)[:20].repeat(2)[None]
    contexts = F.layer_norm(torch.randn(20, 64), (64,)).repeat(2, 1)[None]
    hidden = torch.zeros(1, 40, D)
    with torch.no_grad():
        parts = list(output.log_probabilities(hidden, torch.zeros(50, D), contexts, tokens, None))
    p = torch.cat([log_p for _, log_p in parts], dim=1).exp()
    right = p[0, 20:-1].gather(1, tokens[0, 21:, None])
    assert float(right.min()) > 5 / 50


def test_a_trained_table_starts_as_the_frozen_one_and_the_encoder_never_reads_it():
    model = ContextKVLM(V, D, C, 2, 3, 4, 16, 0.1, recipe=ALL)
    table = torch.randn(V, D)
    model.load_frozen(table, model.encoders())
    model.load_start(torch.arange(V).float())
    torch.testing.assert_close(model.table, table / table.norm(dim=1).mean())
    torch.testing.assert_close(model.output.bias.softmax(dim=0), (torch.arange(V) + 0.1) / (66 + 0.1 * V))
    model.table.data += 1
    assert not model.embedding.weight.requires_grad
    torch.testing.assert_close(model.encoder_input(torch.arange(V)), F.layer_norm(table, (D,)))
    assert not torch.allclose(model.embed(torch.arange(V)), model.encoder_input(torch.arange(V)))


@pytest.mark.parametrize("name", ["context_kv", "transformer", "sliding_window", "recurrence"])
def test_pre_norm_layers_start_as_the_identity_but_for_their_biases(name):
    model = build_model(name, V, D, C, 2, 3, 4, 16, 0.1, "strided", 5, {"norm": "pre"}).eval()
    embeddings = torch.randn(1, 9, D)
    memory = embeddings if model.reads_tokens else torch.randn(1, 9, C)
    hidden = model(embeddings, memory)
    if name == "recurrence":
        hidden = hidden - model.read(memory)
    else:
        embeddings = embeddings + model.attention.output.bias
    torch.testing.assert_close(hidden, embeddings + model.ffn.down.bias)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_current_context_is_read_beside_attention(norm):
    torch.manual_seed(0)
    model = shaken(ContextKVLM(V, D, C, 2, 3, 4, 16, 0.1, recipe={"norm": norm, "read_current": True}))
    plain = ContextKVLM(V, D, C, 2, 3, 4, 16, 0.1, recipe={"norm": norm}).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "attention.read" not in key})
    embeddings, contexts = torch.randn(2, 9, D), torch.randn(2, 14, C)
    for t in range(9):
        with torch.no_grad():
            one, past = embeddings[:, t : t + 1], contexts[:, : 6 + t]
            query, key, value = (plain.attention.split(x) for x in (
                plain.attention.ask(one), plain.attention.key(past), plain.attention.value(past)
            ))  # fmt: skip
            mixed = oracles.gather_attention(query, key, value, 3, 4)
            found = plain.attention.output(mixed.transpose(1, 2).flatten(2)) + model.attention.read(
                contexts[:, 5 + t, None]
            )
            expected = plain.ffn(one + found if norm == "pre" else plain.attention.norm(one + found))
            torch.testing.assert_close(model(embeddings, contexts)[:, t : t + 1], expected)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_models_that_attend_to_tokens_read_the_current_context_in_their_first_layer(norm, window, layers):
    torch.manual_seed(0)
    recipe = {"norm": norm, "read_current": True}
    model = shaken(TransformerLM(V, D, 2, 16, 0.1, window, C, recipe, layers))
    plain = TransformerLM(V, D, 2, 16, 0.1, window, C, {"norm": norm}, layers).eval()
    own = {key: value for key, value in model.state_dict().items() if ".read." not in key and "encoder" not in key}
    plain.load_state_dict(own)
    assert (len(model.encoders()), len(plain.encoders())) == (1, 0)
    memory, contexts = torch.randn(2, 14, D), torch.randn(2, 14, C)
    without = plain(memory[:, 5:], memory)
    assert not torch.allclose(model(memory[:, 5:], memory, direct=contexts), without)
    with torch.no_grad():
        read = model.attention.read(contexts)
        combine, seen = plain.attention.combine, []

        def with_read(embeddings, mixed, now):
            seen.append(now)
            found = plain.attention.output(mixed.transpose(1, 2).flatten(2)) + read[:, 14 - embeddings.shape[1] :]
            return embeddings + found if norm == "pre" else plain.attention.norm(embeddings + found)

        plain.attention.combine = with_read
        expected = plain(memory[:, 5:], memory)
        plain.attention.combine = combine
    assert seen == [None]
    torch.testing.assert_close(model(memory[:, 5:], memory, direct=contexts), expected)


def test_an_empty_recipe_is_the_published_model():
    names = {key.split(".")[0] for key in ContextKVLM(V, D, C, 2, 3, 4, 16).state_dict()}
    assert names == {"embedding", "embedding_norm", "encoder", "attention", "ffn"}


def test_a_target_that_is_all_but_impossible_has_a_finite_loss_and_gradient():
    hidden = torch.tensor([[110.0, 0.0]], requires_grad=True)
    table, bias, nothing = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2), torch.zeros(1)
    total, nll = mixed_cross_entropy(hidden, table, bias, torch.tensor([1]), nothing, nothing)
    total.backward()
    assert float(nll) == pytest.approx(110)
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_a_voice_that_says_nothing_has_no_gradient_where_the_head_is_all_but_sure_of_another_token():
    gate = torch.zeros(1, requires_grad=True)
    hidden, table, bias = torch.tensor([[110.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2)
    for scale in (1, 59):  # as a loss is scaled for fp16
        gate.grad = None
        share, pointed = F.logsigmoid(gate), F.sigmoid(-gate) * torch.zeros(1)
        (scale * mixed_cross_entropy(hidden, table, bias, torch.tensor([1]), share, pointed)[0]).backward()
        assert float(gate.grad) == pytest.approx(-0.5 * scale)


@pytest.mark.parametrize("wrong", [{"norm": "prre"}, {"pointer_dim": 0}, {"pointer_window": 0}, {"pointer_heads": -1}])
def test_a_recipe_that_no_model_can_have_is_refused(wrong):
    with pytest.raises(ValueError, match="does not exist"):
        Recipe(**wrong)
