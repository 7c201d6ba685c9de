"""Exact contexts of a whole stream, with a certificate.

The recurrence is sequential, but it forgets: so the stream is cut into segments that run in lock-step as
one batch, each after a warm-up over the tokens before it. The state that a segment starts from is then
compared with the state that its predecessor really ended in; segments that started wrong are run again
from the right state. What is left at the seams is returned: the certificate.
"""

import torch
from torch import Tensor

from ctxkv_lightning.context.encoder import ContextEncoder

SEGMENT = 256
WARM_UP = 64
BLOCK = 1 << 18
"""Tokens solved at a time: bounds the working memory at about 0.6 KB × C per token of a block."""


@torch.no_grad()
def solve_contexts(
    encoder: ContextEncoder,
    embeddings: Tensor,
    tolerance: float = 1e-5,
    *,
    ids: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Contexts (N, C) of a stream and the largest error at any seam.

    `embeddings` are the normalised embeddings (N, D) of the stream, or, with `ids` (N,), a table (V, D)
    indexed by them. Contexts are written into `out` (N, C) if given; the recurrence runs in the encoder's
    type whatever the type of `out`. The seam error is the largest absolute difference between the state
    a segment started from and the one its predecessor ended in: at most `tolerance`.
    """
    table = None if ids is None else encoder.drive(embeddings)
    N = len(embeddings) if ids is None else len(ids)
    contexts = embeddings.new_empty(N, encoder.context_dim) if out is None else out
    state, worst = encoder.initial(), 0.0
    for start in range(0, N, BLOCK):
        rows = slice(start, start + BLOCK)
        block = encoder.drive(embeddings[rows]) if table is None or ids is None else table[ids[rows]]
        solved, error = _solve_block(encoder, block, state, tolerance)
        contexts[rows] = solved
        state, worst = solved[-1], max(worst, error)
    return contexts, worst


def _solve_block(encoder: ContextEncoder, drive: Tensor, state: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Contexts of one block, drive (n, C), that begins in `state` (C,)."""
    n, C = drive.shape
    segments = -(-n // SEGMENT)
    padded = drive.new_zeros(segments * SEGMENT, C)
    padded[:n] = drive
    steps = padded.view(segments, SEGMENT, C)
    starts = _warm_up(encoder, steps, state)
    contexts = torch.empty_like(steps)
    wrong = torch.arange(segments, device=drive.device)
    while len(wrong):
        contexts[wrong] = _run(encoder, steps[wrong], starts[wrong])
        gaps = (contexts[:-1, -1] - starts[1:]).abs().amax(dim=1)
        wrong = (gaps > tolerance).nonzero().flatten() + 1
        starts[wrong] = contexts[wrong - 1, -1]
    return contexts.view(-1, C)[:n], float(gaps.max()) if len(gaps) else 0.0


def _warm_up(encoder: ContextEncoder, steps: Tensor, state: Tensor) -> Tensor:
    """Guessed start states (segments, C): zero, then the last tokens before each segment."""
    starts = steps.new_zeros(len(steps), steps.shape[2])
    before = steps[:-1, -min(WARM_UP, SEGMENT) :]
    for step in before.unbind(dim=1):
        starts[1:] = encoder.advance(starts[1:], step)
    starts[0] = state
    return starts


def _run(encoder: ContextEncoder, steps: Tensor, starts: Tensor) -> Tensor:
    """Contexts (segments, SEGMENT, C) of segments that start in `starts` (segments, C)."""
    contexts = torch.empty_like(steps)
    state = starts
    for t in range(steps.shape[1]):
        state = encoder.advance(state, steps[:, t])
        contexts[:, t] = state
    return contexts
