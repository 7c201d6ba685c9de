"""From final states to probabilities where a `Recipe` adds to the tied head: norm, projection, bias, pointer."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctxkv_lightning.lm.head import mixed_cross_entropy
from ctxkv_lightning.lm.pointer import BLOCK, CachePointer, Pointed
from ctxkv_lightning.lm.recipe import Recipe


class Asked(NamedTuple):
    """What a loss needs besides final states (B, T, D); memory and tokens begin with S positions of history."""

    memory: Tensor  # (B, S+T, C)
    tokens: Tensor  # (B, S+T)
    targets: Tensor  # (n,), what follows each position that counts
    counted: Tensor | None  # (n,), which of the B·T positions count; None when all do
    first: Tensor | None  # (B,), index of a row's first existing position of memory; None when all exist


class Output(nn.Module):
    """p(w) = g_0 softmax(E (W dropout(z)) + b)[w] + what the pointer adds, z the (pre-norm: normalised) final state.

    `table` is E (V, D), which the caller keeps. Without a projection W is the identity and b is 0; without a pointer
    g_0 is 1.
    """

    def __init__(self, vocab_size: int, embedding_dim: int, context_dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding_dim) if recipe.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.projection = nn.Linear(embedding_dim, embedding_dim, bias=False) if recipe.projection else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(vocab_size), requires_grad=recipe.projection)
        self.pointer: CachePointer | None = None
        if isinstance(self.projection, nn.Linear):
            nn.init.zeros_(self.projection.weight)
        if recipe.pointer_heads:
            dim, window = recipe.pointer_dim, recipe.pointer_window
            self.pointer = CachePointer(
                embedding_dim, context_dim, recipe.pointer_heads, dim, window, recipe.pointer_values
            )

    def loss(self, hidden: Tensor, table: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """Summed loss, and its parts (n,), of the positions that count among final states (B, T, D)."""
        memory, tokens, targets, counted, first = asked
        state = self.norm(hidden)
        share = mass = state.new_zeros(state.shape[:2], dtype=torch.float32)
        if self.pointer is not None:
            places = hidden.shape[:2]
            following = targets if counted is None else targets.new_zeros(places.numel()).scatter(0, counted, targets)
            parts = self.pointer.blocks(state, memory, tokens, first, table)
            state, share, mass = self._pointed_mass(parts, following.view(places))
        wanted = self.projection(self.dropout(state)).flatten(0, 1)
        flat = [x if counted is None else x[counted] for x in (wanted, share.flatten(), mass.flatten())]
        return mixed_cross_entropy(flat[0], table, self.bias, targets, flat[1], flat[2])

    def log_probabilities(
        self, hidden: Tensor, table: Tensor, memory: Tensor, tokens: Tensor, first: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """log p (B, n, V), fp32, of what follows each position, n at most `BLOCK`; shapes as in `Asked`."""
        state = self.norm(hidden)
        if self.pointer is None:
            for start in range(0, hidden.shape[1], BLOCK):
                rows = slice(start, min(hidden.shape[1], start + BLOCK))
                yield rows, self.own(state[:, rows], table)
            return
        for part in self.pointer.blocks(state, memory, tokens, first, table):
            yield part.rows, self.mixed(part, table)

    def mixed(self, part: Pointed, table: Tensor) -> Tensor:
        """log p (B, n, V) of the head and of what is pointed at."""
        own, shares = self.own(part.state, table), part.gates.exp()
        weights = (shares[..., 1:].transpose(1, 2)[..., None] * part.weights).sum(dim=1)
        followers = part.followers[:, None].expand_as(weights)
        pointed = torch.zeros_like(own).scatter_add(2, followers, weights)
        own, pointed = part.gates[..., :1] + own, pointed.log()
        largest = torch.maximum(own, pointed)  # torch.logaddexp rounds the last elements of a tensor in another way
        return largest + ((own - largest).exp() + (pointed - largest).exp()).log()

    def own(self, state: Tensor, table: Tensor) -> Tensor:
        """The head's own log p (..., V), fp32, from normalised final states (..., D)."""
        wanted = self.projection(state)
        return torch.log_softmax((wanted @ table.to(wanted.dtype).T).float() + self.bias, dim=-1)

    def _pointed_mass(self, parts: Iterator[Pointed], following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, T, D), log g_0 (B, T), and the probability with which the token that does follow is pointed at."""
        states, shares, masses = [], [], []
        for part in parts:
            right = part.followers[:, None] == following[:, part.rows, None]
            mass = (part.weights * right[:, None]).sum(dim=-1).transpose(1, 2)
            states.append(part.state)
            shares.append(part.gates[..., 0])
            masses.append((part.gates[..., 1:].exp() * mass).sum(dim=-1))
        return torch.cat(states, dim=1), torch.cat(shares, dim=1), torch.cat(masses, dim=1)
