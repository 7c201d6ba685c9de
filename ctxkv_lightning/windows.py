"""Batches: runs and rows of the training stream for Phase 1, windows with their history for Phase 2."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 1110  # positions in a window: eight make the published step of 8,880


class Run(NamedTuple):
    """A Phase 1 batch: n contiguous positions of the training stream."""

    start: int
    embeddings: Tensor  # (distinct, D), normalised, one row per distinct token
    inverse: Tensor  # (n,), the row of each position


class Rows(NamedTuple):
    """A batch for a recurrent language model: n tokens of each of B rows, which go on where the last batch ended."""

    tokens: Tensor  # (B, n)
    targets: Tensor  # (B, n), the token after each


class Windows(NamedTuple):
    """A Phase 2 batch: B windows of T positions with S contexts of history each."""

    tokens: Tensor  # (B, S+T), those of the history before the window's own
    targets: Tensor  # (n,), the token after each position that counts, row by row
    counted: Tensor | None  # (n,), which of the B·T positions count; None when all do
    embeddings: Tensor  # (B, T, D), normalised
    memory: Tensor  # (B, S+T, C) contexts, of several encoders side by side, or (B, S+T, D) embeddings
    first: Tensor | None  # (B,), index of a row's first existing position of memory; None when all exist
    total: int  # positions that count in this step, over all ranks
    ngram: Tensor | None = None  # (B, T, 3), what counting says of each position


class Stream(NamedTuple):
    """One split as stored tensors; `rows` says which row of `embeddings` each position has."""

    tokens: Tensor  # (N,)
    embeddings: Tensor  # (V, D) or (N, D)
    rows: Tensor  # (N,)
    contexts: tuple[Tensor, ...]  # (N, C) of each encoder; none where the memory is the embeddings
    counted: Tensor | None = None  # (N,), which tokens are scored; None when all are. Stays on the CPU, which chooses
    ngram: Tensor | None = None  # (N, 3), of training text: see `text.ngram.held_out`

    def to(self, device: torch.device) -> "Stream":
        tokens, embeddings, rows = (tensor.to(device) for tensor in self[:3])
        contexts = tuple(tensor.to(device) for tensor in self.contexts)
        ngram = None if self.ngram is None else self.ngram.to(device)
        return Stream(tokens, embeddings, rows, contexts, self.counted, ngram)

    def bytes(self) -> int:
        parts = (*self[:3], *self.contexts, *(() if self.ngram is None else (self.ngram,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in parts)


class RunLoader:
    """The training stream in contiguous runs of at most `batch_tokens`, in order.

    Which tokens a run has is found out in the first pass: every iteration of Phase 1 reads the same runs.
    """

    def __init__(self, tokens: Tensor, table: Tensor, batch_tokens: int) -> None:
        self.tokens, self.table, self.batch_tokens = tokens, table, batch_tokens
        self._distinct: list[tuple[Tensor, Tensor]] = []  # of each run: its tokens, and which of them stands where

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_tokens)

    def __iter__(self) -> Iterator[Run]:
        for number, run in enumerate(self.tokens.split(self.batch_tokens)):
            if number == len(self._distinct):
                self._distinct.append(torch.unique(run, return_inverse=True))
            distinct, inverse = self._distinct[number]
            yield Run(number * self.batch_tokens, self.table[distinct], inverse)


class RowLoader:
    """The training stream cut into equal rows, read side by side, `steps` tokens of each at a time, in order.

    At most `ROWS` of them, none shorter than `steps` where there is a choice. The tokens that are left over when the
    stream is cut, fewer than there are rows, are not read.
    """

    ROWS, STEPS = 32, 48

    def __init__(self, tokens: Tensor, steps: int = STEPS) -> None:
        self.steps = steps
        self._done = self._goes_on_at = 0
        rows = max(1, min(self.ROWS, (len(tokens) - 1) // steps))
        length = (len(tokens) - 1) // rows
        self.tokens, self.targets = (tokens[begin:][: rows * length].view(rows, length) for begin in (0, 1))

    def __len__(self) -> int:
        return -(-self.tokens.shape[1] // self.steps)

    def __iter__(self) -> Iterator[Rows]:
        self._done, self._goes_on_at = self._goes_on_at, 0
        parts = (part.split(self.steps, dim=1)[self._done :] for part in (self.tokens, self.targets))
        for tokens, targets in zip(*parts, strict=True):
            self._done += 1
            yield Rows(tokens, targets)

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in the last pass."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass is the rest of the one that was broken off, if one was."""
        self._goes_on_at = state["done"] % len(self)


class WindowLoader:
    """Windows over one stream; every position that has a next token counts exactly once a pass.

    All windows have the same length, as even as the stream allows, and begin at multiples of `alignment`. The last
    is moved back to end with the stream, or as soon after it as its alignment allows; what it shares with the one
    before it, and what lies behind the stream, does not count, nor do tokens that the stream says are not scored.
    With a `seed`, the order of the windows is drawn anew each pass, as a function of (seed, pass). Of each step's
    windows, rank r of R gets its share; `batch_tokens` is what all of them read.
    """

    def __init__(
        self,
        stream: Stream,
        history: int,
        batch_tokens: int,
        alignment: int = 1,
        *,
        seed: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.stream, self.history, self.seed = stream, history, seed
        self.rank, self.ranks = rank, ranks
        self.passes = self._done = self._goes_on_at = 0
        self.positions = len(stream.tokens) - 1
        windows = -(-self.positions // min(WINDOW, batch_tokens))
        self.length = -(-self.positions // windows // alignment) * alignment
        self.windows = -(-self.positions // self.length)
        self.last_start = max(0, -(-(self.positions - self.length) // alignment) * alignment)
        self.batches = -(-self.windows // max(1, batch_tokens // self.length))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Windows]:
        order = torch.arange(self.windows)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
            order = torch.randperm(self.windows, generator=generator)
        self.passes, self._done, self._goes_on_at = self.passes + 1, self._goes_on_at, 0
        for chosen in order.tensor_split(self.batches)[self._done :]:
            self._done += 1
            yield self.batch(chosen.tensor_split(self.ranks)[self.rank], self._counted(chosen), chosen[:1])

    def state_dict(self) -> dict[str, int]:
        """Passes begun, and batches handed out in the last of them."""
        return {"passes": self.passes, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass is the rest of the one that was broken off, if one was."""
        half_way = 0 < state["done"] < self.batches
        self.passes = state["passes"] - half_way
        self._goes_on_at = state["done"] if half_way else 0

    def _counted(self, chosen: Tensor) -> int:
        """Positions that count in these windows; 1 for none, so that a loss can be divided by it."""
        if self.stream.counted is None:
            return int((self.positions - chosen * self.length).clamp_max(self.length).sum())
        parts = (self.stream.counted[1:][start : start + self.length] for start in (chosen * self.length).tolist())
        return max(1, sum(int(part.count_nonzero()) for part in parts))

    def batch(self, chosen: Tensor, total: int, stand_in: Tensor) -> Windows:
        """The windows of these numbers (B,); if there are none, `stand_in`, of which nothing counts."""
        nothing = len(chosen) == 0
        own = (stand_in if nothing else chosen) * self.length
        starts, device = own.clamp_max(self.last_start), self.stream.tokens.device
        counted = self._which_count(own, starts, nothing)
        counted = None if counted is None else sent(counted, device)
        reach = sent(starts, device)[:, None] + torch.arange(-self.history, self.length, device=device)
        reach = reach.clamp(0, self.positions)
        positions = reach[:, self.history :]
        targets = self.stream.tokens[(positions.flatten() if counted is None else positions.flatten()[counted]) + 1]
        first = (self.history - starts).clamp_min(0)
        embeddings = self.stream.embeddings[self.stream.rows[positions]]
        return Windows(
            self.stream.tokens[reach],
            targets,
            counted,
            embeddings,
            self._memory(reach),
            sent(first, device) if bool(first.any()) else None,
            total,
            None if self.stream.ngram is None else self.stream.ngram[positions],
        )

    def _which_count(self, own: Tensor, starts: Tensor, nothing: bool) -> Tensor | None:
        """Which of the positions of windows that begin at `starts` (B,) count, (n,); None when all do, as is the rule.

        A window counts from `own` (B,) on.
        """
        if self.stream.counted is None and not nothing and bool((own + self.length <= self.positions).all()):
            return None
        positions = starts[:, None] + torch.arange(self.length)
        counts = ((positions >= own[:, None]) & (positions < self.positions)).flatten() & (not nothing)
        if self.stream.counted is not None:
            counts &= self.stream.counted[(positions + 1).clamp_max(self.positions)].flatten()
        return None if bool(counts.all()) else counts.nonzero().flatten()

    def _memory(self, reach: Tensor) -> Tensor:
        """What stands at these positions (B, S+T): contexts side by side, or embeddings where there are none."""
        if not self.stream.contexts:
            return self.stream.embeddings[self.stream.rows[reach]]
        return torch.cat([contexts[reach].float() for contexts in self.stream.contexts], dim=-1)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on `device`; a GPU is not waited for, as it would be for memory that the system may move."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
