"""Rings: which positions a decoder keeps, in which rows, and which of them a query reads.

The positions that a query reads lie so regularly in a ring of (M-1)·I rows that they are a view of it: nothing is
gathered, and those that do not exist yet are the last ones, so that nothing is masked. From a ring that keeps more, for
another reader, they are gathered.
"""

import torch
from torch import Tensor

from ctxkv_lightning.lm.attention import Selection


class Ring:
    """Where positions stand in a ring that holds those that a later query can still read, `at_least` so many."""

    def __init__(self, interval: int, max_contexts: int, selection: Selection, at_least: int = 0) -> None:
        self.interval, self.max_contexts, self.selection = interval, max_contexts, selection
        self.length = max(at_least, (max_contexts - 1) * (1 if selection == "grid" else interval))

    def keeps(self, position: int | Tensor) -> bool | Tensor:
        """Whether a query after this position may read it; of a strided ring, without a look at the position."""
        return self.length > 0 and (self.selection == "strided" or position % self.interval == 0)

    def row(self, position: int | Tensor) -> int | Tensor:
        """Row of a position that is kept."""
        return (position // self.interval if self.selection == "grid" else position) % self.length

    def past(self, rows: Tensor, position: int | Tensor, interval: int) -> Tensor:
        """What the query at `position` reads (..., m, n) of rows (..., length, n), m < M; its own is not among it.

        In a strided ring, `interval` may be shorter than the ring's. Where the position is a tensor (), at which the
        host does not look, the ring is strided and full.
        """
        read = self.max_contexts - 1
        if not isinstance(position, Tensor):
            if self.selection == "grid":
                return rows[..., : -(-position // self.interval), :]
            read = min(read, position // interval)
            if self.length == (self.max_contexts - 1) * interval:  # the rows of the position's residue
                return rows.unflatten(-2, (self.max_contexts - 1, interval))[..., :read, position % interval, :]
        back = torch.arange(interval, interval * (read + 1), interval, device=rows.device)
        return rows.index_select(-2, (position - back).remainder_(self.length))

    def put(self, rows: Tensor, position: int | Tensor, new: Tensor) -> None:
        """Notes what stands at a position that is kept, (..., n), in rows (..., length, n)."""
        row = self.row(position)
        if isinstance(row, Tensor):
            rows.index_copy_(-2, row[None], new[..., None, :])
        else:
            rows[..., row, :] = new

    def kept(self, tokens: int) -> list[int]:
        """The positions below `tokens` that the ring holds, in ascending order."""
        step = self.interval if self.selection == "grid" else 1
        newest = (tokens - 1) // step * step
        return list(range(newest, max(-1, newest - self.length * step), -step))[::-1]
