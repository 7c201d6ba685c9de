import torch

from ctxkv_lightning.context.encoder import ContextEncoder
from tests.oracles import contexts_step_by_step


def test_one_step_equals_the_formula_for_any_leading_shape():
    encoder = ContextEncoder(5, 7)
    embeddings = torch.randn(2, 3, 7)
    stepped = encoder(torch.zeros(2, 3, 5), embeddings)
    for i in range(2):
        for j in range(3):
            expected = contexts_step_by_step(encoder, embeddings[i, j : j + 1])[0]
            torch.testing.assert_close(stepped[i, j], expected, atol=1e-6, rtol=0)


def test_many_steps_equal_the_loop_with_the_concatenation_built():
    encoder = ContextEncoder(8, 12)
    embeddings = torch.randn(30, 12)
    context, rows = encoder.initial(), []
    for embedding in embeddings:
        context = encoder(context, embedding)
        rows.append(context)
    torch.testing.assert_close(torch.stack(rows), contexts_step_by_step(encoder, embeddings), atol=1e-5, rtol=0)


def test_gradients_equal_those_of_the_concatenation():
    encoder = ContextEncoder(4, 6)
    context, embedding = torch.randn(9, 4), torch.randn(9, 6)
    fast = torch.autograd.grad(encoder(context, embedding).square().sum(), list(encoder.parameters()))
    hidden = torch.nn.functional.linear(torch.cat([context, embedding], 1), encoder.linear.weight, encoder.linear.bias)
    plain = encoder.norm(context + torch.nn.functional.gelu(hidden))
    slow = torch.autograd.grad(plain.square().sum(), list(encoder.parameters()))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_published_size_and_initialisation():
    encoder = ContextEncoder(256, 768)
    assert sum(p.numel() for p in encoder.parameters()) == 262_912
    assert abs(encoder.linear.weight.std().item() - 0.1) < 0.002
    assert abs(encoder.linear.bias.std().item() - 0.01) < 0.003
