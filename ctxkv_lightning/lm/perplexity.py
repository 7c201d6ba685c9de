"""Perplexity over a whole stream, whatever the batches and ranks it came in."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(summed NLL / tokens), accumulated in fp64 from fp32 losses, over all ranks."""

    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Adds the losses (n,) of n tokens, in nats."""
        self.nll += nll.sum(dtype=torch.float64)
        self.tokens += nll.numel()

    def compute(self) -> Tensor:
        return (self.nll / self.tokens).exp()
