"""PPL by the position of a token in its document, and by how much of the text before it the model may read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.remember.estimates import Estimate, mean, perplexity
from ctxkv_lightning.remember.recall import losses_of

BINS = (0, 10, 32, 100, 320, 1000)
"""Where the bins of positions begin; the last has no end."""

HISTORIES = (1, 10, 20, 40, 100, 320, 640)
"""Tokens that are left of the text before a target."""

TARGETS = 200


@dataclass(frozen=True)
class Bin:
    """Tokens at positions `first` to `last` (None: to the end) of their documents."""

    first: int
    last: int | None
    ppl: Estimate


@dataclass(frozen=True)
class History:
    """The targets, read after their last `tokens` (None: all) before them."""

    tokens: int | None
    ppl: Estimate
    excess: Estimate
    """Nats that a target costs more than after all of the text."""


@dataclass(frozen=True)
class Positions:
    """PPL of the stream as a whole, by position and by history. A model that knows nothing has `chance`."""

    chance: int
    ppl: Estimate
    bins: list[Bin]
    histories: list[History]


def position_suite(
    model: TiedLM,
    documents: Sequence[Tensor],
    seed: int = 42,
    targets: int = TARGETS,
    histories: Sequence[int] = HISTORIES,
) -> Positions:
    """Scores documents, each with the separator behind it, as the one stream that they are (all tokens but the first).

    Errors are bootstrapped over documents, or over targets, which are spread evenly over the stream.
    """
    stream, sizes = torch.cat(list(documents)), [len(document) for document in documents]
    losses, _ = losses_of(model, stream)
    place = np.concatenate([np.arange(size) for size in sizes])[1:]
    document = np.repeat(np.arange(len(sizes)), sizes)[1:]
    bins = []
    for first, stop in pairwise([*BINS, len(stream) + BINS[-1]]):
        inside = (place >= first) & (place < stop)
        if inside.any():
            last = None if first == BINS[-1] else stop - 1
            bins.append(Bin(first, last, perplexity(losses[inside], document[inside], seed)))
    found = by_history(model, stream, losses, seed, targets, histories)
    return Positions(len(model.embedding.weight), perplexity(losses, document, seed), bins, found)


def by_history(
    model: TiedLM, stream: Tensor, losses: np.ndarray, seed: int, targets: int, histories: Sequence[int]
) -> list[History]:
    """The same targets of a stream (N,) after texts cut to each length; `losses` (N - 1,) are those after all of it."""
    lengths = [length for length in histories if length <= len(stream) // 2]
    chosen = np.unique(np.linspace(max(lengths, default=1), len(stream) - 1, targets).astype(np.int64))
    whole, found = losses[chosen - 1], []
    for length in lengths:
        cut = np.array([_loss(model, stream[target - length : target + 1]) for target in chosen])
        found.append(History(length, perplexity(cut, chosen, seed), mean(cut - whole)))
    return [*found, History(None, perplexity(whole, chosen, seed), mean(whole - whole))]


def _loss(model: TiedLM, text: Tensor) -> float:
    """What the last token of a text costs after all before it."""
    return float(losses_of(model, text, given=len(text) - 1)[0][0])
