"""The footing: what plain counting achieves on the tokens a neural model is scored on.

Three models, each a probability per token of a held-out stream: a smoothed unigram, an interpolated
Kneser-Ney trigram, and that trigram mixed with a cache of the last tokens of the held-out stream itself.
Every distribution sums to 1 over the vocabulary and gives each token a positive probability.
Letters: `T` tokens of a held-out stream, `V` vocabulary size. Everything is numpy, in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctxkv_lightning.errors import UserError

Ids = NDArray[np.int64]
Reals = NDArray[np.float64]

WINDOW = 640
"""Tokens of history in the cache: what 32 contexts at interval 20 span."""

ADDITIVE_CONSTANTS = 2.0 ** np.arange(-8, 5)
"""The candidates for the unigram's additive constant, 1/256 to 16."""

FALLBACK_DISCOUNT = 0.75
"""Discount where too few n-grams were counted to estimate one."""

PARTS = 10
"""Into which a text is cut so that each part can be told by counts of the others."""

EVIDENCE = 3
"""Numbers that `held_out` has of a position."""

EM_STEPS = 200
EM_TOLERANCE = 1e-6


def unigram_probabilities(train_ids: Ids, held_out_ids: Ids, vocab_size: int) -> Reals:
    """Probability of each held-out token under additive smoothing, `(T,)`.

    p(w) = (n(w) + a) / (n + a V). The constant `a` is the candidate under which the training tokens are
    likeliest when each is left out of its own count (leaving-one-out: Ney, Essen & Kneser, 1995), so no
    held-out token takes part in the choice.
    """
    counts = np.bincount(_checked(train_ids, vocab_size), minlength=vocab_size)
    a = max(ADDITIVE_CONSTANTS, key=lambda constant: _left_out_likelihood(counts, constant))
    return (counts[_checked(held_out_ids, vocab_size)] + a) / (counts.sum() + a * vocab_size)


def _left_out_likelihood(counts: Ids, constant: float) -> float:
    seen = counts[counts > 0]
    probabilities = (seen - 1 + constant) / (counts.sum() - 1 + constant * len(counts))
    return float((seen * np.log(probabilities)).sum())


def discounts(counts: Ids) -> Reals:
    """Discounts `(D1, D2, D3+)` of n-grams counted once, twice and more often.

    With n_k the number of n-grams counted k times and Y = n1 / (n1 + 2 n2):
    D_k = k - (k + 1) Y n_{k+1} / n_k  (modified Kneser-Ney: Chen & Goodman, 1998).
    Where n_k is 0, or the estimate leaves (0, k], it is Y (absolute discounting: Ney, Essen & Kneser,
    1994); where n1 or n2 is 0, all three are `FALLBACK_DISCOUNT`.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    if n[1] == 0 or n[2] == 0:
        return np.full(3, FALLBACK_DISCOUNT)
    y = n[1] / (n[1] + 2 * n[2])
    k = np.arange(1, 4)
    estimates = k - (k + 1) * y * n[2:5] / np.maximum(n[1:4], 1)
    return np.where((n[1:4] > 0) & (estimates > 0) & (estimates <= k), estimates, y)


@dataclass(frozen=True)
class _Order:
    """One order of the model. An n-gram is the number its tokens spell in base V + 1."""

    grams: Ids
    discounted: Reals
    contexts: Ids
    totals: Reals
    reserved: Reals

    @classmethod
    def count(cls, grams: Ids, counts: Ids, base: int) -> "_Order":
        discount = discounts(counts)[np.minimum(counts, 3) - 1]
        contexts, groups = np.unique(grams // base, return_inverse=True)
        totals = np.bincount(groups, counts, len(contexts)).astype(np.float64)
        reserved = np.bincount(groups, discount, len(contexts)).astype(np.float64)
        return cls(grams, counts - discount, contexts, totals, reserved)

    def interpolate(self, contexts: Ids, grams: Ids, lower: Reals) -> Reals:
        totals = _look_up(self.contexts, self.totals, contexts)
        reserved = _look_up(self.contexts, self.reserved, contexts)
        mass = _look_up(self.grams, self.discounted, grams) + reserved * lower
        return np.where(totals > 0, mass / np.maximum(totals, 1), lower)

    def handed_down(self, contexts: Ids) -> Reals:
        """The weight of the order below: 1 where a context was never seen."""
        totals = _look_up(self.contexts, self.totals, contexts)
        return np.where(totals > 0, _look_up(self.contexts, self.reserved, contexts) / np.maximum(totals, 1), 1.0)


def _look_up(keys: Ids, values: Reals, wanted: Ids) -> Reals:
    if len(keys) == 0:
        return np.zeros(np.shape(wanted))
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)


class KneserNeyTrigram:
    """Interpolated modified Kneser-Ney trigram (Kneser & Ney, 1995; Chen & Goodman, 1998).

    p(w | h) = (n(h w) - D(n(h w)) + r(h) p(w | h')) / n(h), where h' is h without its oldest token, r(h)
    the sum of the discounts taken under h, and p(w | h) = p(w | h') where h was never seen. Trigrams count
    occurrences, bigrams and unigrams count distinct left neighbours; below the unigram stands 1 / V.
    """

    def __init__(self, train_ids: Ids, vocab_size: int) -> None:
        self.vocab_size, self.base = vocab_size, vocab_size + 1
        if self.base**3 > np.iinfo(np.int64).max:
            raise ValueError(f"vocab_size={vocab_size} is too large: a trigram must fit 64 bits")
        ids = _checked(train_ids, vocab_size)
        trigrams, trigram_counts = np.unique(self._spell(ids, 3), return_counts=True)
        pairs = np.unique(self._spell(ids, 2))
        bigrams, bigram_counts = np.unique(trigrams % self.base**2, return_counts=True)
        unigrams, unigram_counts = np.unique(pairs % self.base, return_counts=True)
        self.trigram = _Order.count(trigrams, trigram_counts, self.base)
        self.bigram = _Order.count(bigrams, bigram_counts, self.base)
        self.unigram = _Order.count(unigrams, unigram_counts, self.base)

    def _spell(self, ids: Ids, order: int) -> Ids:
        length = max(len(ids) - order + 1, 0)
        spelt: Ids = np.zeros(length, np.int64)
        for offset in range(order):
            spelt = spelt * self.base + ids[offset : offset + length]
        return spelt

    def conditional(self, first: Ids, second: Ids, word: Ids) -> Reals:
        """p(word | first second) for arrays that broadcast; the token V stands for "none" in a history."""
        first, second, word = (np.asarray(ids, np.int64) for ids in (first, second, word))
        pair, context = second * self.base + word, first * self.base + second
        p = self.unigram.interpolate(np.zeros_like(word), word, np.full(word.shape, 1 / self.vocab_size))
        p = self.bigram.interpolate(second, pair, p)
        return self.trigram.interpolate(context, context * self.base + word, p)

    def probabilities(self, ids: Ids) -> Reals:
        """Probability of each token of a stream given the (at most two) before it, `(T,)`."""
        padded = np.concatenate([np.full(2, self.vocab_size), _checked(ids, self.vocab_size)])
        return self.conditional(padded[:-2], padded[1:-1], padded[2:])

    def handed_down(self, first: Ids, second: Ids) -> Reals:
        """The weights `(..., 2)` that trigram and bigram leave to the order below, after first and second."""
        first, second = (np.asarray(ids, np.int64) for ids in (first, second))
        context = first * self.base + second
        return np.stack([self.trigram.handed_down(context), self.bigram.handed_down(second)], axis=-1)

    def tables(self) -> dict[str, NDArray[np.generic]]:
        """The model as arrays: unigram (V,); of bigram and trigram the n-grams and their histories, ascending and
        spelt in base V + 1, with what each n-gram adds to p and what each history leaves to the order below."""
        words = np.arange(self.vocab_size)
        none = np.full(self.vocab_size, 1 / self.vocab_size)
        made: dict[str, NDArray[np.generic]] = {
            "unigram": self.unigram.interpolate(np.zeros_like(words), words, none).astype(np.float32)
        }
        for name, order in (("bigram", self.bigram), ("trigram", self.trigram)):
            totals = _look_up(order.contexts, order.totals, order.grams // self.base)
            made[f"{name}_grams"], made[f"{name}_contexts"] = order.grams, order.contexts
            made[f"{name}_mass"] = (order.discounted / np.maximum(totals, 1)).astype(np.float32)
            made[f"{name}_left"] = (order.reserved / np.maximum(order.totals, 1)).astype(np.float32)
        return made


def held_out(ids: Ids, vocab_size: int, parts: int = PARTS) -> Reals:
    """What counting says at each position of a text without having seen it there, `(T, 3)`.

    p(x_{t+1} | x_{t-1} x_t) and `handed_down` after x_t, by the trigram of all parts but the one in which t stands
    (deleted estimation: Jelinek & Mercer, 1980); the last position has no next token, and a probability of 1.
    """
    ids, said = _checked(ids, vocab_size), np.ones((len(ids), EVIDENCE))
    before = np.concatenate([[vocab_size], ids[:-1]])[: len(ids)]
    for part in np.array_split(np.arange(len(ids)), parts):
        if len(part):
            rest = KneserNeyTrigram(np.delete(ids, part), vocab_size)
            said[part, 1:] = rest.handed_down(before[part], ids[part])
            known = part[part < len(ids) - 1]
            said[known, 0] = rest.conditional(before[known], ids[known], ids[known + 1])
    return said


def _recent(keys: Ids, span: int) -> Ids:
    """How many of the `span` keys before each key equal it, `(T,)`."""
    T = len(keys)
    _, ranks = np.unique(keys, return_inverse=True)
    positions = np.arange(T)
    order = np.argsort(ranks, kind="stable")
    found = np.searchsorted((ranks * T + positions)[order], ranks * T + np.maximum(positions - span, 0))
    places = np.empty(T, np.int64)
    places[order] = positions
    return places - found


def cache_probabilities(ids: Ids, window: int = WINDOW) -> tuple[Reals, Reals, NDArray[np.bool_]]:
    """Unigram cache, bigram cache, and whether the bigram cache holds anything, each `(T,)`.

    The cache at position t is the `window` tokens before it (Kuhn & De Mori, 1990). Unigram: the share of
    x_t among them. Bigram: among the followers of x_{t-1} inside the window, the share of x_t. Both are 0
    where there is nothing to count: the unigram cache at position 0 only.
    """
    ids = np.asarray(ids, np.int64)
    T = len(ids)
    unigram = _recent(ids, window) / np.clip(np.arange(T), 1, window)
    followed, repeated = np.zeros(T), np.zeros(T)
    followed[1:] = _recent(ids, window - 1)[:-1]
    repeated[1:] = _recent(ids[:-1] * (ids.max(initial=0) + 1) + ids[1:], window - 1)
    return unigram, repeated / np.maximum(followed, 1), followed > 0


def em_weights(components: Reals) -> Reals:
    """Mixture weights `(K,)` that make the tokens behind `components (T, K)` likeliest.

    Expectation-maximisation (Dempster, Laird & Rubin, 1977) from equal weights, with one pseudo-token per
    component: no weight becomes 0, so that no token is impossible after a short validation stream.
    """
    T, K = components.shape
    weights = np.full(K, 1 / K)
    for _ in range(EM_STEPS):
        shares = components * weights
        shares /= shares.sum(axis=1, keepdims=True)
        previous, weights = weights, (shares.sum(axis=0) + 1) / (T + K)
        if np.abs(weights - previous).max() < EM_TOLERANCE:
            break
    return weights


class CacheMixture:
    """A trigram mixed with a unigram and a bigram cache of the stream it reads.

    There is one row of weights for each number of components that have something to say: the trigram always
    has, the unigram cache from position 1, the bigram cache where the previous token was seen before in the
    window. So an empty cache's weight goes to the rest and the mixture sums to 1. The weights are those that
    `em_weights` finds on the validation stream, position 0 left out.
    """

    def __init__(self, trigram: KneserNeyTrigram, validation_ids: Ids, window: int = WINDOW) -> None:
        if window < 1:
            raise UserError(f"The cache window is {window}; it must hold at least 1 token.")
        self.trigram, self.window = trigram, window
        components, speaking = self._components(validation_ids)
        self.weights = np.zeros((3, 3))
        for k in (1, 2, 3):
            self.weights[k - 1, :k] = em_weights(components[1:][speaking[1:] == k, :k])

    def _components(self, ids: Ids) -> tuple[Reals, Ids]:
        """Probabilities `(T, 3)` and how many of the three speak `(T,)`."""
        unigram, bigram, seen = cache_probabilities(ids, self.window)
        components = np.stack([self.trigram.probabilities(ids), unigram, bigram], axis=1)
        return components, 1 + (np.arange(len(ids)) > 0) + seen

    def probabilities(self, ids: Ids) -> Reals:
        """Probability of each token of a stream given those before it, `(T,)`."""
        components, speaking = self._components(ids)
        return (components * self.weights[speaking - 1]).sum(axis=1)


def perplexity(probabilities: Reals) -> float:
    """exp(summed negative log-likelihood / tokens)."""
    return float(np.exp(-np.log(probabilities).mean()))


def footing(
    train: Ids,
    validation: Ids,
    test: Ids,
    vocab_size: int,
    window: int = WINDOW,
    counted: Mapping[str, NDArray[np.bool_] | None] | None = None,
) -> dict[str, float]:
    """Perplexities of the three counting models on the tokens a neural model is scored on.

    Each held-out stream is scored at its positions 1 … T-1, or at those of them that `counted` marks under its name,
    every token predicted from those before it in the same stream; position 0 is history only. Keys: `unigram_ppl`,
    `kneser_ney_ppl` and `kneser_ney_cache_ppl` on validation, the same with `test_` before them on test.
    `UserError` where a stream has fewer than two tokens.
    """
    streams = {"train": train, "validation": validation, "test": test}
    for name, ids in streams.items():
        if len(ids) < 2:
            raise UserError(f"The {name} stream has {len(ids)} tokens; counting needs at least 2.")
    trigram = KneserNeyTrigram(train, vocab_size)
    mixture = CacheMixture(trigram, validation, window)
    scores = {}
    for prefix, name in (("", "validation"), ("test_", "test")):
        ids = streams[name]
        marked = (counted or {}).get(name)
        places = slice(None) if marked is None else marked[1:]
        scores[f"{prefix}unigram_ppl"] = perplexity(unigram_probabilities(train, ids, vocab_size)[1:][places])
        scores[f"{prefix}kneser_ney_ppl"] = perplexity(trigram.probabilities(ids)[1:][places])
        scores[f"{prefix}kneser_ney_cache_ppl"] = perplexity(mixture.probabilities(ids)[1:][places])
    return scores


def _checked(ids: Ids, vocab_size: int) -> Ids:
    ids = np.asarray(ids, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got [{ids.min()}, {ids.max()}]")
    return ids
