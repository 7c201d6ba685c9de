"""The language model: attention over stored contexts, a feed-forward layer, a tied head.

    h = LayerNorm(e + dropout(W_o attend(W_q e, W_k c, W_v c)))
    h = h + LayerNorm(W_2 GELU(W_1 h))
    logits = h Eᵀ

Embedding, its norm and the encoder are frozen: they stand here so that a checkpoint is a whole model. The model
never runs the encoder while training; the contexts come from the store. What may be added is a `Recipe`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.lm.attention import Selection
from ctxkv_lightning.lm.head import frozen_cross_entropy, score
from ctxkv_lightning.lm.layers import ContextAttention, FeedForward, Layer, TokenAttention, local_reach
from ctxkv_lightning.lm.output import Asked, Output
from ctxkv_lightning.lm.pretrained import PretrainedModule
from ctxkv_lightning.lm.recipe import Recipe
from ctxkv_lightning.text.ngram import KneserNeyTrigram

UNSEEN = 0.1
"""Added to every token's count where a bias starts from counts."""


class TiedLM(PretrainedModule):
    """What all models share: normalised embeddings, the head tied to them, and frozen encoders if any.

    A subclass has `forward(embeddings, memory, first) -> (B, T, D)`: final hidden states from normalised embeddings
    (B, T, D) and a memory (B, S+T, ·) that begins with S ≥ 0 positions of history, contexts or embeddings; row b's
    memory before index `first[b]` does not exist. One that reads embeddings and, beside them, the current context is
    given the contexts (B, S+T, C) too, as `direct`. `recipe` holds the fields of a `Recipe` that are not its defaults.
    """

    reads_tokens: ClassVar[bool] = False
    """Whether attention reads the embeddings of the history, not its contexts."""

    lead: int = 0
    """Positions before those asked for that go through `forward` with them, where history has so many."""

    def __init__(
        self, vocab_size: int, embedding_dim: int, context_dim: int = 0, recipe: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.recipe = Recipe(**(recipe or {}))
        self.embedding = nn.Embedding(vocab_size, embedding_dim).requires_grad_(False)
        self.embedding_norm = nn.LayerNorm(embedding_dim).requires_grad_(False)
        self.embedding_dropout = nn.Dropout(self.recipe.embedding_dropout)
        self.context_dropout = nn.Dropout(self.recipe.context_dropout)
        self.trained_embedding = nn.Embedding(vocab_size, embedding_dim) if self.recipe.train_embedding else None
        self.deeper = nn.ModuleList()
        plain = self.recipe.plain_head
        self.output = None if plain else Output(vocab_size, embedding_dim, context_dim, self.recipe)

    @property
    def layers(self) -> tuple[Any, ...]:
        """The first layer, whose parts are the model's own, and the deeper ones, which have parts of the same names."""
        return (self, *self.deeper)

    def encoders(self) -> list[ContextEncoder]:
        """The frozen encoders, in the order in which their contexts stand side by side in the memory."""
        return [part for part in self.modules() if isinstance(part, ContextEncoder)]

    def load_frozen(self, table: Tensor, encoders: Sequence[ContextEncoder]) -> None:
        """Copies the embedding table E (V, D) and Phase 1's encoders."""
        self.embedding.weight.data.copy_(table)
        for own, trained in zip(self.encoders(), encoders, strict=True):
            own.load_state_dict(trained.state_dict())

    def load_counts(self, trigram: KneserNeyTrigram) -> None:
        """Takes what was counted in the training text, where the recipe has a voice for it."""
        if self.output is not None and self.output.ngram is not None:
            self.output.ngram.fill(trigram)

    def load_start(self, counts: Tensor) -> None:
        """What training starts from: a trained table from the frozen one, an output's bias from unigram counts (V,)."""
        if self.trained_embedding is not None:  # rows of norm 1 on average, so that one learning rate suits any table
            table = self.embedding.weight
            self.trained_embedding.weight.data.copy_(table / table.norm(dim=1).mean())
        if self.output is not None and self.output.bias.requires_grad:
            smoothed = counts + UNSEEN
            self.output.bias.data.copy_((smoothed / smoothed.sum()).log())

    def learnt_at_first(self) -> list[nn.Parameter]:
        """The parameters that learn in the first epoch alone."""
        if self.output is None or self.output.gate is None or not self.output.apart:
            return []
        return list(self.output.gate.parameters())

    @property
    def table(self) -> Tensor:
        """E (V, D) of the head and of `embed`."""
        return (self.embedding if self.trained_embedding is None else self.trained_embedding).weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings e = LayerNorm(E[x]), (...,) -> (..., D)."""
        return self.embedding_norm(nn.functional.embedding(tokens, self.table))

    def encoder_input(self, tokens: Tensor) -> Tensor:
        """What the encoders read, LayerNorm of the frozen table's rows, (...,) -> (..., D)."""
        return self.embedding_norm(self.embedding(tokens))

    def dropped(self, memory: Tensor) -> Tensor:
        """The memory as a training step reads it: contexts with dropout, embeddings as they are."""
        return self.context_dropout(memory) if self.encoders() else memory

    def states(
        self, tokens: Tensor, memory: Tensor, T: int, first: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (B, T, D) of the last T of the tokens (B, S+T), with the memory (B, S+T, ·) of all.

        `embeddings` (B, T, D), normalised rows of the frozen table, save looking them up where they are what is read.
        """
        own = self.recipe.reads_contexts or self.recipe.embedding_dropout  # the memory given is contexts, or undropped
        looks_up = self.recipe.train_embedding or (self.reads_tokens and own)
        if looks_up and self.reads_tokens:
            embeddings = self.embedding_dropout(self.embed(tokens))
            direct = {"direct": memory} if self.recipe.read_current else {}
            return self(embeddings[:, embeddings.shape[1] - T :], embeddings, first, **direct)
        lead = min(self.lead, memory.shape[1] - T)
        if looks_up or lead or embeddings is None:
            embeddings = self.embed(tokens[:, tokens.shape[1] - T - lead :])
        return self(self.embedding_dropout(embeddings), memory, first)[:, lead:]

    def loss(self, hidden: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """What is to be minimised, summed, and losses (n,) in nats, of the positions that count in states (B, T, D)."""
        if self.output is not None:
            return self.output.loss(hidden, self.table, asked)
        flat, counted, targets = hidden.flatten(0, 1), asked.counted, asked.targets
        nll = frozen_cross_entropy(flat if counted is None else flat[counted], self.table, targets)
        return nll.sum(), nll.detach()

    @torch.no_grad()
    def score(self, hidden: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """Losses (n,) in nats, fp32, and whether the target was the likeliest token (n,); shapes as in `loss`."""
        memory, tokens, targets, counted, first, _ = asked
        if self.output is None:
            flat = hidden.flatten(0, 1)
            return score(flat if counted is None else flat[counted], self.table, targets)
        B, T = hidden.shape[:2]
        counted = torch.arange(B * T, device=hidden.device) if counted is None else counted
        following = targets.new_zeros(B * T).scatter(0, counted, targets).view(B, T)
        nll, hits = hidden.new_empty(B, T, dtype=torch.float32), torch.empty_like(following, dtype=torch.bool)
        for b in range(B):  # text by text: the rows of V numbers that are held at a time are those of a block
            one, begin = slice(b, b + 1), None if first is None else first[b : b + 1]
            for rows, log_p in self.output.log_probabilities(hidden[one], self.table, memory[one], tokens[one], begin):
                right = following[one, rows, None]
                nll[one, rows] = -log_p.gather(2, right)[..., 0]
                hits[one, rows] = log_p.argmax(dim=-1) == right[..., 0]
        return nll.flatten()[counted], hits.flatten()[counted]

    def logits(self, hidden: Tensor) -> Tensor:
        """The published head, (..., D) -> (..., V)."""
        return hidden @ self.table.T

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, trained, and by part."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        parts = {name: count for name, count in parts.items() if count}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": sum(parts.values()), "trainable": trainable, **parts}


class ContextKVLM(TiedLM):
    """The published model, with a choice of which contexts its heads read, of a recipe and of how many layers.

    All layers read the same contexts, so that what a decoder keeps of them does not depend on how many there are; or,
    with a `local_window`, those after the first attend to what the layer before them made of the last so many tokens.
    """

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
        recipe: dict[str, Any] | None = None,
        layers: int = 1,
        local_window: int | None = None,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, context_dim, recipe)
        norm, reads, D, C = self.recipe.norm, self.recipe.read_current, embedding_dim, context_dim

        def parts(local: int | None = None) -> tuple[ContextAttention, FeedForward]:
            if local is None:
                attention = ContextAttention(D, C, heads, interval, max_contexts, dropout, selection, norm, reads)
            else:
                attention = TokenAttention(D, heads, local, dropout, norm, deep=True)
            return attention, FeedForward(D, ffn_dim, norm, dropout if norm == "pre" else 0.0)

        self.encoder = ContextEncoder(context_dim, embedding_dim).requires_grad_(False)
        self.attention, self.ffn = parts()
        self.deeper.extend(Layer(*parts(local_window)) for _ in range(layers - 1))

    @property
    def alignment(self) -> int:
        """What the first embedding that `forward` gets must stand at a multiple of."""
        return math.lcm(*self.attention.intervals) if self.attention.selection == "grid" else 1

    @property
    def lead(self) -> int:  # type: ignore[override]
        """As many as windows of hidden states reach back together, up to a multiple of the alignment."""
        return -(-local_reach(self.layers) // self.alignment) * self.alignment

    @property
    def history(self) -> int:
        """Positions before those asked for whose contexts layers read."""
        return (self.attention.max_contexts - 1) * max(self.attention.intervals) + self.lead

    def forward(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) from embeddings (B, T, D) and contexts (B, S+T, C).

        With `selection="grid"`, the first embedding stands at a multiple of every interval.
        """
        hidden, before = embeddings, contexts.shape[1] - embeddings.shape[1]
        begin = None if first is None else (first - before).clamp_min(0)
        for layer in self.layers:
            local = isinstance(layer.attention, TokenAttention)
            memory = (hidden, begin) if local else (contexts, first)
            hidden = layer.ffn(layer.attention(hidden, *memory))
        return hidden

    def slot_weights(self, embeddings: Tensor, contexts: Tensor, first: Tensor | None = None) -> Tensor:
        """As `ContextAttention.slot_weights`, of the heads of all n layers that read contexts (n · H, M), in order."""
        hidden, found = embeddings, []
        reading = [layer for layer in self.layers if not isinstance(layer.attention, TokenAttention)]
        for number, layer in enumerate(reading):
            if number:
                hidden = reading[number - 1].ffn(reading[number - 1].attention(hidden, contexts, first))
            found.append(layer.attention.slot_weights(hidden, contexts, first))
        return torch.cat(found)
