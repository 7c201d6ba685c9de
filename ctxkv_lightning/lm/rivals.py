"""The systems that the context model is compared with, behind the same interface.

Same frozen embedding, tied head and feed-forward layer; what differs is what is remembered. Those that attend to tokens
read the embeddings of the history as their memory, the others contexts.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.lm.attention import Selection
from ctxkv_lightning.lm.layers import FeedForward, Layer, TokenAttention
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM

ModelName = Literal["context_kv", "cascade", "transformer", "sliding_window", "recurrence"]


class TransformerLM(TiedLM):
    """A transformer, of one layer as it comes: causal attention over all tokens, or over the last `window` of them.

    Deeper layers attend to what the layer before them made of the history. The contexts, of `context_dim` numbers, are
    those that a recipe's pointer points at, or that the first layer reads beside its attention; without either there is
    no encoder.
    """

    reads_tokens = True

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        heads: int,
        ffn_dim: int,
        dropout: float,
        window: int | None = None,
        context_dim: int = 256,
        recipe: dict[str, Any] | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, context_dim, recipe)
        norm, read = self.recipe.norm, context_dim if self.recipe.read_current else None

        def parts(deep: bool) -> tuple[TokenAttention, FeedForward]:
            attention = TokenAttention(embedding_dim, heads, window, dropout, norm, deep, None if deep else read)
            return attention, FeedForward(embedding_dim, ffn_dim, norm, dropout if norm == "pre" else 0.0)

        if self.recipe.reads_contexts:
            self.encoder = ContextEncoder(context_dim, embedding_dim).requires_grad_(False)
        self.attention, self.ffn = parts(deep=False)
        self.deeper.extend(Layer(*parts(deep=True)) for _ in range(layers - 1))

    def forward(
        self, embeddings: Tensor, memory: Tensor, first: Tensor | None = None, direct: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (B, T, D); the memory (B, S+T, D) holds the embeddings of history and of now.

        Each layer before the last is one more window of history that has to be there. With `read_current`,
        the contexts `direct` (B, S+T, C) are read.
        """
        hidden = memory
        for layer in self.layers[:-1]:
            hidden = layer.ffn(layer.attention(hidden, hidden, first, direct))
        last = self.layers[-1]
        now = hidden[:, -embeddings.shape[1] :] if self.deeper else embeddings
        return last.ffn(last.attention(now, hidden, first, direct))


class Reading(nn.Module):
    """A layer of `RecurrenceLM` after the first."""

    def __init__(self, read: nn.Linear, dropout: nn.Dropout, norm: nn.Module, ffn: FeedForward) -> None:
        super().__init__()
        self.read, self.dropout, self.norm, self.ffn = read, dropout, norm, ffn


class RecurrenceLM(TiedLM):
    """The current context alone: h = LayerNorm(e + dropout(W c)), then the feed-forward layer; no norm if pre-norm.

    Deeper layers do the same, each with a W of its own.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        context_dim: int,
        ffn_dim: int,
        dropout: float,
        recipe: dict[str, Any] | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, context_dim, recipe)
        norm = self.recipe.norm

        def parts() -> tuple[nn.Linear, nn.Dropout, nn.Module, FeedForward]:
            read, dropped = nn.Linear(context_dim, embedding_dim), nn.Dropout(dropout)
            normalised = nn.LayerNorm(embedding_dim) if norm == "post" else nn.Identity()
            ffn = FeedForward(embedding_dim, ffn_dim, norm, dropout if norm == "pre" else 0.0)
            return read, dropped, normalised, ffn

        self.encoder = ContextEncoder(context_dim, embedding_dim).requires_grad_(False)
        self.read, self.dropout, self.norm, self.ffn = parts()
        self.deeper.extend(Reading(*parts()) for _ in range(layers - 1))

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) from embeddings (B, T, D) and the last T of the contexts (B, S+T, C)."""
        hidden, now = embeddings, contexts[:, contexts.shape[1] - embeddings.shape[1] :]
        for layer in self.layers:
            hidden = layer.ffn(layer.norm(hidden + layer.dropout(layer.read(now))))
        return hidden


class CascadeLM(TiedLM):
    """The 2-Block Cascade: LayerNorm(e + GELU(W [c¹; c²; e] + b)), each encoder trained on its half of the text."""

    def __init__(self, vocab_size: int, embedding_dim: int, context_dim: int) -> None:
        super().__init__(vocab_size, embedding_dim)
        self.blocks = nn.ModuleList(ContextEncoder(context_dim, embedding_dim).requires_grad_(False) for _ in range(2))
        self.token_layer = nn.Linear(2 * context_dim + embedding_dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) from embeddings (B, T, D) and both contexts side by side (B, S+T, 2C)."""
        now = contexts[:, contexts.shape[1] - embeddings.shape[1] :]
        return self.norm(embeddings + F.gelu(self.token_layer(torch.cat([now, embeddings], dim=-1))))


def build_model(
    name: ModelName,
    vocab_size: int,
    embedding_dim: int,
    context_dim: int,
    heads: int,
    interval: int | Sequence[int],
    max_contexts: int,
    ffn_dim: int,
    dropout: float,
    selection: Selection,
    window_tokens: int,
    recipe: dict[str, Any] | None = None,
    layers: int = 1,
    local_window: int | None = None,
) -> TiedLM:
    """The model of this name; each takes what it reads. Raises ValueError for a name that is none of `ModelName`."""
    V, D, C = vocab_size, embedding_dim, context_dim
    match name:
        case "context_kv":
            reads = (heads, interval, max_contexts)
            return ContextKVLM(V, D, C, *reads, ffn_dim, dropout, selection, recipe, layers, local_window)
        case "cascade":
            if recipe:
                raise ValueError("the cascade takes no recipe")
            return CascadeLM(V, D, C)
        case "recurrence":
            return RecurrenceLM(V, D, C, ffn_dim, dropout, recipe, layers)
        case "transformer":
            return TransformerLM(V, D, heads, ffn_dim, dropout, None, C, recipe, layers)
        case "sliding_window":
            return TransformerLM(V, D, heads, ffn_dim, dropout, window_tokens, C, recipe, layers)
    raise ValueError(f"there is no model '{name}'")
