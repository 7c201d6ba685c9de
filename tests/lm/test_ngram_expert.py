"""Counts as tensors: the trigram's own distribution, whatever was counted, and tables that come from a file."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.lm.ngram import NgramExpert
from ctxkv_lightning.text.ngram import KneserNeyTrigram

V = 6
texts = st.lists(st.integers(0, V - 1), max_size=40)


def filled(text):
    trigram, expert = KneserNeyTrigram(np.array(text, np.int64), V), NgramExpert(V)
    expert.fill(trigram)
    return trigram, expert


@settings(deadline=None, max_examples=60)
@given(text=texts, pairs=st.lists(st.tuples(st.integers(0, V), st.integers(0, V - 1)), max_size=9))
def test_the_distribution_is_the_trigrams_and_a_row_does_not_depend_on_others(text, pairs):
    trigram, expert = filled(text)
    first, second = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    p, left = expert(torch.from_numpy(first), torch.from_numpy(second))
    expected = trigram.conditional(first[:, None], second[:, None], np.arange(V)[None])
    np.testing.assert_allclose(p.numpy(), expected.reshape(len(pairs), V), rtol=1e-5)
    np.testing.assert_allclose(left.numpy(), trigram.handed_down(first, second), rtol=1e-6)
    for row, (one, two) in enumerate(pairs):
        alone, _ = expert(torch.tensor([one]), torch.tensor([two]))
        assert torch.equal(alone[0], p[row])


def test_before_it_is_filled_it_is_uniform():
    p, left = NgramExpert(V)(torch.tensor([V, 2]), torch.tensor([0, 3]))
    torch.testing.assert_close(p, torch.full((2, V), 1 / V))
    assert torch.equal(left, torch.ones(2, 2))


def test_saved_counts_make_their_own_room():
    _, expert = filled([0, 1, 2, 0, 1, 3, 0, 1, 2, 5])
    other = NgramExpert(V)
    other.load_state_dict(expert.state_dict())
    for name, table in expert.named_buffers():
        assert torch.equal(table, other.get_buffer(name))
    other.load_state_dict(NgramExpert(V).state_dict())
    assert len(other.trigram_grams) == 0


def broken(name, change):
    return pytest.param(name, change, id=f"{name}-{change.__name__}")


def shorter(x):
    return x[:-1]


def turned(x):
    return x.flip(0)


def rounded(x):
    return x.float()


def beyond(x):
    return torch.cat([x[:-1], x[-1:] // (V + 1) * (V + 1) + V])


def doubled(x):
    return x.repeat(2, 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        broken("unigram", shorter),
        broken("bigram_grams", turned),
        broken("bigram_mass", shorter),
        broken("trigram_contexts", turned),
        broken("trigram_contexts", rounded),
        broken("trigram_left", shorter),
        broken("trigram_grams", beyond),
        broken("trigram_grams", doubled),
    ],
)
def test_tables_that_are_none_are_refused(name, change):
    _, expert = filled([0, 1, 2, 0, 1, 3, 0, 1, 2, 5])
    state = expert.state_dict()
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=r"table of n-grams|token that does not exist|unigram has"):
        NgramExpert(V).load_state_dict(state)


def test_what_is_missing_is_named():
    state = filled([0, 1, 2])[1].state_dict()
    del state["trigram_mass"]
    with pytest.raises(RuntimeError, match="trigram_mass"):
        NgramExpert(V).load_state_dict(state)
