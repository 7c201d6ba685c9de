import pytest
import torch

from ctxkv_lightning.lm.model import ContextKVLM
from tests.oracles import contexts_step_by_step, gather_attention


def test_the_published_model_has_the_published_parameters():
    with torch.device("meta"):
        model = ContextKVLM(50_257)
    assert model.parameter_counts() == {
        "total": 45_163_264,
        "trainable": 6_301_440,
        "embedding": 38_597_376,
        "embedding_norm": 1_536,
        "encoder": 262_912,
        "attention": 1_577_472,
        "ffn": 4_723_968,
    }


def small(**options):
    return ContextKVLM(13, 8, 4, heads=2, interval=3, max_contexts=4, ffn_dim=16, **options).eval()


def test_forward_is_the_formula():
    model, tokens = small(), torch.randint(0, 13, (1, 25))
    embeddings = model.embed(tokens)
    contexts = contexts_step_by_step(model.encoder, embeddings[0])[None]
    attention, ffn = model.attention, model.ffn
    query, key, value = (
        layer(x).view(1, 25, 2, 4).transpose(1, 2)
        for layer, x in [(attention.query, embeddings), (attention.key, contexts), (attention.value, contexts)]
    )
    mixed = gather_attention(query, key, value, 3, 4).transpose(1, 2).reshape(1, 25, 8)
    hidden = attention.norm(embeddings + attention.output(mixed))
    hidden = hidden + ffn.norm(ffn.down(torch.nn.functional.gelu(ffn.up(hidden))))
    torch.testing.assert_close(model(embeddings, contexts), hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


def test_dropout_acts_on_the_attended_part_only_and_only_in_training():
    model = small(dropout=0.999999)
    embeddings, contexts = torch.randn(1, 9, 8), torch.randn(1, 9, 4)
    assert torch.equal(model(embeddings, contexts), model(embeddings, contexts))
    dropped = model.train().attention(embeddings, contexts)
    torch.testing.assert_close(dropped, model.attention.norm(embeddings))


def test_frozen_parts_get_no_gradient():
    model = small().train()
    model(torch.randn(1, 9, 8), torch.randn(1, 9, 4)).sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"attention", "ffn"}


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads=7"):
        ContextKVLM(13, 768, heads=7)
