"""Cross-entropy through a frozen, tied head: logits = hidden Eᵀ, never all of them at once.

The head is most of the arithmetic and its weight is frozen, so the gradient of the hidden states is formed
chunk by chunk in the forward pass, while the chunk's probabilities are at hand, and no logit
is computed twice. Matrix products run in the compute type (the autocast type if there is one);
log-sum-exp and loss are fp32.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 2048
"""Rows of logits held at a time; fewer would make the products bound by reading the table."""


def frozen_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (N,), fp32, of targets (N,) given hidden states (N, D) and a table (V, D).

    Differentiable in `hidden` once; the table gets no gradient.
    """
    return _FrozenCrossEntropy.apply(hidden, table, targets)


@torch.no_grad()
def score(hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,), fp32, and whether the target was the likeliest token (N,)."""
    table = table.to(_compute_type(hidden))
    parts = []
    for rows in _chunks(len(hidden)):
        logits = hidden[rows].to(table.dtype) @ table.T
        likeliest = logits.argmax(dim=-1)
        log_likelihood = _log_softmax(logits).gather(1, targets[rows, None])[:, 0]
        parts.append((-log_likelihood, likeliest == targets[rows]))
    nll, hits = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(hits)


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        table = table.to(_compute_type(hidden))
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden)):
            log_likelihood = _log_softmax(hidden[rows].to(table.dtype) @ table.T)
            target = targets[rows, None]
            nll[rows] = -log_likelihood.gather(1, target)[:, 0]
            if gradient is not None:
                # d nll / d logits = softmax - onehot
                difference = log_likelihood.exp_()
                difference.scatter_add_(1, target, difference.new_full(target.shape, -1.0))
                gradient[rows] = difference.to(table.dtype) @ table
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, nll_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * nll_gradient[:, None].to(gradient.dtype), None, None


def _compute_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]
