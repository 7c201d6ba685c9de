"""The language model: strided attention over stored contexts, a feed-forward layer, a tied head.

    h = LayerNorm(e + dropout(W_o attend(W_q e, W_k c, W_v c)))
    h = h + LayerNorm(W_2 GELU(W_1 h))
    logits = h Eᵀ

Embedding, its norm and the encoder are frozen: they stand here so that a checkpoint is a whole model. The model
never runs the encoder while training; the contexts come from the store.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.lm.attention import slot_weights, strided_attention


class ContextAttention(nn.Module):
    """Multi-head strided attention: queries from embeddings (D), keys and values from contexts (C)."""

    def __init__(
        self, embedding_dim: int, context_dim: int, heads: int, interval: int, max_contexts: int, dropout: float
    ) -> None:
        super().__init__()
        if embedding_dim % heads:
            raise ValueError(f"heads={heads} does not divide embedding_dim={embedding_dim}")
        self.heads, self.interval, self.max_contexts = heads, interval, max_contexts
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(context_dim, embedding_dim)
        self.value = nn.Linear(context_dim, embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, T, D) from embeddings (B, T, D) and contexts (B, S+T, C), the first S of them history."""
        query, key, value = (self._split(x) for x in (self.query(embeddings), self.key(contexts), self.value(contexts)))
        mixed = strided_attention(query, key, value, self.interval, self.max_contexts, first)
        attended = self.output(mixed.transpose(1, 2).flatten(2))
        return self.norm(embeddings + self.dropout(attended))

    def slot_weights(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Mean attention weight (H, M) by head and slot, over all B·T positions."""
        query, key = self._split(self.query(embeddings)), self._split(self.key(contexts))
        return slot_weights(query, key, self.interval, self.max_contexts, first)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """h + LayerNorm(W_2 GELU(W_1 h)), on (..., D)."""

    def __init__(self, embedding_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(embedding_dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.down(F.gelu(self.up(hidden))))


class ContextKVLM(nn.Module):
    """The published model. `table` (V, D) is the frozen embedding and the tied head."""

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 768,
        context_dim: int = 256,
        heads: int = 8,
        interval: int = 20,
        max_contexts: int = 32,
        ffn_dim: int = 3072,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim).requires_grad_(False)
        self.embedding_norm = nn.LayerNorm(embedding_dim).requires_grad_(False)
        self.encoder = ContextEncoder(context_dim, embedding_dim).requires_grad_(False)
        self.attention = ContextAttention(embedding_dim, context_dim, heads, interval, max_contexts, dropout)
        self.ffn = FeedForward(embedding_dim, ffn_dim)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D).

        `embeddings` (B, T, D) are normalised; `contexts` (B, S+T, C) begin with S ≥ 0 contexts of history;
        row b's contexts before index `first[b]` do not exist.
        """
        return self.ffn(self.attention(embeddings, contexts, first))

    def embed(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings e = LayerNorm(E[x]), (...,) -> (..., D)."""
        return self.embedding_norm(self.embedding(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return hidden @ self.embedding.weight.T

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, trained, and by part."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(parts.values()), "trainable": trainable, **parts}
