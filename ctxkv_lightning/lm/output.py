"""From final states to probabilities where a `Recipe` adds to the tied head: norm, projection, bias, other voices.

    p(w | t) = g_0 softmax(E (W dropout(z)) + b)[w] + Σ_h g_h p_h(w | t) + g_n p_n(w | x_{t-1} x_t)

p_h are the heads of a `CachePointer`, p_n is an `NgramExpert`; z is the (pre-norm: normalised) final state. Without a
projection W is the identity and b is 0; without other voices g_0 is 1.

Learnt jointly, by -log p, the head need not know what another voice knows, and the shares learn to trust a head that
has seen the text before: on new text it is trusted too much. Learnt `apart`, the loss is -log p_0 - log p. Its second
part holds p_0 and the state that the gate reads fixed, so that it teaches the shares and the pointer, and the network
only through the pointer's queries; and the gate learns in the first epoch alone, while every text is new (a run that
starts from the weights of one on the same text has no such epoch). So does who mixes a language model with a cache
afterwards (Grave, Joulin & Usunier, 2017; Khandelwal et al., 2020), but by position, and without a held-out text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.lm.head import mixed_cross_entropy
from ctxkv_lightning.lm.ngram import NgramExpert
from ctxkv_lightning.lm.pointer import BLOCK, CachePointer, Pointed
from ctxkv_lightning.lm.recipe import Recipe

EVIDENCE_SCALE = 0.1
"""Brings a pointer's log-sum-exps, which are tens, to the size of what else the gate reads."""

EVIDENCE_FLOOR = -20.0
"""Of a log-sum-exp as the gate reads it: what a query without any past has."""


class Asked(NamedTuple):
    """What a loss needs besides final states (B, T, D); memory and tokens begin with S positions of history."""

    memory: Tensor  # (B, S+T, C)
    tokens: Tensor  # (B, S+T)
    targets: Tensor  # (n,), what follows each position that counts
    counted: Tensor | None  # (n,), which of the B·T positions count; None when all do
    first: Tensor | None  # (B,), index of a row's first existing position of memory; None when all exist
    ngram: Tensor | None = None  # (B, T, 3), as `text.ngram.held_out`; read by a loss alone


class Counted(NamedTuple):
    """What an `NgramExpert` says of positions (B, n)."""

    p: Tensor  # (B, n, V)
    left: Tensor  # (B, n, 2), what its two higher orders leave to the one below


class Gate(nn.Module):
    """The voices' shares, g = softmax(W_g [LayerNorm(z'); what each voice knows] + b_g): the model, heads, counts.

    z' is the final state with what a pointer read. A pointer knows log Σ_i exp(…), of which a tenth is read, and -20 at
    least; counts know how much their higher orders leave to the lower. The learned mixture of Merity et al.'s pointer
    sentinel (2017); W_g starts at 0, the model's own share the largest.
    """

    def __init__(self, embedding_dim: int, heads: int, ngram: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(embedding_dim)
        self.linear = nn.Linear(embedding_dim + heads + 2 * ngram, 1 + heads + ngram)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.ones_(self.linear.bias[:1])

    def forward(self, state: Tensor, pointed: Pointed | None, left: Tensor | None) -> Tensor:
        """log g (B, n, 1 + P + ngram), fp32, from states (B, n, D); a pointer without any past has no share."""
        read = [self.norm(state)]
        if pointed is not None:
            read.append((pointed.evidence.clamp_min(EVIDENCE_FLOOR) * EVIDENCE_SCALE).to(state.dtype))
        if left is not None:
            read.append(left.to(state.dtype))
        gates = self.linear(torch.cat(read, dim=-1)).float()
        if pointed is not None:
            voice = torch.arange(gates.shape[-1], device=gates.device)
            gates = torch.where((voice > 0) & (voice <= self.heads), gates + pointed.trust, gates)
        return gates.log_softmax(dim=-1)


class Output(nn.Module):
    """p of the module's formula; `table` is E (V, D), which the caller keeps."""

    def __init__(self, vocab_size: int, embedding_dim: int, context_dim: int, recipe: Recipe) -> None:
        super().__init__()
        heads = recipe.pointer_heads
        self.norm = nn.LayerNorm(embedding_dim) if recipe.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.projection = nn.Linear(embedding_dim, embedding_dim, bias=False) if recipe.projection else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(vocab_size), requires_grad=recipe.projection)
        self.pointer: CachePointer | None = None
        self.ngram = NgramExpert(vocab_size) if recipe.ngram else None
        self.gate = Gate(embedding_dim, heads, recipe.ngram) if heads or recipe.ngram else None
        self.apart = recipe.apart and self.gate is not None
        if isinstance(self.projection, nn.Linear):
            nn.init.zeros_(self.projection.weight)
        if heads:
            dim, window = recipe.pointer_dim, recipe.pointer_window
            self.pointer = CachePointer(embedding_dim, context_dim, heads, dim, window, recipe.pointer_values)

    def loss(self, hidden: Tensor, table: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """What is to be minimised, summed, and -log p (n,) of the positions that count among states (B, T, D)."""
        state, targets, counted = self.norm(hidden), asked.targets, asked.counted
        share = mass = state.new_zeros(state.shape[:2], dtype=torch.float32)
        if self.gate is not None:
            state, share, mass = self._other_voices(self.gate, state, table, asked)
        wanted = self.projection(self.dropout(state)).flatten(0, 1)
        flat = [x if counted is None else x[counted] for x in (wanted, share.flatten(), mass.flatten())]
        if not self.apart:
            return mixed_cross_entropy(flat[0], table, self.bias, targets, flat[1], flat[2])
        silent = torch.zeros_like(flat[1])
        alone, own = mixed_cross_entropy(flat[0], table, self.bias, targets, silent, silent)
        nll = -torch.logaddexp(flat[1] - own, _log(flat[2]))
        return alone + nll.sum(), nll.detach()

    def log_probabilities(
        self, hidden: Tensor, table: Tensor, memory: Tensor, tokens: Tensor, first: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """log p (B, n, V), fp32, of what follows each position, n at most `BLOCK`; shapes as in `Asked`."""
        T = hidden.shape[1]
        own, before = tokens[:, tokens.shape[1] - T :], self._before(tokens, T, first)
        for rows, state, pointed in self._parts(self.norm(hidden), table, memory, tokens, first):
            yield rows, self.mixed(state, table, pointed, self.count(before[:, rows], own[:, rows]))

    def mixed(self, state: Tensor, table: Tensor, pointed: Pointed | None, counted: Counted | None) -> Tensor:
        """log p (B, n, V) of normalised final states (B, n, D) and of the other voices."""
        own = self.own(state, table)
        if self.gate is None:
            return own
        gates, others = self.gate(state, pointed, None if counted is None else counted.left), torch.zeros_like(own)
        if pointed is not None:
            shares = gates[..., 1 : 1 + self.gate.heads].exp()
            weights = (shares.transpose(1, 2)[..., None] * pointed.weights).sum(dim=1)
            others.scatter_add_(2, pointed.followers[:, None].expand_as(weights), weights)
        if counted is not None:
            others += gates[..., -1:].exp() * counted.p
        own, voices = gates[..., :1] + own, others.log()
        largest = torch.maximum(own, voices)  # torch.logaddexp rounds the last elements of a tensor in another way
        return largest + ((own - largest).exp() + (voices - largest).exp()).log()

    def own(self, state: Tensor, table: Tensor) -> Tensor:
        """The head's own log p (..., V), fp32, from normalised final states (..., D)."""
        wanted = self.projection(state)
        return torch.log_softmax((wanted @ table.to(wanted.dtype).T).float() + self.bias, dim=-1)

    def count(self, before: Tensor, tokens: Tensor) -> Counted | None:
        """What counts say after tokens (B, n) and those before them; None where nothing was counted."""
        if self.ngram is None:
            return None
        p, left = self.ngram(before.flatten(), tokens.flatten())
        return Counted(p.unflatten(0, tokens.shape), left.unflatten(0, tokens.shape))

    def _other_voices(self, gate: Gate, state: Tensor, table: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, T, D) with what was read, log g_0 (B, T), and the probability (B, T) that other voices give."""
        following, states, shares, masses = self._following(state, asked), [], [], []
        for rows, part, pointed in self._parts(state, table, asked.memory, asked.tokens, asked.first):
            said = None if asked.ngram is None or self.ngram is None else asked.ngram[:, rows]
            gates = gate(part.detach() if self.apart else part, pointed, None if said is None else said[..., 1:])
            mass = torch.zeros_like(gates[..., 0])
            if pointed is not None:
                right = pointed.followers[:, None] == following[:, rows, None]
                found = (pointed.weights * right[:, None]).sum(dim=-1).transpose(1, 2)
                mass = mass + (gates[..., 1 : 1 + gate.heads].exp() * found).sum(dim=-1)
            if said is not None:
                mass = mass + gates[..., -1].exp() * said[..., 0]
            states.append(part)
            shares.append(gates[..., 0])
            masses.append(mass)
        return torch.cat(states, dim=1), torch.cat(shares, dim=1), torch.cat(masses, dim=1)

    def _following(self, state: Tensor, asked: Asked) -> Tensor:
        """What follows each position (B, T), 0 where it does not count."""
        places, targets = state.shape[:2], asked.targets
        if asked.counted is None:
            return targets.view(places)
        return targets.new_zeros(places.numel()).scatter(0, asked.counted, targets).view(places)

    def _parts(
        self, state: Tensor, table: Tensor, memory: Tensor, tokens: Tensor, first: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Pointed | None]]:
        """Block by block: which positions, their states (B, n, D) with what was read, and what is pointed at."""
        if self.pointer is not None:
            for part in self.pointer.blocks(state, memory, tokens, first, table):
                yield part.rows, part.state, part
            return
        for start in range(0, state.shape[1], BLOCK):
            rows = slice(start, min(state.shape[1], start + BLOCK))
            yield rows, state[:, rows], None

    def _before(self, tokens: Tensor, T: int, first: Tensor | None) -> Tensor:
        """The token before each of the last T (B, T), V where there is none."""
        V, begin = len(self.bias), tokens.shape[1] - T
        before = F.pad(tokens, (1, 0), value=V)[:, begin:-1]
        if first is None:
            return before
        index = torch.arange(begin - 1, begin - 1 + T, device=tokens.device)
        return before.masked_fill(index < first[:, None], V)


def _log(p: Tensor) -> Tensor:
    """log p, -inf with a gradient of 0 where p is 0."""
    return torch.where(p > 0, p, 1.0).log().masked_fill(p <= 0, -torch.inf)
