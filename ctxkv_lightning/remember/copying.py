"""Copying, or induction: a trigger was followed by an answer; the trigger comes again, does the answer?

    ... filler ... A B ... filler ... A ?
                     |<-- lag ------->|

A lag of l means that the model is asked l tokens after it has read the answer: a model that reads contexts at
t, t-I, t-2I, ... then looks at the one right behind the answer if l is a multiple of I. (Olsson et al., "In-context
Learning and Induction Heads", 2022, on what this says about larger models.)
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.remember.recall import (
    LEAD,
    Answer,
    Recall,
    answer,
    at_lag,
    fillers,
    likeliest,
    next_losses,
    planted,
    without,
)

LAGS = (1, 2, 5, 10, 40, 100, 320, 1000, 2000)
"""Asked of every model, beside the edges of its own window."""

CANDIDATES = 10
"""Tokens among which the answer must be the likeliest."""

TRIALS = 50


def edges(intervals: Iterable[int], max_contexts: int) -> set[int]:
    """Lags around the nearest and the farthest context of each interval, M of them being read."""
    around = {edge + step for each in intervals for edge in (each, (max_contexts - 1) * each) for step in (-1, 0, 1)}
    return {lag for lag in around if lag >= 1}


def copy_suite(model: TiedLM, stream: Tensor, lags: Sequence[int], seed: int = 42, trials: int = TRIALS) -> Recall:
    """Recall of the answer among `CANDIDATES` tokens of a filler's language (N,), at each lag.

    Trigger and candidates are drawn from the stream's tokens and stand nowhere else in a trial's filler. A
    trial has one filler, whatever the lag. Raises ValueError where there are too few different tokens.
    """
    length = max(lags) + LEAD + 2
    found: dict[int, list[Answer]] = {lag: [] for lag in sorted(lags)}
    never = []
    for number in range(trials):
        rng = np.random.default_rng([seed, number])
        trigger, candidates = drawn_tokens(stream, len(model.embedding.weight), rng)
        filler = without(fillers(stream, length, rng), torch.cat([trigger, candidates]), rng)
        filler[-1] = trigger
        before = next_losses(model, filler)[candidates]
        never.append(likeliest(before))
        for lag in lags:
            losses = next_losses(model, planted(filler, torch.cat([trigger, candidates[:1]]), lag))
            rank = 1 + int((losses < losses[candidates[0]]).sum())
            found[lag].append(answer(losses[candidates], before, rank))
    return Recall(1 / CANDIDATES, length, [at_lag(lag, answers, never) for lag, answers in found.items()])


def drawn_tokens(stream: Tensor, V: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A trigger (1,) and the candidates (K,), all different, the answer first; of the stream's if it has enough."""
    known = stream.unique()
    pool = known if len(known) >= 4 * (CANDIDATES + 1) else torch.arange(V)
    if len(pool) < CANDIDATES + 2:
        raise ValueError(f"a vocabulary of {V} tokens is too small for {CANDIDATES} candidates and a filler")
    chosen = pool[torch.from_numpy(rng.choice(len(pool), CANDIDATES + 1, replace=False))]
    return chosen[:1], chosen[1:]
