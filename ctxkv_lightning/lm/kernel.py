"""The Triton kernel of `normalise`; importing it raises ImportError where Triton is not installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 4096
"""Logits that a program of the kernel holds at a time."""


def normalise_rows(logits: Tensor, targets: Tensor, V: int, gradient: bool) -> Tensor:
    """`normalise` with a program for each row; the rows (n, P) lie one after another."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(logits.shape[1]))
    warps = max(1, min(8, block // 512))
    _normalise_row[len(logits),](logits, targets, losses, V, logits.shape[1], gradient, block, num_warps=warps)
    return losses


@triton.jit
def _normalise_row(logits, targets, losses, V, P, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two passes over a row, the second of which finds it in the cache; the sum grows with the largest logit so far."""
    row = tl.program_id(0).to(tl.int64)
    mine, column = logits + row * P, tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    wanted = tl.load(mine + target).to(tl.float32)  # first: it is overwritten below
    largest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        at = start + column
        x = tl.load(mine + at, mask=at < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    log_sum_exp = largest + tl.log(total)
    tl.store(losses + row, log_sum_exp - wanted)
    if GRADIENT:
        for start in range(0, P, BLOCK):
            at = start + column
            x = tl.load(mine + at, mask=at < V, other=-float("inf")).to(tl.float32)
            x = tl.exp(x - log_sum_exp) - tl.where(at == target, 1.0, 0.0)
            tl.store(mine + at, x.to(logits.dtype.element_ty), mask=at < P)
