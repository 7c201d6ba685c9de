"""Losses computed in blocks are those of one pass over the whole text."""

import pytest
import torch
from torch.nn import functional as F

from ctxkv_lightning.lm import scoring
from tests.lm.test_generate import MODELS, V, made, parallel_logits


@pytest.mark.parametrize("block", [1, 7, 64, 5000])
@pytest.mark.parametrize("given", [1, 2, 33, 119])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_whole_pass(name, given, block, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", block)
    model, tokens = made(name), torch.randint(0, V, (120,))
    logits = parallel_logits(model, tokens)[given - 1 : -1]
    losses, hits = scoring.score_tokens(model, tokens, given)
    expected = F.cross_entropy(logits, tokens[given:], reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
    assert hits.tolist() == (logits.argmax(-1) == tokens[given:]).tolist()


@pytest.mark.parametrize("given", [0, 5, 6])
def test_something_is_given_and_something_left(given):
    with pytest.raises(ValueError, match="given of 5"):
        scoring.score_tokens(made("grid"), torch.zeros(5, dtype=torch.long), given)
