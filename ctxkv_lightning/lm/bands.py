"""How a strided window folds: positions of the same residue modulo I side by side, in blocks of queries.

Positions with the same residue only ever read each other, so they form an ordinary causal sliding window of width M
over their own subsequence: folding the stream by residue, (T) -> (I, T/I), turns the strided window into a band. The
band is cut into blocks of queries, each of which reads one dense block of keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32
"""Queries in a block, about, where there are so many: fewer would make the products small."""


class Bands(NamedTuple):
    """Sizes, in rows of a residue class where not said otherwise."""

    interval: int
    before: int  # keys that a query reads besides its own, M - 1
    head: int  # positions of padding before the queries, so that queries and keys fold at the same residue
    tail: int  # positions of padding after queries and keys
    keys: int
    queries: int
    blocks: int
    size: int  # queries in a block
    extra: int  # of padding after queries and keys, so that the last block is whole

    @property
    def first(self) -> int:
        """Row of the first key of the first block; negative where keys do not exist."""
        return self.keys - self.queries - self.before

    @property
    def width(self) -> int:
        """Keys that a block reads."""
        return self.before + self.size

    def mask(self, first: Tensor | None, device: torch.device) -> Tensor:
        """True where a slot exists, of queries and keys inside a block: (B or 1, 1, I or 1, blocks, size, width).

        Key k of a block is read by query i when i ≤ k ≤ i+M-1; its row in the residue class, first + block·size + k,
        must not be negative, nor its position before `first[b]` of row b, but that a query sees its own.
        """
        i = torch.arange(self.size, device=device)[:, None]
        k = torch.arange(self.width, device=device)
        row = self.first + torch.arange(self.blocks, device=device)[:, None, None] * self.size + k
        own = k == i + self.before
        band = ((k >= i) & (k <= i + self.before) & (row >= 0))[None, None, None]
        if first is None:
            return band
        residue = torch.arange(self.interval, device=device)[:, None, None, None]
        position = row * self.interval + residue
        return band & ((position >= first.view(-1, 1, 1, 1, 1))[:, None] | own)


def bands(T: int, S: int, interval: int, max_contexts: int) -> Bands:
    """Of T queries, the first of which stands at key S, and S+T keys."""
    keys = -(-(S + T) // interval)
    queries = keys - S // interval
    size, blocks = _blocks(queries, max_contexts - 1)
    head, tail = S % interval, keys * interval - S - T
    return Bands(interval, max_contexts - 1, head, tail, keys, queries, blocks, size, blocks * size - queries)


def _blocks(queries: int, before: int) -> tuple[int, int]:
    """How many queries a block has, and how many blocks there are.

    Where there are several, each reads besides its own keys some of the block before it, and of no other.
    """
    most = max(before + 1, BLOCK)
    for blocks in (-(-queries // most), queries // most):
        size = -(-queries // max(1, blocks))
        if blocks > 1 and before <= size:
            return size, blocks
    return queries, 1


def padded(x: Tensor, front: int, back: int) -> Tensor:
    """Zeros before and after (..., n, d) along its positions; no copy where there are none."""
    return F.pad(x, (0, 0, front, back)) if front or back else x
