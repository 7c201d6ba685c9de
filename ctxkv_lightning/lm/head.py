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

CPU_BLOCK = 1 << 18
"""Logits normalised at a time on a CPU: what stays in its cache between the passes over them."""


def frozen_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (N,), fp32, of targets (N,) given hidden states (N, D) and a table (V, D).

    Differentiable in `hidden` once; the table gets no gradient.
    """
    return _FrozenCrossEntropy.apply(hidden, table, targets)


@torch.no_grad()
def score(hidden: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,), fp32, and whether the target was the likeliest token (N,)."""
    table = table.to(_compute_type(hidden))
    nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows in _chunks(len(hidden)):
        logits = hidden[rows].to(table.dtype) @ table.T
        hits[rows] = logits.argmax(dim=-1) == targets[rows]
        nll[rows] = _normalise(logits, targets[rows], gradient=False)
    return nll, hits


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        table = table.to(_compute_type(hidden))
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden)):
            logits = hidden[rows].to(table.dtype) @ table.T
            nll[rows] = _normalise(logits, targets[rows], gradient is not None)
            if gradient is not None:
                gradient[rows] = logits @ table
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, nll_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * nll_gradient[:, None].to(gradient.dtype), None, None


def _normalise(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Losses (n,) in fp32 of logits (n, V); with `gradient`, turns the logits into theirs, softmax - onehot, in place.

    log-sum-exp is the largest logit minus the logarithm of the largest probability, which is at least 1/V:
    one exponential a logit serves loss and gradient, and none underflows.
    """
    rows = max(1, CPU_BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = []
    for block, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        probabilities = torch.softmax(block, dim=-1, dtype=torch.float32)
        log_sum_exp = block.amax(dim=-1).float() - probabilities.amax(dim=-1).log()
        losses.append(log_sum_exp - block.gather(1, target)[:, 0])
        if gradient:
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            block.copy_(probabilities)
    return torch.cat(losses)


def _compute_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]


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
        needed, dtype = ctx.needs_input_grad, _compute_type(hidden)
        product, nll = table.to(dtype), torch.empty_like(pointed)
        of_hidden, of_share, of_pointed = torch.empty_like(hidden), torch.empty_like(nll), torch.empty_like(nll)
        of_table, of_bias = torch.zeros_like(table) if needed[1] else None, torch.zeros_like(bias)
        for rows in _chunks(len(hidden)):
            own = hidden[rows].to(dtype)
            logits = torch.addmm(bias.to(dtype), own, product.T)
            alone = log_share[rows] - _normalise(logits, targets[rows], gradient=any(needed))
            nll[rows] = -torch.logaddexp(alone, pointed[rows].log())  # of logarithms: a p of e^-110 is 0 in fp32
            of_share[rows], of_pointed[rows] = -torch.exp(alone + nll[rows]), -nll[rows].exp()
            if any(needed):  # the logits are now their gradients, were the head alone
                logits *= -of_share[rows, None].to(dtype)
                of_hidden[rows] = (logits @ product).to(hidden.dtype)
                if needed[2]:
                    of_bias += logits.sum(dim=0, dtype=torch.float32)
                if of_table is not None:
                    of_table += logits.T @ own
        ctx.save_for_backward(of_hidden, of_table, of_bias, of_share, of_pointed)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_table, of_bias, of_share, of_pointed = ctx.saved_tensors
        of_table = None if of_table is None else gradient * of_table
        return gradient * of_hidden, of_table, gradient * of_bias, None, gradient * of_share, gradient * of_pointed
