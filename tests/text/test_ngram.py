import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import ngram
from tests import ngram_oracles as slow

V = 7
streams = st.lists(st.integers(0, V - 1), min_size=2, max_size=40)
tiny = st.lists(st.integers(0, V - 1), min_size=0, max_size=3)


def text_like(length: int, seed: int, vocab_size: int = V) -> np.ndarray:
    """A stream with frequent and rare tokens, and runs that come back."""
    generator = np.random.default_rng(seed)
    ids = np.minimum(generator.geometric(0.25, length) - 1, vocab_size - 1)
    ids[length // 2 : length // 2 + length // 4] = ids[: length // 4]
    return ids


@settings(deadline=None, max_examples=60)
@given(train=tiny | streams, held_out=streams)
def test_kneser_ney_equals_its_slow_twin(train, held_out):
    fast = ngram.KneserNeyTrigram(np.array(train, np.int64), V).probabilities(np.array(held_out))
    twin = slow.KneserNeyByLoops(train, V, ngram.FALLBACK_DISCOUNT)
    np.testing.assert_allclose(fast, twin.stream(held_out), rtol=1e-12)


def test_kneser_ney_equals_its_slow_twin_on_a_longer_stream():
    train, held_out = text_like(600, 1), text_like(60, 2)
    fast = ngram.KneserNeyTrigram(train, V).probabilities(held_out)
    twin = slow.KneserNeyByLoops(train.tolist(), V, ngram.FALLBACK_DISCOUNT)
    np.testing.assert_allclose(fast, twin.stream(held_out.tolist()), rtol=1e-12)


@pytest.mark.parametrize("train", [[], [3], [3, 3], [0, 1], [0, 1, 2, 0, 1, 3], text_like(400, 3).tolist()])
def test_each_distribution_sums_to_one_after_seen_and_unseen_histories(train):
    trigram = ngram.KneserNeyTrigram(np.array(train, np.int64), V)
    none = V
    for history in [(0, 1), (1, 0), (3, 3), (6, 6), (none, 0), (none, 6), (none, none)]:
        distribution = trigram.conditional(*history, np.arange(V))
        assert distribution.shape == (V,)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_discounts_follow_the_formula():
    counts = np.array([1] * 10 + [2] * 4 + [3] * 2 + [4] * 1 + [9])
    y = 10 / 18
    expected = [1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    np.testing.assert_allclose(ngram.discounts(counts), expected)


@pytest.mark.parametrize("counts", [[], [1], [2, 2], [1, 1, 3]])
def test_discounts_fall_back_where_counts_of_counts_are_zero(counts):
    np.testing.assert_array_equal(ngram.discounts(np.array(counts, np.int64)), ngram.FALLBACK_DISCOUNT)


def test_discounts_out_of_range_fall_back_to_absolute_discounting():
    counts = np.array([1] * 10 + [2] + [3] * 9)
    y = 10 / 12
    np.testing.assert_allclose(ngram.discounts(counts), [y, y, 3.0])


@settings(deadline=None, max_examples=40)
@given(train=streams, held_out=streams)
def test_unigram_equals_its_slow_twin(train, held_out):
    fast = ngram.unigram_probabilities(np.array(train), np.array(held_out), V)
    likelihoods = {a: slow.left_out_likelihood(train, V, a) for a in ngram.ADDITIVE_CONSTANTS}
    best = max(likelihoods.values())
    twins = [
        slow.additive_unigram(train, held_out, V, a)
        for a, likelihood in likelihoods.items()
        if likelihood == pytest.approx(best, rel=1e-12)
    ]
    assert min(np.abs(fast - twin).max() for twin in twins) < 1e-15


def test_unigram_sums_to_one_and_smooths_more_where_more_is_unseen():
    common, rare = np.repeat(np.arange(20), 50), np.arange(400)
    for train in (common, rare):
        assert ngram.unigram_probabilities(train, np.arange(1000), 1000).sum() == pytest.approx(1)
    unseen = [ngram.unigram_probabilities(train, np.array([999]), 1000)[0] for train in (common, rare)]
    assert unseen[0] < unseen[1]


@settings(deadline=None)
@given(ids=streams, window=st.integers(1, 45))
def test_caches_equal_their_slow_twin(ids, window):
    fast = np.stack(ngram.cache_probabilities(np.array(ids), window), axis=1)
    np.testing.assert_allclose(fast, np.array(slow.caches(ids, window), float), rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(train=streams, validation=streams, test=streams, window=st.integers(1, 12))
def test_mixture_equals_its_slow_twin_and_sums_to_one(train, validation, test, window):
    trigram = ngram.KneserNeyTrigram(np.array(train), V)
    mixture = ngram.CacheMixture(trigram, np.array(validation), window)
    np.testing.assert_allclose(mixture.weights.sum(axis=1), 1)
    own = trigram.probabilities(np.array(test)).tolist()
    twin = slow.mixture(own, slow.caches(test, window), mixture.weights.tolist())
    np.testing.assert_allclose(mixture.probabilities(np.array(test)), twin, rtol=1e-12)
    last = [mixture.probabilities(np.array([*test, word]))[-1] for word in range(V)]
    assert sum(last) == pytest.approx(1)


def test_em_finds_the_likeliest_weights():
    components = np.random.default_rng(0).uniform(0.01, 1, (4000, 2)) * [1.0, 1.2]
    found = ngram.em_weights(components)
    grid = np.linspace(0, 1, 1001)
    likelihoods = np.log(components @ np.stack([grid, 1 - grid])).sum(axis=0)
    assert found[0] == pytest.approx(grid[likelihoods.argmax()], abs=2e-3)


def test_em_without_tokens_gives_equal_weights():
    np.testing.assert_allclose(ngram.em_weights(np.zeros((0, 3))), 1 / 3)


def test_footing_scores_every_token_but_the_first():
    train, validation, test = (text_like(length, seed) for seed, length in enumerate((900, 200, 150)))
    scores = ngram.footing(train, validation, test, V, window=30)
    trigram = ngram.KneserNeyTrigram(train, V)
    mixture = ngram.CacheMixture(trigram, validation, 30)
    for prefix, ids in (("", validation), ("test_", test)):
        expected = {
            f"{prefix}unigram_ppl": ngram.unigram_probabilities(train, ids, V),
            f"{prefix}kneser_ney_ppl": trigram.probabilities(ids),
            f"{prefix}kneser_ney_cache_ppl": mixture.probabilities(ids),
        }
        for key, probabilities in expected.items():
            nll = -sum(math.log(p) for p in probabilities[1:])
            assert scores[key] == pytest.approx(math.exp(nll / (len(ids) - 1)))
    assert len(scores) == 6


def test_the_test_stream_does_not_move_the_validation_scores():
    train, validation = text_like(500, 0), text_like(100, 1)
    one, other = (ngram.footing(train, validation, text_like(80, seed), V) for seed in (2, 3))
    for key in ("unigram_ppl", "kneser_ney_ppl", "kneser_ney_cache_ppl"):
        assert one[key] == other[key]


@settings(deadline=None, max_examples=40)
@given(train=streams, validation=streams, test=streams, window=st.integers(1, 5))
def test_footing_is_finite_on_any_streams_of_two_tokens_or_more(train, validation, test, window):
    scores = ngram.footing(np.array(train), np.array(validation), np.array(test), V, window)
    assert all(math.isfinite(score) and score >= 1 for score in scores.values())


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_stream_shorter_than_two_tokens_is_named(name):
    arguments = {"train": np.array([0, 1]), "validation": np.array([0, 1]), "test": np.array([0, 1])}
    with pytest.raises(UserError, match=f"The {name} stream has 1 tokens"):
        ngram.footing(**{**arguments, name: np.array([0])}, vocab_size=V)


def test_bad_arguments_are_refused():
    trigram = ngram.KneserNeyTrigram(np.array([0, 1]), V)
    with pytest.raises(UserError, match="window is 0"):
        ngram.CacheMixture(trigram, np.array([0, 1]), window=0)
    with pytest.raises(ValueError, match="token ids must lie in"):
        ngram.KneserNeyTrigram(np.array([0, V]), V)
    with pytest.raises(ValueError, match="too large"):
        ngram.KneserNeyTrigram(np.array([0, 1]), 3_000_000)


def test_a_large_vocabulary_and_a_real_length_are_fast_enough_to_run_here():
    vocab_size = 50_257
    ids = np.random.default_rng(0).zipf(1.2, 175_000) % vocab_size
    scores = ngram.footing(ids[:125_000], ids[125_000:150_000], ids[150_000:], vocab_size)
    assert all(1 < score < vocab_size for score in scores.values())


@settings(deadline=None, max_examples=40)
@given(train=tiny | streams)
def test_tables_and_what_is_handed_down_are_the_parts_of_the_formula(train):
    """p of every word after every history, put together from the tables by hand."""
    trigram = ngram.KneserNeyTrigram(np.array(train, np.int64), V)
    tables = trigram.tables()
    for first in range(V + 1):
        for second in range(V):
            p = dict(enumerate(tables["unigram"].tolist()))
            left = []
            for order, history in (("bigram", second), ("trigram", first * (V + 1) + second)):
                at = np.flatnonzero(tables[f"{order}_contexts"] == history)
                left.append(tables[f"{order}_left"][at[0]] if len(at) else 1.0)
                own = dict(zip(tables[f"{order}_grams"].tolist(), tables[f"{order}_mass"].tolist(), strict=True))
                p = {w: left[-1] * p[w] + own.get(history * (V + 1) + w, 0.0) for w in p}
            np.testing.assert_allclose(list(p.values()), trigram.conditional(first, second, np.arange(V)), rtol=1e-5)
            np.testing.assert_allclose(left[::-1], trigram.handed_down(first, second), rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 10, 47])
def test_what_counting_says_of_a_position_never_saw_it(length):
    """Each part of the text by the trigram of the others, which is made here one position after the other."""
    ids = text_like(length, 4) if length > 4 else np.arange(length)
    said = ngram.held_out(ids, V, parts=4)
    for part in np.array_split(np.arange(length), 4):
        rest = ngram.KneserNeyTrigram(np.array([ids[i] for i in range(length) if i not in part], np.int64), V)
        for t in part:
            before = ids[t - 1] if t else V
            expected = rest.conditional(before, ids[t], ids[t + 1]) if t + 1 < length else 1.0
            assert said[t, 0] == pytest.approx(float(expected))
            np.testing.assert_allclose(said[t, 1:], rest.handed_down(before, ids[t]))
