"""A pointer over the contexts that a decoder keeps: what followed a context like this one may follow again.

    p_h(w | t) ∝ Σ_{i<t} exp(q_h · k_{h,i} - ρ_h log(t - i)) [x_{i+1} = w],  q_h = A_h c_t + B_h z_t, k_{h,i} = K_h c_i

z_t is the model's normalised final state, of which queries read a LayerNorm; i runs over the last `window` contexts
before t. It is the continuous cache of Grave, Joulin & Usunier (2017), learned; `output.Gate` mixes it with the rest.
With `values`, what is pointed at is also read, as attention reads values: to the final state comes
Σ_h V_h Σ_w p_h(w | t) LayerNorm(E[w]). In a decoder a pointer costs four bytes for each context that is kept, the token
that followed, and the contexts of its window that attention to every I-th context back does not keep anyway.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 370
"""Queries at a time: a block of n reads window + n - 1 keys, of which every query needs `window`."""

NEVER = -1e4
"""Score of what does not exist; finite, so that a query without any past has a distribution too."""

SHARPNESS = (0.02, 0.05, 0.1, 0.2)
"""Of c_t · c_i at the start, by head in turn: from a broad look to the best match alone."""


class Pointed(NamedTuple):
    """What a pointer says about n queries in a row, of B texts: those of `rows`."""

    rows: slice
    evidence: Tensor  # (B, n, P), log Σ_i exp(…) of each head
    trust: Tensor  # (B, n, 1), added to the gates of its heads: 0, `NEVER` where there is no past to point at
    weights: Tensor  # (B, P, n, m), of the keys that the block reads; each head's sum to 1, to 0 where there is no key
    followers: Tensor  # (B, m), the token that followed each key
    state: Tensor  # (B, n, D), the final states, with what was read


class CachePointer(nn.Module):
    """`heads` pointers over the last `window` contexts."""

    def __init__(
        self, embedding_dim: int, context_dim: int, heads: int, dim: int, window: int, values: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        sharpness = torch.tensor([SHARPNESS[h % len(SHARPNESS)] for h in range(heads)])
        alike = nn.init.orthogonal_(torch.empty(context_dim, dim)) * (context_dim / dim) ** 0.5
        start = sharpness.sqrt()[:, None, None] * alike
        self.from_context = nn.Parameter(start.clone())  # A (P, C, d): like the keys, so that alike contexts match
        self.from_state = nn.Parameter(torch.zeros(heads, embedding_dim, dim))
        self.key = nn.Parameter(start.clone())
        self.recency = nn.Parameter(torch.zeros(heads))
        self.norm = nn.LayerNorm(embedding_dim)
        self.value = nn.Linear(heads * embedding_dim, embedding_dim, bias=False) if values else None
        if self.value is not None:
            nn.init.zeros_(self.value.weight)

    def blocks(
        self, hidden: Tensor, contexts: Tensor, tokens: Tensor, first: Tensor | None, table: Tensor
    ) -> Iterator[Pointed]:
        """What is pointed at, block by block, by queries with final states (B, T, D).

        The contexts (B, S+T, C) and tokens (B, S+T) begin with S positions of history; what is before `first[b]`, or
        not there, is not read. `table` is E (V, D).
        """
        T, window = hidden.shape[1], self.window
        query = self._queries(hidden, contexts[:, contexts.shape[1] - T :])
        contexts, tokens, first = self._padded(contexts, tokens, first, T)
        followers = tokens[:, 1:]
        embeddings = self.embeddings(followers, table)
        for start in range(0, T, BLOCK):
            rows = slice(start, min(T, start + BLOCK))
            n = rows.stop - rows.start
            column = torch.arange(window + n - 1, device=hidden.device)
            distance = torch.arange(n, device=hidden.device)[:, None] + window - column
            exists = (distance >= 1) & (distance <= window) & (start + column >= first[:, None])[:, None]
            there = slice(start, start + window + n - 1)
            keys = torch.einsum("bmc,pcd->bpmd", contexts[:, there], self.key)
            scores = (query[:, :, rows] @ keys.transpose(-1, -2)).float()
            yield self.weigh(
                rows,
                hidden[:, rows],
                scores,
                distance.clamp_min(1),
                exists[:, None],
                followers[:, there],
                None if embeddings is None else embeddings[:, there],
            )

    def weigh(
        self,
        rows: slice,
        hidden: Tensor,
        scores: Tensor,
        distance: Tensor,
        exists: Tensor,
        followers: Tensor,
        embeddings: Tensor | None,
        believed: Tensor | float = 1.0,
    ) -> Pointed:
        """What is pointed at from final states (B, n, D), given scores (B, P, n, m) of keys at distances (n, m).

        `exists` (B, 1, n, m) are those keys that there are; `embeddings` (B, m, D) are those of their followers (B, m).
        `believed` is the part, (B, 1, 1) or one for all, of what is pointed at that is read into the states.
        """
        scores = (scores - self.recency[:, None, None] * distance.log()).masked_fill(~exists, NEVER)
        # Not exp(scores - log-sum-exp): a CPU's exp is eight times as slow where it underflows, as it does for NEVER.
        weights, largest = scores.softmax(dim=-1), scores.argmax(dim=-1, keepdim=True)
        evidence = scores.gather(-1, largest) - weights.gather(-1, largest).log()
        weights = weights * exists
        if self.value is not None and embeddings is not None:
            read = weights.to(embeddings.dtype) @ embeddings[:, None]
            hidden = hidden + believed * self.value(read.transpose(1, 2).flatten(2))
        trust = torch.where(exists.any(dim=-1).transpose(1, 2), 0.0, NEVER)
        return Pointed(rows, evidence[..., 0].transpose(1, 2), trust, weights, followers, hidden)

    def embeddings(self, followers: Tensor, table: Tensor) -> Tensor | None:
        """What values are made of, (B, m, D), where followers (B, m) are read; `table` is E (V, D)."""
        return None if self.value is None else F.layer_norm(F.embedding(followers, table), table.shape[1:])

    def ask(self, hidden: Tensor, context: Tensor) -> Tensor:
        """What is multiplied with contexts themselves to score them: K_hᵀ q_h (B, P, 1, C)."""
        return torch.einsum("bpnd,pcd->bpnc", self._queries(hidden[:, None], context[:, None]), self.key)

    def _queries(self, hidden: Tensor, contexts: Tensor) -> Tensor:
        """Queries (B, P, T, d)."""
        query = torch.einsum("btc,pcd->bptd", contexts, self.from_context)
        return query + torch.einsum("bte,ped->bptd", self.norm(hidden), self.from_state)

    def _padded(self, contexts: Tensor, tokens: Tensor, first: Tensor | None, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts and tokens of exactly `window` positions of history, and the first that exists (B,)."""
        more = self.window - (contexts.shape[1] - T)
        first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device) if first is None else first
        if more <= 0:
            return contexts[:, -more:], tokens[:, -more:], (first + more).clamp_min(0)
        padding = contexts.new_zeros(len(contexts), more, contexts.shape[2])
        unknown = tokens.new_zeros(len(tokens), more)
        return torch.cat([padding, contexts], dim=1), torch.cat([unknown, tokens], dim=1), first + more
