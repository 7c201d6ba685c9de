"""From logits to losses, and to the gradients in their place: one kernel on a GPU, softmax elsewhere.

A chunk of logits is the largest tensor of a training step, and torch's own operations pass over it, and over copies
in fp32, again and again. The kernel reads each row from memory once and writes it once.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

try:
    from ctxkv_lightning.lm.kernel import normalise_rows
except ImportError:  # Triton comes with most builds of torch for a GPU
    normalise_rows = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CPU_BLOCK = 1 << 18
"""Logits normalised at a time on a CPU: what stays in its cache between the passes over them."""


def normalise(logits: Tensor, targets: Tensor, V: int, gradient: bool) -> Tensor:
    """Losses (n,), fp32, of targets (n,) given logits (n, P), of which the first V are some token's.

    With `gradient`, the logits become their own gradients, softmax - onehot, and 0 from V on.
    """
    if normalise_rows is not None and logits.device.type == "cuda" and works(normalise_rows):
        return normalise_rows(logits, targets, V, gradient)
    return normalise_plainly(logits, targets, V, gradient)


@cache
def works(rows: Callable[..., Tensor], device: str = "cuda") -> bool:
    """Whether the kernel can be built and run here, found out once: Triton needs a C compiler, and a GPU it knows."""
    try:
        rows(torch.zeros(1, 8, device=device), torch.zeros(1, dtype=torch.long, device=device), 8, True)
    except Exception as error:  # whatever the compiler and the driver raise
        log.warning(f"the head's GPU kernel cannot be built here, torch's slower softmax is used ({error})")
        return False
    return True


def normalise_plainly(logits: Tensor, targets: Tensor, V: int, gradient: bool) -> Tensor:
    """`normalise` on any device.

    log-sum-exp is the largest logit minus the logarithm of the largest probability, which is at least 1/V:
    one exponential a logit serves loss and gradient, and none underflows.
    """
    losses, rows = [], _rows(logits, V)
    for block, target in zip(logits[:, :V].split(rows), targets[:, None].split(rows), strict=True):
        probabilities = torch.softmax(block, dim=-1, dtype=torch.float32)
        log_sum_exp = block.amax(dim=-1).float() - probabilities.amax(dim=-1).log()
        losses.append(log_sum_exp - block.gather(1, target)[:, 0])
        if gradient:
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            block.copy_(probabilities)
    if gradient:
        logits[:, V:] = 0
    return torch.cat(losses)


def column_sums(logits: Tensor) -> Tensor:
    """Sums (V,), fp32, over the rows of logits (n, V), n at least 1; on a CPU torch would copy all to fp32 first."""
    blocks = logits.split(_rows(logits, logits.shape[1]))
    return torch.stack([block.sum(dim=0, dtype=torch.float32) for block in blocks]).sum(dim=0)


def _rows(logits: Tensor, V: int) -> int:
    """Rows to pass over at a time."""
    return max(1, CPU_BLOCK // V) if logits.device.type == "cpu" else len(logits)
