"""The recurrence that folds the past into C numbers.

    c_t = LayerNorm(c_{t-1} + GELU(W [c_{t-1}; e_t] + b)),   c_{-1} = 0

`W [c; e] + b` is computed as `W_c c + (W_e e + b)`: the second term, the *drive*, depends on the token
alone, so a caller may compute it once per distinct token. The concatenation is never built.
The encoder knows neither tokens nor streams; `solve.py` runs it over a whole stream.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ContextEncoder(nn.Module):
    """One step of the recurrence, for any leading shape.

    `W` (C, C+D) starts as N(0, 0.1²) and `b` (C,) as N(0, 0.01²); with LayerNormed embeddings that makes
    the step a contraction: a perturbation halves about every 3.5 tokens.
    """

    def __init__(self, context_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.embedding_dim = embedding_dim
        self.linear = nn.Linear(context_dim + embedding_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim)
        nn.init.normal_(self.linear.weight, std=0.1)
        nn.init.normal_(self.linear.bias, std=0.01)

    def forward(self, context: Tensor, embedding: Tensor) -> Tensor:
        """Next context (..., C) from the previous one (..., C) and a normalised embedding (..., D)."""
        return self.advance(context, self.drive(embedding))

    def drive(self, embedding: Tensor) -> Tensor:
        """Token half of the step: W_e e + b, (..., D) -> (..., C)."""
        return F.linear(embedding, self.linear.weight[:, self.context_dim :], self.linear.bias)

    @property
    def recurrent_weight(self) -> Tensor:
        """W_c (C, C)."""
        return self.linear.weight[:, : self.context_dim]

    def advance(self, context: Tensor, drive: Tensor, weight: Tensor | None = None) -> Tensor:
        """Next context (..., C) from the previous one and the token half, both (..., C).

        `weight` (C, C) stands for W_c, of which training may leave something out.
        """
        hidden = F.linear(context, self.recurrent_weight if weight is None else weight) + drive
        return self.norm(context + F.gelu(hidden))

    def initial(self, *leading: int) -> Tensor:
        """c_{-1} = 0, of shape (*leading, C)."""
        return torch.zeros(*leading, self.context_dim, device=self.linear.weight.device, dtype=self.linear.weight.dtype)
