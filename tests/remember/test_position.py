"""PPL by position adds up to the stream's, and a cut history is what a decoder reads that knows nothing else."""

import math

import numpy as np
import pytest
import torch

from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.remember.position import position_suite
from tests.lm.test_generate import V, made

SIZES = [5, 40, 1, 400, 12]


@pytest.fixture
def documents():
    return [torch.randint(0, V, (size,)) for size in SIZES]


@pytest.mark.parametrize("name", ["strided", "grid", "transformer", "recurrence"])
def test_positions_recombine_to_the_stream(name, documents):
    model = made(name)
    found = position_suite(model, documents, targets=5)
    losses = score_tokens(model, torch.cat(documents))[0].double()
    assert found.ppl.value == pytest.approx(float(losses.mean().exp()), rel=1e-9)
    assert sum(each.ppl.count for each in found.bins) == found.ppl.count == sum(SIZES) - 1
    total = sum(each.ppl.count * math.log(each.ppl.value) for each in found.bins)
    assert total == pytest.approx(float(losses.sum()), rel=1e-9)
    assert found.chance == V


def test_bins_hold_the_tokens_of_their_positions(documents):
    model = made("strided")
    found = position_suite(model, documents, targets=5)
    losses = iter(score_tokens(model, torch.cat(documents))[0].tolist())
    by_place = [(place, document) for document, size in enumerate(SIZES) for place in range(size)][1:]
    expected = {(0, 9): [], (10, 31): [], (32, 99): [], (100, 319): [], (320, 999): []}
    for place, _ in by_place:
        loss = next(losses)
        next(own for (first, last), own in expected.items() if first <= place <= last).append(loss)
    assert [(each.first, each.last) for each in found.bins] == list(expected)
    for each, own in zip(found.bins, expected.values(), strict=True):
        assert each.ppl.count == len(own)
        assert each.ppl.value == pytest.approx(math.exp(np.mean(own)), rel=1e-6)
    assert found.bins[-1].ppl.error is None  # one document is that long


@pytest.mark.parametrize("name", ["strided", "transformer"])
def test_the_same_tokens_are_scored_after_less_and_less(name, documents):
    model, stream = made(name), torch.cat(documents)
    found = position_suite(model, documents, targets=6, histories=(1, 10, 40, 300))
    assert [each.tokens for each in found.histories] == [1, 10, 40, None]  # 300 leave too few targets
    targets = np.linspace(40, len(stream) - 1, 6).astype(int)
    for each in found.histories[:-1]:
        losses = []
        for target in targets:
            logits = Decoder(model).read(stream[None, target - each.tokens : target])[0]
            losses.append(-float(logits.log_softmax(-1)[stream[target]]))
        assert each.ppl.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        assert each.ppl.count == 6
    whole = score_tokens(model, stream)[0][targets - 1].double()
    last = found.histories[-1]
    assert last.ppl.value == pytest.approx(float(whole.mean().exp()), rel=1e-9)
    assert (last.excess.value, last.excess.error) == (0, 0)
    assert found.histories[0].excess.value == pytest.approx(
        math.log(found.histories[0].ppl.value / last.ppl.value), rel=1e-9
    )
