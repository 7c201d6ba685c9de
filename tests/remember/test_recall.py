"""What is planted stands where it is said to, and what is recalled is what the model could see."""

import numpy as np
import pytest
import torch

from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.remember import copying, passkey
from ctxkv_lightning.remember.copying import CANDIDATES, copy_suite, edges
from ctxkv_lightning.remember.passkey import ASKED, key_losses, passkey_suite
from ctxkv_lightning.remember.recall import likeliest, next_losses
from tests.lm.test_generate import MODELS, V, made

LAGS = (1, 2, 5, 6, 7, 8, 40)
STREAM = torch.randint(0, V, (300,), generator=torch.Generator().manual_seed(5))


def encode(text):
    """A token for each character."""
    return torch.tensor([ord(character) % V for character in text])


@pytest.mark.parametrize("name", MODELS)
def test_the_next_losses_are_those_of_scoring(name):
    model, prompt = made(name), torch.randint(0, V, (50,))
    losses = next_losses(model, prompt)
    for token in (0, 7, V - 1):
        expected = score_tokens(model, torch.cat([prompt, torch.tensor([token])]), given=50)[0]
        assert losses[token] == pytest.approx(float(expected), abs=1e-4)


def test_a_tie_is_shared():
    assert likeliest(torch.tensor([1.0, 2.0])) == 1
    assert likeliest(torch.tensor([2.0, 1.0])) == 0
    assert likeliest(torch.tensor([1.0, 1.0, 3.0, 1.0])) == pytest.approx(1 / 3)


def perfect(span, seen=None):
    """Losses of a memory that knows what followed the last token where it stood at most `span` tokens ago."""

    def losses(model, prompt):
        if seen is not None:
            seen.append(prompt.clone())
        found = torch.full((V,), 10.0, dtype=torch.float64)
        for place in range(len(prompt) - 2, -1, -1):
            if prompt[place] == prompt[-1] and len(prompt) - 1 - (place + 1) <= span:
                found[prompt[place + 1]] = 0.0
                break
        return found

    return losses


@pytest.mark.parametrize("span", [1, 5, 6, 7, 1000])
def test_a_perfect_memory_recalls_up_to_its_span_and_no_further(span, monkeypatch):
    monkeypatch.setattr(copying, "next_losses", perfect(span))
    found = copy_suite(made("transformer"), STREAM, LAGS, trials=3)
    assert found.chance == pytest.approx(0.1)
    for each in found.lags:
        near = each.first <= span
        assert each.recall.value == each.raised.value == pytest.approx(1 if near else 0.1)
        assert each.gain.value == pytest.approx(10 if near else 0)
        assert each.rank == 1
        assert each.recall.count == 3
        assert each.without.value == pytest.approx(0.1)


def test_lags_are_exactly_as_stated(monkeypatch):
    seen = []
    monkeypatch.setattr(copying, "next_losses", perfect(1000, seen))
    found = copy_suite(made("transformer"), STREAM, LAGS, trials=2)
    assert len(seen) == 2 * (1 + len(LAGS))
    assert {len(text) for text in seen} == {found.tokens}
    for control, *texts in (seen[:8], seen[8:]):
        trigger = control[-1]
        assert (control == trigger).sum() == 1
        for lag, text in zip(LAGS, texts, strict=True):
            last = len(text) - 1
            assert (text == trigger).nonzero().flatten().tolist() == [last - lag - 1, last]
            answer = text[last - lag]
            assert (text == answer).nonzero().flatten().tolist() == [last - lag]
            assert not (control == answer).any()
            assert (text != control).nonzero().flatten().tolist() == [last - lag - 1, last - lag]


def test_a_seed_repeats():
    model = made("strided")
    one, again, other = (copy_suite(model, STREAM, [2, 5], seed, trials=4) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", ["strided", "sliding_window"])
def test_an_untrained_model_is_at_chance(name):
    found = copy_suite(made(name), STREAM, [3], trials=80)
    (at,) = found.lags
    assert abs(at.recall.value - found.chance) < 4 * at.recall.error
    assert abs(at.without.value - found.chance) < 4 * at.without.error


def test_a_window_sees_nothing_behind_its_edge():
    """`sliding_window` reads 7 tokens, its own included: an answer 7 tokens ago is behind it."""
    found = {each.first: each for each in copy_suite(made("sliding_window"), STREAM, LAGS, trials=5).lags}
    for lag in (7, 8, 40):
        assert found[lag].gain.value == found[lag].gain.error == 0
        assert found[lag].raised.value == pytest.approx(0.1)
    for lag in (1, 5, 6):
        assert found[lag].gain.error > 0


def test_edges_are_those_of_the_window():
    assert edges([20] * 8, 32) == {19, 20, 21, 619, 620, 621}
    assert edges([1, 4], 3) == {1, 2, 3, 4, 5, 7, 8, 9}
    assert edges([1], 1) == {1, 2}


def test_a_stream_that_is_too_poor_is_refused():
    class Tiny:
        embedding = torch.nn.Embedding(CANDIDATES + 1, 4)

    with pytest.raises(ValueError, match="vocabulary of 11 tokens is too small"):
        copy_suite(Tiny(), torch.zeros(9, dtype=torch.long), [1], trials=1)


def remembering(span, seen):
    """Losses of a memory that finds the key likely where it was told with its last token at most `span` ago."""
    question = encode(ASKED)

    def cost(prompt, key):
        told = torch.cat([question, key])
        places = [i for i in range(len(prompt) - len(told)) if torch.equal(prompt[i : i + len(told)], told)]
        near = any(len(prompt) - 1 - (place + len(told) - 1) <= span for place in places)
        return len(key) * (0.5 if near else 3.0)

    def losses(model, prompt, keys):
        seen.append(prompt)
        return torch.tensor([cost(prompt, key) for key in keys])

    return losses


@pytest.mark.parametrize("span", [59, 60, 500])
def test_a_key_is_found_up_to_the_memorys_span(span, monkeypatch):
    seen = []
    monkeypatch.setattr(passkey, "key_losses", remembering(span, seen))
    found = passkey_suite(made("transformer"), encode, STREAM, distances=(60, 100), trials=3)
    for each in found.lags:
        near = each.first <= span
        assert each.recall.value == each.raised.value == pytest.approx(1 if near else 0.1)
        assert each.gain.value == pytest.approx(6 * 2.5 if near else 0)
    assert {len(prompt) for prompt in seen} == {found.tokens}


@pytest.mark.parametrize("name", MODELS)
def test_keys_that_are_read_side_by_side_cost_what_each_costs_alone(name):
    model, prompt, keys = made(name), STREAM[:50], [STREAM[60 : 60 + n] for n in (1, 4, 2)]
    alone = [float(score_tokens(model, torch.cat([prompt, key]), given=50)[0].double().sum()) for key in keys]
    assert key_losses(model, prompt, keys).tolist() == pytest.approx(alone, abs=1e-4)


def test_keys_differ_and_an_untrained_model_guesses():
    keys = passkey.drawn_keys(np.random.default_rng(0))
    assert len(set(keys)) == CANDIDATES
    assert {len(str(key)) for key in keys} == {5}
    found = passkey_suite(made("strided"), encode, STREAM, distances=(50,), trials=12)
    assert abs(found.lags[0].recall.value - found.chance) < 4 * found.lags[0].recall.error
    with pytest.raises(ValueError, match="at least 33 tokens"):
        passkey_suite(made("strided"), encode, STREAM, distances=(32,))
