"""The slow, obvious twins of the counting models: dictionaries, and one loop per token."""

import math
from collections import Counter
from itertools import pairwise


def additive_unigram(train: list[int], stream: list[int], vocab_size: int, constant: float) -> list[float]:
    counts = Counter(train)
    return [(counts[token] + constant) / (len(train) + constant * vocab_size) for token in stream]


def left_out_likelihood(train: list[int], vocab_size: int, constant: float) -> float:
    """Each training token's log-probability from the counts of all the others."""
    total = 0.0
    for t, token in enumerate(train):
        (probability,) = additive_unigram(train[:t] + train[t + 1 :], [token], vocab_size, constant)
        total += math.log(probability)
    return total


def chen_goodman_discounts(counts: Counter, fallback: float) -> list[float]:
    n = Counter(counts.values())
    if n[1] == 0 or n[2] == 0:
        return [fallback] * 3
    y = n[1] / (n[1] + 2 * n[2])
    discounts = []
    for k in (1, 2, 3):
        estimate = k - (k + 1) * y * n[k + 1] / n[k] if n[k] else y
        discounts.append(estimate if 0 < estimate <= k else y)
    return discounts


class KneserNeyByLoops:
    """p(w | h), one n-gram at a time, recursing from three tokens down to 1 / V."""

    def __init__(self, train: list[int], vocab_size: int, fallback: float) -> None:
        self.vocab_size = vocab_size
        trigrams = Counter(zip(train, train[1:], train[2:], strict=False))
        pairs = Counter(pairwise(train))
        bigrams = Counter(gram[1:] for gram in trigrams)
        unigrams = Counter(gram[1:] for gram in pairs)
        self.counts = {3: trigrams, 2: bigrams, 1: unigrams}
        self.discounts = {order: chen_goodman_discounts(counts, fallback) for order, counts in self.counts.items()}

    def probability(self, history: tuple[int, ...], word: int) -> float:
        counts, discounts = self.counts[len(history) + 1], self.discounts[len(history) + 1]
        lower = self.probability(history[1:], word) if history else 1 / self.vocab_size
        under = [count for gram, count in counts.items() if gram[:-1] == history]
        if not under:
            return lower
        count = counts[(*history, word)]
        kept = count - discounts[min(count, 3) - 1] if count else 0.0
        reserved = sum(discounts[min(other, 3) - 1] for other in under)
        return (kept + reserved * lower) / sum(under)

    def stream(self, ids: list[int]) -> list[float]:
        return [self.probability(tuple(ids[max(t - 2, 0) : t]), ids[t]) for t in range(len(ids))]


def caches(ids: list[int], window: int) -> list[tuple[float, float, bool]]:
    """Unigram cache, bigram cache, and whether the bigram cache holds anything, token by token."""
    rows = []
    for t, token in enumerate(ids):
        recent = ids[max(t - window, 0) : t]
        followers = [after for before, after in pairwise(recent) if before == ids[t - 1]]
        unigram = recent.count(token) / len(recent) if recent else 0.0
        bigram = followers.count(token) / len(followers) if followers else 0.0
        rows.append((unigram, bigram, bool(followers)))
    return rows


def mixture(trigram: list[float], cached: list[tuple[float, float, bool]], weights: list[list[float]]) -> list[float]:
    """The mixture with one row of weights per number of components that have something to say."""
    mixed = []
    for t, (own, (unigram, bigram, seen)) in enumerate(zip(trigram, cached, strict=True)):
        row = weights[0] if t == 0 else weights[2] if seen else weights[1]
        mixed.append(row[0] * own + row[1] * unigram + row[2] * bigram)
    return mixed
