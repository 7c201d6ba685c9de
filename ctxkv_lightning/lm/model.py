"""The language model: attention over stored contexts, a feed-forward layer, a tied head.

    h = LayerNorm(e + dropout(W_o attend(W_q e, W_k c, W_v c)))
    h = h + LayerNorm(W_2 GELU(W_1 h))
    logits = h Eᵀ

Embedding, its norm and the encoder are frozen: they stand here so that a checkpoint is a whole model. The model
never runs the encoder while training; the contexts come from the store.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.lm.attention import Selection, attend, slot_weights
from ctxkv_lightning.lm.pretrained import PretrainedModule


class TiedLM(PretrainedModule):
    """What all models share: frozen normalised embeddings, the head tied to them, and frozen encoders if any.

    A subclass has `forward(embeddings, memory, first) -> (B, T, D)`: final hidden states from normalised embeddings
    (B, T, D) and a memory (B, S+T, ·) that begins with S ≥ 0 positions of history, contexts or embeddings; row b's
    memory before index `first[b]` does not exist.
    """

    def __init__(self, vocab_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim).requires_grad_(False)
        self.embedding_norm = nn.LayerNorm(embedding_dim).requires_grad_(False)

    def encoders(self) -> list[ContextEncoder]:
        """The frozen encoders, in the order in which their contexts stand side by side in the memory."""
        return [part for part in self.modules() if isinstance(part, ContextEncoder)]

    def load_frozen(self, table: Tensor, encoders: Sequence[ContextEncoder]) -> None:
        """Copies the embedding table E (V, D) and Phase 1's encoders."""
        self.embedding.weight.data.copy_(table)
        for own, trained in zip(self.encoders(), encoders, strict=True):
            own.load_state_dict(trained.state_dict())

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


class ContextAttention(nn.Module):
    """Multi-head attention over selected contexts: queries from embeddings (D), keys and values from contexts (C).

    `interval` is one for all heads or a list of one for each.
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
    ) -> None:
        super().__init__()
        self.intervals = (interval,) * heads if isinstance(interval, int) else tuple(interval)
        if embedding_dim % heads or len(self.intervals) != heads:
            raise ValueError(f"heads={heads} does not divide embedding_dim={embedding_dim}, or interval={interval}")
        self.heads, self.max_contexts, self.selection = heads, max_contexts, selection
        self.head_dim = embedding_dim // heads
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(context_dim, embedding_dim)
        self.value = nn.Linear(context_dim, embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, T, D) from embeddings (B, T, D) and contexts (B, S+T, C), the first S of them history."""
        query, key, value = (self.split(x) for x in (self.query(embeddings), self.key(contexts), self.value(contexts)))
        mixed = attend(query, key, value, self.intervals, self.max_contexts, self.selection, first)
        return self.combine(embeddings, mixed)

    def combine(self, embeddings: Tensor, mixed: Tensor) -> Tensor:
        """LayerNorm(e + dropout(W_o mixed)), (B, T, D), of the heads' outputs (B, H, T, d)."""
        return self.norm(embeddings + self.dropout(self.output(mixed.transpose(1, 2).flatten(2))))

    def slot_weights(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Mean attention weight (H, M) by head and slot, over all B·T positions."""
        query, key = self.split(self.query(embeddings)), self.split(self.key(contexts))
        return slot_weights(query, key, self.intervals, self.max_contexts, self.selection, first)

    def split(self, x: Tensor) -> Tensor:
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


class ContextKVLM(TiedLM):
    """The published model, with a choice of which contexts its heads read."""

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 768,
        context_dim: int = 256,
        heads: int = 8,
        interval: int | Sequence[int] = 20,
        max_contexts: int = 32,
        ffn_dim: int = 3072,
        dropout: float = 0.1,
        selection: Selection = "strided",
    ) -> None:
        super().__init__(vocab_size, embedding_dim)
        self.encoder = ContextEncoder(context_dim, embedding_dim).requires_grad_(False)
        self.attention = ContextAttention(embedding_dim, context_dim, heads, interval, max_contexts, dropout, selection)
        self.ffn = FeedForward(embedding_dim, ffn_dim)

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) from embeddings (B, T, D) and contexts (B, S+T, C).

        With `selection="grid"`, the first embedding stands at a multiple of every interval.
        """
        return self.ffn(self.attention(embeddings, contexts, first))
