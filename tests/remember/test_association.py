import math

import numpy as np
import pytest
import torch

from ctxkv_lightning.remember import association
from ctxkv_lightning.remember.association import mqar_suite
from ctxkv_lightning.text.mqar import Task, answers, read_mqar, symbol_encoding
from ctxkv_lightning.text.tokenizer import encode_documents

TASK = Task(pairs=3, length=40, keys=8, values=8, heldout=50)


@pytest.fixture
def stream():
    texts = [document.text for document in read_mqar(TASK, 1, 1).validation]
    return torch.from_numpy(encode_documents(symbol_encoding(TASK), texts)).long()


def reading(span):
    """A reader that looks for the last token among the `span` before it and says what followed there."""

    def losses_of(model, text, given=1):
        ids, hits = text.tolist(), []
        for place in range(1, len(ids)):
            past = [j for j in range(max(0, place - 1 - span), place - 1) if ids[j] == ids[place - 1]]
            hits.append(bool(past) and ids[past[-1] + 1] == ids[place])
        hits = np.array(hits)
        return np.where(hits, 0.0, 9.0), hits

    return losses_of


def test_a_perfect_memory_recalls_all_and_a_short_one_what_is_near(stream, monkeypatch):
    monkeypatch.setattr(association, "losses_of", reading(42))
    found = mqar_suite(None, TASK, stream)
    assert found.chance == 1 / 8
    assert {each.recall.value for each in found.lags} == {1.0}
    assert sum(each.recall.count for each in found.lags) == 3 * 50 == answers(TASK, stream.numpy()).sum()
    assert found.lags[0].gain.value == pytest.approx(math.log(8))
    monkeypatch.setattr(association, "losses_of", reading(12))  # the key stands one token before its value
    found = {(each.first, each.last): each.recall.value for each in mqar_suite(None, TASK, stream).lags}
    assert found[1, 1] == found[2, 3] == found[4, 7] == 1.0
    assert found[16, 31] == found[32, 63] == 0.0
    assert 0 < found[8, 15] < 1
