"""The published method, faithfully slow: the baseline that speed and perplexity are compared with.

Every position gathers its own M contexts and projects each of them to a key and a value; the logits are one
N×V matrix in fp32; positions are shuffled, 8,880 to a step; contexts come from fixed-point sweeps. It
computes the same function as `ContextKVLM`: a test loads the same weights into both. It shares
data, embedding table, encoder and seed with ours, and no code of the hot path.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.windows import Stream

STEP = 8880
SWEEPS = 40
"""Sweeps that bring the contexts within 1e-3; the published experiment stopped after 3 on validation data."""


class Split(NamedTuple):
    """One stream, a row per token."""

    tokens: Tensor  # (N,)
    embeddings: Tensor  # (N, D), normalised
    contexts: Tensor  # (N, C)

    @classmethod
    def of(cls, stream: Stream, contexts: Tensor | None = None) -> "Split":
        """A stored stream, copied out of its memory map; with other contexts, if given."""
        own = stream.contexts[0].float().clone() if contexts is None else contexts
        return cls(stream.tokens, stream.embeddings[stream.rows], own)


class PublishedAttention(nn.Module):
    """Softmax attention of each position over its own gathered contexts."""

    def __init__(self, D: int, C: int, heads: int, interval: int, max_contexts: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.interval, self.max_contexts = heads, interval, max_contexts
        self.query, self.output = nn.Linear(D, D), nn.Linear(D, D)
        self.key, self.value = nn.Linear(C, D), nn.Linear(C, D)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(D)

    def forward(self, embeddings: Tensor, contexts: Tensor, positions: Tensor) -> Tensor:
        """(n, D) for n positions of a stream of embeddings (N, D) and contexts (N, C)."""
        slots = positions[:, None] - torch.arange(self.max_contexts, device=positions.device) * self.interval
        gathered = contexts[slots.clamp_min(0)]  # (n, M, C)
        own = embeddings[positions]
        query = self.query(own).view(len(own), self.heads, 1, -1)
        key, value = (
            layer(gathered).view(len(own), self.max_contexts, self.heads, -1).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill((slots < 0)[:, None, None], -math.inf)
        mixed = (scores.softmax(dim=-1) @ value).flatten(1)
        return self.norm(own + self.dropout(self.output(mixed)))


class PublishedFeedForward(nn.Module):
    """h + LayerNorm(W_2 GELU(W_1 h))."""

    def __init__(self, D: int, ffn_dim: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(D, ffn_dim), nn.Linear(ffn_dim, D), nn.LayerNorm(D)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.down(F.gelu(self.up(hidden))))


class PublishedLM(nn.Module):
    """The model, on shuffled positions of a stream; its parameters have the names of `ContextKVLM`'s."""

    def __init__(
        self,
        table: Tensor,
        context_dim: int = 256,
        heads: int = 8,
        interval: int = 20,
        max_contexts: int = 32,
        ffn_dim: int = 3072,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        D = table.shape[1]
        self.embedding = nn.Embedding.from_pretrained(table, freeze=True)
        self.attention = PublishedAttention(D, context_dim, heads, interval, max_contexts, dropout)
        self.ffn = PublishedFeedForward(D, ffn_dim)

    def copy_from(self, model: nn.Module) -> "PublishedLM":
        """Takes the weights of a `ContextKVLM`; what is missing or has another shape is an error."""
        weights = model.state_dict()
        self.load_state_dict({name: weights[name] for name in self.state_dict()})
        return self

    def hidden(self, split: Split, positions: Tensor) -> Tensor:
        """Final hidden states (n, D)."""
        return self.ffn(self.attention(split.embeddings, split.contexts, positions))

    def forward(self, split: Split, positions: Tensor) -> Tensor:
        """Logits (n, V)."""
        return self.hidden(split, positions) @ self.embedding.weight.T


@torch.no_grad()
def published_contexts(encoder: ContextEncoder, embeddings: Tensor, sweeps: int, batch: int = 5000) -> Tensor:
    """Contexts (N, C) after `sweeps` Jacobi sweeps: all positions from the sweep before, shifted right by one."""
    generator = torch.Generator().manual_seed(42)
    contexts = torch.randn(len(embeddings), encoder.context_dim, generator=generator) * 0.01
    for _ in range(sweeps):
        shifted = torch.cat([torch.zeros(1, encoder.context_dim), contexts[:-1]])
        parts = zip(shifted.split(batch), embeddings.split(batch), strict=True)
        contexts = torch.cat([_step(encoder, previous, embedding) for previous, embedding in parts])
    return contexts


def _step(encoder: ContextEncoder, context: Tensor, embedding: Tensor) -> Tensor:
    joined = torch.cat([context, embedding], dim=-1)
    hidden = F.linear(joined, encoder.linear.weight, encoder.linear.bias)
    return encoder.norm(context + F.gelu(hidden))


def make_optimizer(model: PublishedLM) -> torch.optim.Optimizer:
    """AdamW at lr 1e-3 on what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train_step(model: PublishedLM, optimizer: torch.optim.Optimizer, split: Split, positions: Tensor) -> float:
    """One update on these positions (n,); their mean loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(split, positions), split.tokens[positions + 1])
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: PublishedLM, split: Split, batch: int = STEP) -> tuple[float, float]:
    """Perplexity and accuracy over a whole stream, without dropout."""
    model.eval()
    total, hits, positions = 0.0, 0, len(split.tokens) - 1
    for chosen in torch.arange(positions).split(batch):
        logits, targets = model(split, chosen), split.tokens[chosen + 1]
        total += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
        hits += int((logits.argmax(dim=-1) == targets).sum())
    model.train()
    return math.exp(total / positions), hits / positions


def train_published(
    model: PublishedLM,
    train: Split,
    validation: Split,
    *,
    batch: int = STEP,
    patience: int = 3,
    max_epochs: int = 40,
    budget: float = math.inf,
    seed: int = 42,
) -> Iterator[dict[str, float]]:
    """Trains epoch by epoch and yields the numbers of each.

    Ends when `patience` epochs brought no better validation PPL, or when one more epoch like the last would
    pass `budget` seconds; one epoch is always made.
    """
    optimizer, started = make_optimizer(model), time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    best, waited = math.inf, 0
    for epoch in range(1, max_epochs + 1):
        began = time.perf_counter()
        order = torch.randperm(len(train.tokens) - 1, generator=generator).split(batch)
        loss = sum(train_step(model, optimizer, train, chosen) * len(chosen) for chosen in order)
        trained = time.perf_counter()
        val_ppl, val_accuracy = evaluate(model, validation, batch)
        ended = time.perf_counter()
        positions = len(train.tokens) - 1
        yield {
            "epoch": epoch,
            "train_ppl": math.exp(loss / positions),
            "val_ppl": val_ppl,
            "val_accuracy": val_accuracy,
            "seconds": ended - began,
            "tokens_per_second": positions / (trained - began),
        }
        waited = 0 if val_ppl < best else waited + 1
        best = min(best, val_ppl)
        if waited == patience or ended - started + (ended - began) > budget:
            return


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains the published method on the default data and tells its curve."""
    from benchmarks.experiment import default, published_run, temporary_experiment
    from benchmarks.harness import parse, parser, save

    made = parser(__doc__)
    made.add_argument("--budget", type=float, default=math.inf, help="seconds after which no epoch is begun")
    made.add_argument("--sweeps", type=int, default=SWEEPS, help="fixed-point sweeps of both streams")
    options = parse(made, argv)
    with temporary_experiment(default(options.quick)) as prepared:
        result = published_run(prepared, options.sweeps, options.budget, 2 if options.quick else 40)
    rows = [["epoch", "train PPL", "val PPL", "accuracy", "seconds"]]
    rows += [
        [
            f"{r['epoch']}",
            f"{r['train_ppl']:.1f}",
            f"{r['val_ppl']:.1f}",
            f"{r['val_accuracy']:.1%}",
            f"{r['seconds']:.1f}",
        ]
        for r in result["epochs"]
    ]
    save("published", result, rows, options)
    return result


if __name__ == "__main__":
    main()
