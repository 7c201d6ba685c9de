"""The layers of a language model: attention over contexts or over tokens, and the feed-forward layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.lm.attention import Selection, attend, slot_weights, strided_attention
from ctxkv_lightning.lm.recipe import Norm

ROPE_BASE = 10_000.0


class ContextAttention(nn.Module):
    """Multi-head attention over selected contexts: queries from embeddings (D), keys and values from contexts (C).

    `interval` is one for all heads or a list of one for each. With `read_current`, W c_t joins what was attended to.
    """

    def __init__(
        self,
        embedding_dim: int,
        context_dim: int,
        heads: int,
        interval: int | Sequence[int],
        max_contexts: int,
        dropout: float,
        selection: Selection = "strided",
        norm: Norm = "post",
        read_current: bool = False,
    ) -> None:
        super().__init__()
        self.residual = norm
        self.intervals = (interval,) * heads if isinstance(interval, int) else tuple(interval)
        if embedding_dim % heads or len(self.intervals) != heads:
            raise ValueError(f"heads={heads} does not divide embedding_dim={embedding_dim}, or interval={interval}")
        self.heads, self.max_contexts, self.selection = heads, max_contexts, selection
        self.head_dim = embedding_dim // heads
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(context_dim, embedding_dim)
        self.value = nn.Linear(context_dim, embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)
        self.read = nn.Linear(context_dim, embedding_dim) if read_current else None
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embedding_dim)
        if norm == "pre":  # each layer starts as the identity, but for what `read` adds
            nn.init.zeros_(self.output.weight)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, T, D) from embeddings (B, T, D) and contexts (B, S+T, C), the first S of them history."""
        query, key, value = (self.split(x) for x in (self.ask(embeddings), self.key(contexts), self.value(contexts)))
        mixed = attend(query, key, value, self.intervals, self.max_contexts, self.selection, first)
        return self.combine(embeddings, mixed, contexts[:, contexts.shape[1] - embeddings.shape[1] :])

    def ask(self, embeddings: Tensor) -> Tensor:
        """Queries (..., D), of all heads side by side."""
        return self.query(self.norm(embeddings) if self.residual == "pre" else embeddings)

    def combine(self, embeddings: Tensor, mixed: Tensor, now: Tensor | None = None) -> Tensor:
        """e + dropout(W_o mixed + W c), (B, T, D), normalised if `norm` is "post".

        `mixed` are the heads' outputs (B, H, T, d), `now` the current contexts c (B, T, C): read with `read_current`.
        """
        found = self.output(mixed.transpose(1, 2).flatten(2))
        if self.read is not None:
            assert now is not None
            found = found + self.read(now)
        both = embeddings + self.dropout(found)
        return both if self.residual == "pre" else self.norm(both)

    def slot_weights(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Mean attention weight (H, M) by head and slot, over all B·T positions."""
        query, key = self.split(self.ask(embeddings)), self.split(self.key(contexts))
        return slot_weights(query, key, self.intervals, self.max_contexts, self.selection, first)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TokenAttention(ContextAttention):
    """Ordinary causal attention over tokens with rotary positions: over all of them, or over the last `window`.

    Rotary positions are those of Su et al., "RoFormer" (2021). `deep` says that what is attended to is the output of a
    layer, which pre-norm normalises first; embeddings are normalised already. With `context_dim`, W c_t joins what was
    attended to, as in `ContextAttention`.
    """

    def __init__(
        self,
        embedding_dim: int,
        heads: int,
        window: int | None,
        dropout: float,
        norm: Norm = "post",
        deep: bool = False,
        context_dim: int | None = None,
    ) -> None:
        super().__init__(embedding_dim, embedding_dim, heads, 1, window or 1, dropout, norm=norm)
        self.read = None if context_dim is None else nn.Linear(context_dim, embedding_dim)
        if embedding_dim // heads % 2:
            raise ValueError(f"heads={heads} must leave an even number of dimensions to each head of {embedding_dim}")
        self.window, self.normalises = window, deep and norm == "pre"

    def forward(
        self, embeddings: Tensor, memory: Tensor, first: Tensor | None = None, direct: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) from embeddings (B, T, D), the memory (B, S+T, D) of all, and, if read, contexts (B, ≥T, C)."""
        now = None
        if self.read is not None:
            assert direct is not None
            now = direct[:, direct.shape[1] - embeddings.shape[1] :]
        attended = self.attended(memory)
        query, key, value = (self.split(x) for x in (self.ask(embeddings), self.key(attended), self.value(attended)))
        positions = torch.arange(key.shape[2], device=key.device)
        query, key = rotated(query, positions[-query.shape[2] :]), rotated(key, positions)
        if self.window is None:
            return self.combine(embeddings, causal_attention(query, key, value, first), now)
        return self.combine(embeddings, strided_attention(query, key, value, 1, self.window, first), now)

    def attended(self, memory: Tensor) -> Tensor:
        """What keys and values are made of, given what is attended to (B, n, D)."""
        return self.norm(memory) if self.normalises else memory


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotates the pairs (j, j + d/2) of vectors (..., T, d) by angles that grow with their positions (T,)."""
    half = x.shape[-1] // 2
    rates = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * rates  # in fp64: far along the text, fp32 would blur them
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    """Attention (B, H, T, d) of query i, at key S+i, over all keys up to its own, from `first[b]` on.

    Queries before that, which are history to a deeper layer, read themselves: of nothing there is no mean.
    """
    T, keys = query.shape[2], key.shape[2]
    past = torch.ones(T, keys, dtype=torch.bool, device=query.device)
    mask = past.tril(keys - T)
    if first is not None:
        exists = torch.arange(keys, device=query.device) >= first.view(-1, 1, 1, 1)
        mask = mask & (exists | past.triu(keys - T))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class FeedForward(nn.Module):
    """h + LayerNorm(W_2 GELU(W_1 h)), or, if `norm` is "pre", h + dropout(W_2 GELU(W_1 LayerNorm(h))), on (..., D)."""

    def __init__(self, embedding_dim: int, ffn_dim: int, norm: Norm = "post", dropout: float = 0.0) -> None:
        super().__init__()
        self.residual = norm
        self.up = nn.Linear(embedding_dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = nn.Dropout(dropout)
        if norm == "pre":
            nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.residual == "pre":
            return hidden + self.dropout(self.down(F.gelu(self.up(self.norm(hidden)))))
        return hidden + self.norm(self.down(F.gelu(self.up(hidden))))


class Layer(nn.Module):
    """A layer after the first: attention, then the feed-forward layer."""

    def __init__(self, attention: ContextAttention, ffn: FeedForward) -> None:
        super().__init__()
        self.attention, self.ffn = attention, ffn


def local_reach(layers: Sequence[Any]) -> int:
    """Positions before a token's own that its state depends on, through layers that attend to a window of tokens."""
    parts = (layer.attention for layer in layers)
    return sum(part.window - 1 for part in parts if isinstance(part, TokenAttention) and part.window)
