"""Multi-query associative recall: documents of key-value pairs and, later, of keys whose values must be recalled.

    pairs          the rest: blanks, and each key once more with its value behind it
    k v k v k v    _ _ k v _ _ _ _ k v _ _ k v _ _

The task is that of Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023): the
keys of a document differ, so do its values, and the gaps from the pairs to the queries follow a power law. Two things
are otherwise, for this is text that is read from left to right: the answer stands behind its query, and a
document may be read with others before it, whose pairs no longer hold.

A symbol is one character and one token, so that such documents go through everything that text goes through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from ctxkv_lightning.text.corpus import SEPARATOR, Corpus, Document

FIRST_KEY, FIRST_VALUE, BLANK = 0x4E00, 0xAC00, "_"
"""Keys are Chinese characters and values Korean ones, in the order of Unicode, which has enough of both."""

MOST_KEYS, MOST_VALUES = 20_000, 11_000

BYTES = 256
"""Ids that stand for bytes, as in every tokenizer here; the keys' come next, then the values'."""

POWER = 0.01
"""a of the gaps' distribution, p(g) ~ g^(a - 1): Zoology's own."""


def _size(default: int, at_most: int | None = None) -> Any:
    """A field whose limits the schema of the configuration checks."""
    return field(default=default, metadata={"limits": {"at least": 1, **({"at most": at_most} if at_most else {})}})


@dataclass
class Task:
    """How large the task is."""

    pairs: int = _size(8)
    """Key-value pairs in a document, each of them asked for once."""
    length: int = _size(64)
    """Symbols in a document."""
    keys: int = _size(64, MOST_KEYS)
    """Symbols that keys are drawn from."""
    values: int = _size(64, MOST_VALUES)
    """Symbols that values are drawn from: one in `values` is guessed right."""
    heldout: int = _size(200)
    """Documents that validate, and as many that test."""

    def contradictions(self) -> list[str]:
        """What cannot be, as phrases that begin with a field's name."""
        found = []
        if self.length % 2 or self.length < 4 * self.pairs:
            found.append(f"length={self.length} must be even and at least {4 * self.pairs}, four for each of the pairs")
        for name in ("keys", "values"):
            if getattr(self, name) < self.pairs:
                found.append(f"{name}={getattr(self, name)} must be at least {self.pairs}, one for each of the pairs")
        return found

    @property
    def tokens(self) -> int:
        """Tokens from the beginning of one document to that of the next."""
        return self.length + len(SEPARATOR)


def read_mqar(task: Task, seed: int, samples: int) -> Corpus:
    """`samples` documents to train on, and those held out, which are the same for every seed.

    A document depends on no other.
    """
    train = tuple(_document(task, f"train {i}", [0, seed, i]) for i in range(samples))
    validation = tuple(_document(task, f"validation {i}", [1, 0, i]) for i in range(task.heldout))
    test = tuple(_document(task, f"test {i}", [2, 0, i]) for i in range(task.heldout))
    return Corpus(train, validation, test)


def _document(task: Task, name: str, seeds: Sequence[int]) -> Document:
    rng = np.random.default_rng(seeds)
    keys = [chr(FIRST_KEY + key) for key in rng.choice(task.keys, task.pairs, replace=False)]
    values = [chr(FIRST_VALUE + value) for value in rng.choice(task.values, task.pairs, replace=False)]
    symbols = [BLANK] * task.length
    shares = gap_shares(task)
    gaps = rng.choice(len(shares), task.pairs, replace=False, p=shares)
    for pair, (key, value, gap) in enumerate(zip(keys, values, gaps, strict=True)):
        symbols[2 * pair : 2 * pair + 2] = key, value
        query = 2 * (task.pairs + gap)
        symbols[query : query + 2] = key, value
    return Document(name, "".join(symbols))


def gap_shares(task: Task) -> NDArray[np.float64]:
    """Probability of each place for a query, counted in pairs of symbols from the end of the key-value pairs."""
    places = np.arange(1, (task.length - 2 * task.pairs) // 2 + 1, dtype=np.float64)
    return places ** (POWER - 1) / (places ** (POWER - 1)).sum()


def symbol_encoding(task: Task) -> tiktoken.Encoding:
    """The tokenizer: every character is a token, symbols have one of their own, and other characters are bytes."""
    symbols = [*range(FIRST_KEY, FIRST_KEY + task.keys), *range(FIRST_VALUE, FIRST_VALUE + task.values)]
    ranks = {bytes([byte]): byte for byte in range(BYTES)}
    ranks |= {chr(symbol).encode(): BYTES + rank for rank, symbol in enumerate(symbols)}
    return tiktoken.Encoding("symbols", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})


def answers(task: Task, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which tokens (N,) of a stream of documents are answers: values that stand behind the pairs of their document."""
    behind = np.arange(len(ids)) % task.tokens >= 2 * task.pairs
    return (ids >= BYTES + task.keys) & behind


def lags(task: Task, ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Of each answer in a stream, tokens between it in its pair and the query that asks for it, in the stream's order.

    A lag of 1 is that of a query right behind the value that it asks for.
    """
    found = []
    for place in answers(task, ids).nonzero()[0]:
        start = place - place % task.tokens
        pair = ids[start : start + 2 * task.pairs].tolist().index(ids[place])
        found.append(place - 1 - start - pair)
    return np.array(found, np.int64)
