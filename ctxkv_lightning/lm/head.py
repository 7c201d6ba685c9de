"""Cross-entropy through a frozen, tied head: logits = hidden Eᵀ, never all of them at once.

The head is most of the arithmetic and its weight is frozen, so the gradient of the hidden states is formed
chunk by chunk in the forward pass, while the chunk's probabilities are at hand, and no logit
is computed twice. Matrix products run in the compute type (the autocast type if there is one);
log-sum-exp and loss are fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.lm.normalise import column_sums, normalise

CHUNK = 2048
"""Rows of logits held at a time; fewer would make the products bound by reading the table."""

GPU_CHUNK = 4608
"""The same on a GPU, at most: each chunk costs launches there, and two, equally long, do for the published step."""

LARGEST = torch.finfo(torch.float32).max
"""In the place of infinity, which times a voice that says nothing would be no number."""

WIDTH = {"cuda": 64}
"""By device: the table gets rows of zeros up to a multiple of this, where matrix units are slow on other widths."""


def frozen_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (N,), fp32, of targets (N,) given hidden states (N, D) and a table (V, D).

    Differentiable in `hidden` once; the table gets no gradient.
    """
    return _FrozenCrossEntropy.apply(hidden, table, targets)


@torch.no_grad()
def score(hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,), fp32, and whether the target was the likeliest token (N,)."""
    V, factor = len(table), _factor(table, hidden)
    nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows in chunks(hidden):
        logits = hidden[rows].to(factor.dtype) @ factor.T
        hits[rows] = logits[:, :V].argmax(dim=-1) == targets[rows]
        nll[rows] = normalise(logits, targets[rows], V, gradient=False)
    return nll, hits


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        V, factor = len(table), _factor(table, hidden)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in chunks(hidden):
            logits = hidden[rows].to(factor.dtype) @ factor.T
            nll[rows] = normalise(logits, targets[rows], V, gradient is not None)
            if gradient is not None:
                gradient[rows] = logits @ factor
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, nll_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * nll_gradient[:, None].to(gradient.dtype), None, None


def _factor(table: Tensor, hidden: Tensor) -> Tensor:
    """The table as the products read it: (P, D) in the compute type, P ≥ V."""
    V, P = len(table), width_of(len(table), table.device)
    if P == V:
        return table.to(_compute_type(hidden))
    factor = table.new_empty(P, table.shape[1], dtype=_compute_type(hidden))
    factor[:V], factor[V:] = table, 0
    return factor


def width_of(V: int, device: torch.device) -> int:
    """P: the rows of a table of V tokens as products on this device read it."""
    return V + -V % WIDTH.get(device.type, 1)


def _compute_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunks(hidden: Tensor) -> list[slice]:
    """The rows of hidden states (N, D) in parts; none where there are none."""
    rows, size = len(hidden), CHUNK
    if hidden.device.type == "cuda":
        size = -(-rows // max(1, -(-rows // GPU_CHUNK))) or 1
    return [slice(start, start + size) for start in range(0, rows, size)]


def mixed_cross_entropy(
    hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, log_share: Tensor, pointed: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed loss in nats, and its parts (N,) without a gradient, of a head that shares its targets with a pointer.

    p(y) = exp(log_share) softmax(hidden Eᵀ + bias)[y] + pointed, for hidden states (N, D), a table (V, D), a bias
    (V,), and per position (N,) the logarithm of the head's share and the probability that the pointer gives the
    target. Differentiable once in all but the targets: how much of each loss is the head's is known as soon as its
    logits are, so that even the table's gradient is formed chunk by chunk.
    """
    return _MixedCrossEntropy.apply(hidden, table, bias, targets, log_share, pointed)


class _MixedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor, targets: Tensor, log_share: Tensor, pointed: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed, V, nll = ctx.needs_input_grad, len(table), torch.empty_like(pointed)
        factor = _factor(table, hidden)
        own_bias = F.pad(bias.to(factor.dtype), (0, len(factor) - V))
        of_hidden, of_share, of_pointed = torch.empty_like(hidden), torch.empty_like(nll), torch.empty_like(nll)
        of_table, of_bias = torch.zeros_like(table) if needed[1] else None, torch.zeros_like(bias)
        for rows in chunks(hidden):
            own = hidden[rows].to(factor.dtype)
            logits = torch.addmm(own_bias, own, factor.T)
            alone = log_share[rows] - normalise(logits, targets[rows], V, gradient=any(needed))
            nll[rows] = -torch.logaddexp(alone, pointed[rows].log())  # of logarithms: a p of e^-110 is 0 in fp32
            of_share[rows] = -torch.exp(alone + nll[rows])
            of_pointed[rows] = -nll[rows].exp().clamp_max(LARGEST)
            if any(needed):  # the logits are now their gradients, were the head alone
                logits *= -of_share[rows, None].to(factor.dtype)
                of_hidden[rows] = (logits @ factor).to(hidden.dtype)
                if needed[2]:
                    of_bias += column_sums(logits[:, :V])
                if of_table is not None:
                    of_table += logits[:, :V].T @ own
        ctx.save_for_backward(of_hidden, of_table, of_bias, of_share, of_pointed)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_table, of_bias, of_share, of_pointed = ctx.saved_tensors
        of_table = None if of_table is None else gradient * of_table
        of_pointed = (gradient * of_pointed).clamp(-LARGEST, LARGEST)  # a loss scaled for fp16 could make it infinite
        return gradient * of_hidden, of_table, gradient * of_bias, None, gradient * of_share, of_pointed
