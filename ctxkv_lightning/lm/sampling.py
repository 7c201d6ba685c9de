"""The next token from logits: the likeliest one, or one drawn at a temperature from the likeliest ones.

Every row draws from a generator of its own, one number a token, so what a row draws does not depend on its neighbours.
"""

import math

import torch
from torch import Tensor

from ctxkv_lightning.errors import UserError

SORTED = 1024
"""Tokens among which `top_p` is looked for before all are sorted."""

PENALISED = 4
"""Last tokens of a row, of its prompt and its own, that a presence penalty is for."""


class Sampler:
    """Draws tokens for B rows; row b's generator is seeded with `seed + b`.

    Probabilities are those of logits / temperature, first cut to the `top_k` likeliest tokens, then to the fewest
    of these whose probabilities, renormalised, sum to `top_p` at least. At temperature 0 the likeliest token is taken.
    `presence_penalty` (nats) is subtracted first from the logits of tokens that are among the row's last `PENALISED`: a
    head tied to the embedding that the state starts from finds the current token likely again, which a temperature
    below 1 magnifies. Raises UserError for a value out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 42,
        batch: int = 1,
        presence_penalty: float = 0.0,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature={temperature:g} must be a finite number of at least 0")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k} must be at least 1")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p:g} must be above 0 and at most 1")
        if not 0 <= seed < 2**63 - batch:
            raise UserError(f"seed={seed} must be at least 0 and below 2**63")
        if not 0 <= presence_penalty < math.inf:
            raise UserError(f"presence_penalty={presence_penalty:g} must be a finite number of at least 0")
        self.temperature, self.top_k, self.top_p, self.presence_penalty = temperature, top_k, top_p, presence_penalty
        # On the CPU wherever the logits are: so that a seed means the same on every device.
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(batch)]

    def __call__(self, logits: Tensor, last: Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), given the last tokens (B, n) of each row, as many as there are or more."""
        logits = self.penalised(logits, last)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities, tokens = self.candidates(logits)
        drawn = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in self.generators])
        total = probabilities.cumsum(dim=-1)
        place = torch.searchsorted(total, drawn.to(total.device)[:, None] * total[:, -1:], right=True)
        place = place.clamp_max(total.shape[1] - 1)
        return (place if tokens is None else tokens.gather(1, place))[:, 0]

    def penalised(self, logits: Tensor, last: Tensor) -> Tensor:
        """Logits (B, V) with the presence penalty for the last `PENALISED` of tokens (B, n)."""
        if not self.presence_penalty:
            return logits
        logits = logits.double()
        penalty = torch.zeros_like(logits).scatter_(1, last[:, -PENALISED:], self.presence_penalty)
        return logits - penalty

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities (B, n), fp64, of what may be drawn, and which tokens (B, n) they are; None: all, in order.

        Those that `top_p` cuts off stay with probability 0; the others sum to `top_p` or more.
        """
        # The largest is 0, so that no temperature, however low, makes it infinite.
        logits, tokens = logits.double(), None
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits, tokens = logits.topk(self.top_k, dim=-1)
        total = logits.logsumexp(dim=-1, keepdim=True)
        if self.top_p < 1 and tokens is None:
            logits, tokens = self._descending(logits, total)
        probabilities = (logits - total).exp()
        if self.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return probabilities, tokens

    def _descending(self, logits: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and tokens (B, n) in descending order: as many as `top_p` needs, since sorting them all is slow."""
        some = logits.topk(min(SORTED, logits.shape[1]), dim=-1)
        if bool(((some.values - total).exp().sum(dim=-1) >= self.top_p).all()):
            return some.values, some.indices
        return logits.sort(dim=-1, descending=True)
