"""Exact contexts of a whole stream, with a certificate.

The recurrence is sequential, but it forgets: so the stream is cut into segments that run in lock-step as
one batch, each after a warm-up over the tokens before it. The state that a segment starts from is then
compared with the state that its predecessor really ended in; segments that started wrong are run again
from the right state. What is left at the seams is returned: the certificate.
"""

import torch
from torch import Tensor

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.errors import UserError

SEGMENT = 256
WARM_UP = 96
BLOCK = 1 << 18
"""Tokens solved at a time: bounds the working memory at about 0.6 KB × C per token of a block."""

GPU_SEGMENT, GPU_BLOCK = 128, 1 << 19
"""Shorter and more segments side by side are fewer steps, of more work in all: a GPU has room for that."""


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
    a segment started from and the one its predecessor ended in: at most `tolerance`. Raises UserError where contexts
    are not finite.
    """
    N = len(embeddings) if ids is None else len(ids)
    contexts = embeddings.new_empty(N, encoder.context_dim) if out is None else out
    if ids is not None:
        return contexts, solve_onwards(encoder, embeddings, ids, contexts, encoder.initial(), tolerance)[0]
    state, worst = encoder.initial(), 0.0
    block = _lengths(contexts.device)[1]
    for start in range(0, N, block):
        rows = slice(start, min(start + block, N))
        index = torch.arange(rows.stop - start, device=state.device)
        solved, error = _solve_block(encoder, encoder.drive(embeddings[rows]), index, state, tolerance)
        contexts[rows] = solved
        state, worst = solved[-1].clone(), max(worst, error)
    return contexts, worst


@torch.no_grad()
def solve_onwards(
    encoder: ContextEncoder, table: Tensor, ids: Tensor, out: Tensor, state: Tensor, tolerance: float
) -> tuple[float, Tensor]:
    """Contexts of a stream that follows the context `state` (C,), into `out` (N, C); the seam error, the last context.

    `ids` (N,) index the normalised `table` (V, D).
    """
    drives, worst = encoder.drive(table), 0.0
    block = _lengths(ids.device)[1]
    for start in range(0, len(ids), block):
        rows = slice(start, min(start + block, len(ids)))
        solved, error = _solve_block(encoder, drives, ids[rows], state, tolerance)
        out[rows] = solved
        state, worst = solved[-1].clone(), max(worst, error)
    return worst, state


def _lengths(device: torch.device) -> tuple[int, int]:
    """Tokens of a segment and of a block on this device."""
    return (GPU_SEGMENT, GPU_BLOCK) if device.type == "cuda" else (SEGMENT, BLOCK)


def _solve_block(
    encoder: ContextEncoder, drives: Tensor, index: Tensor, state: Tensor, tolerance: float
) -> tuple[Tensor, float]:
    """Contexts (n, C) of a block that begins in `state` (C,); step t has the token half `drives[index[t]]`."""
    n, C = len(index), drives.shape[1]
    segment = _lengths(drives.device)[0]
    segments = -(-n // segment)
    # Time first: the rows of one lock-step lie together. What pads the last segment is cut off again.
    steps = torch.nn.functional.pad(index, (0, segments * segment - n)).view(segments, segment).T.contiguous()
    starts = _warm_up(encoder, drives, steps, state)
    contexts = drives.new_empty(segments, segment, C)
    wrong = torch.arange(segments, device=drives.device)
    while len(wrong):
        contexts[wrong] = _run(encoder, drives, steps[:, wrong], starts[wrong])
        gaps = (contexts[:-1, -1] - starts[1:]).abs().amax(dim=1)
        wrong = (gaps > tolerance).nonzero().flatten() + 1
        starts[wrong] = contexts[wrong - 1, -1]
    solved = contexts.view(-1, C)[:n]
    # A context that is not finite stays so to the end of its segment.
    if not (torch.isfinite(gaps).all() and torch.isfinite(solved[-1]).all()):
        raise UserError("the encoder's contexts are not finite: its weights are damaged, or were trained too fast")
    return solved, float(gaps.max()) if len(gaps) else 0.0


def _warm_up(encoder: ContextEncoder, drives: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    """Guessed start states (segments, C): zero, then the last tokens before each segment."""
    starts = drives.new_zeros(steps.shape[1], drives.shape[1])
    for step in steps[-WARM_UP:, :-1]:
        starts[1:] = encoder.advance(starts[1:], drives[step])
    starts[0] = state
    return starts


def _run(encoder: ContextEncoder, drives: Tensor, steps: Tensor, starts: Tensor) -> Tensor:
    """Contexts (segments, n, C) of segments, steps (n, segments), that start in `starts` (segments, C)."""
    contexts = drives.new_empty(steps.shape[1], steps.shape[0], drives.shape[1])
    state = starts
    for t, step in enumerate(steps):
        state = encoder.advance(state, drives[step])
        contexts[:, t] = state
    return contexts
