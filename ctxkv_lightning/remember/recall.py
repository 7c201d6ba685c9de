"""What the recall suites have in common: texts in which something was said, and what they find."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.remember.estimates import Estimate, mean, share

LEAD = 50
"""Tokens of filler before the earliest thing to be remembered: a text rarely begins with it."""


@dataclass(frozen=True)
class AtLag:
    """How well is recalled what was read `first` to `last` tokens ago."""

    first: int
    last: int
    recall: Estimate
    """Share of the trials in which the right answer was the likeliest of the candidates."""
    without: Estimate | None
    """The same where the text never said it, which should lie at chance."""
    gain: Estimate
    """Nats by which having read it makes the answer likelier."""
    raised: Estimate | None = None
    """Share of the trials in which having read it made no other candidate as much likelier as the right one.

    It sees a memory that is too weak to overcome what the model holds likely anyhow; chance is the same.
    """
    rank: float | None = None
    """Median rank of the answer in the whole vocabulary."""


@dataclass(frozen=True)
class Recall:
    """What a suite found, nearest lag first."""

    chance: float
    tokens: int
    """Of the longest text read."""
    lags: list[AtLag]


def next_losses(model: TiedLM, prompt: Tensor) -> Tensor:
    """What each token (V,) costs in nats as the next one after a prompt (N,)."""
    logits = Decoder(model).read(prompt[None].to(model.embedding.weight.device))[0]
    return -torch.log_softmax(logits.double(), dim=-1).cpu()


def losses_of(model: TiedLM, text: Tensor, given: int = 1) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Losses (N - given,) of a text (N,) in nats, and whether each token was the likeliest."""
    losses, hits = score_tokens(model, text.to(model.embedding.weight.device), given)
    return losses.double().cpu().numpy(), hits.cpu().numpy()


def likeliest(losses: Tensor) -> float:
    """1 where the first candidate (of losses (K,)) costs least; a tie is shared among those that tie."""
    least = losses == losses.min()
    return float(least[0]) / int(least.sum())


def fillers(stream: Tensor, length: int, rng: np.random.Generator) -> Tensor:
    """`length` tokens of a stream (N,), from anywhere in it; a short one is read again from its beginning."""
    start = int(rng.integers(0, len(stream)))
    return stream[(torch.arange(length) + start) % len(stream)].clone()


def without(filler: Tensor, drawn: Tensor, rng: np.random.Generator) -> Tensor:
    """The filler with other tokens of its own where a drawn one stood, so that it says nothing about these."""
    allowed = filler[~torch.isin(filler, drawn)]
    if not len(allowed):
        raise ValueError("the filler has no token but those that were drawn: it needs more different ones")
    spots = torch.isin(filler, drawn)
    chosen = torch.from_numpy(rng.integers(0, len(allowed), int(spots.sum())))
    return filler.masked_scatter(spots, allowed[chosen])


def planted(filler: Tensor, said: Tensor, behind: int) -> Tensor:
    """The filler (N,) with what is said (n,) in place of the n tokens that end `behind` tokens before its end."""
    stop = len(filler) - behind
    return torch.cat([filler[: stop - len(said)], said, filler[stop:]])


class Answer(NamedTuple):
    """What came of one trial at one lag."""

    hit: float
    raised: float
    gain: float
    rank: int | None = None


def answer(losses: Tensor, before: Tensor, rank: int | None = None) -> Answer:
    """What the losses (K,) of the candidates say, the right one first, beside those `before` it was said."""
    change = losses - before
    return Answer(likeliest(losses), likeliest(change), -float(change[0]), rank)


def at_lag(lag: int, answers: Sequence[Answer], never: Sequence[float]) -> AtLag:
    """All trials at a lag; `never` has the hits where the answer was never said."""
    hits, raised, gains, ranks = zip(*answers, strict=True)
    known = [rank for rank in ranks if rank is not None]
    rank = float(np.median(known)) if known else None
    return AtLag(lag, lag, share(hits), share(never), mean(gains), share(raised), rank)
