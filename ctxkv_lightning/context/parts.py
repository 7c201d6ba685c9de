"""Exact contexts of a long stream by several processes, one part of the stream each.

A part begins with a warm-up over the tokens before it. As inside a part (`solve.py`), the state it then starts from is
compared with the state its predecessor ended in, and a part that started wrong is solved again.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, multiprocessing

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.solve import solve_contexts, solve_onwards

WARM_UP = 512
"""Tokens before a part: far more than the recurrence remembers, and nothing beside a part."""


class Part(NamedTuple):
    """What a process is given; plain, for it is pickled."""

    weights: dict[str, Tensor]
    table: Tensor  # (V, D), normalised
    ids: Tensor  # (n,), with the warm-up
    warm_up: int  # leading tokens that belong to the part before
    state: Tensor | None  # the context before the first id; None for zero
    file: Path  # an .npy array (N, C)
    dtype: str
    start: int  # row of the file that the part begins at
    tolerance: float
    threads: int


class Solved(NamedTuple):
    """What it gives back."""

    before: Tensor  # (C,), the state that the part started from
    last: Tensor  # (C,)
    error: float


def solve_in_parts(
    encoder: ContextEncoder, table: Tensor, ids: Tensor, file: Path, dtype: str, tolerance: float, processes: int
) -> float:
    """Writes the contexts (N, C) of the stream `ids` (N,) into an .npy array; the largest error at any seam.

    `table` (V, D) is normalised; `dtype` is what the file's bits stand for. Each process has its
    share of the processors.
    """
    N = len(ids)
    edges = [N * part // processes for part in range(processes + 1)]
    threads = max(1, torch.get_num_threads() // processes)
    weights = {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}

    def part(number: int, state: Tensor | None) -> Part:
        start, stop = edges[number], edges[number + 1]
        warm_up = 0 if state is not None else min(WARM_UP, start)
        return Part(weights, table, ids[start - warm_up : stop], warm_up, state, file, dtype, start, tolerance, threads)

    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        solved: list[Any] = pool.map(solve_part, [part(number, None) for number in range(processes)])
    worst = max(each.error for each in solved)
    for number in range(1, processes):
        gap = float((solved[number].before - solved[number - 1].last).abs().max())
        if gap > tolerance:
            solved[number], gap = solve_part(part(number, solved[number - 1].last)), 0.0
        worst = max(worst, gap, solved[number].error)
    return worst


def solve_part(part: Part) -> Solved:
    """Solves a part and writes it; in a process of its own, or again in the first."""
    threads, C = torch.get_num_threads(), part.weights["norm.weight"].shape[0]
    torch.set_num_threads(part.threads)
    encoder = ContextEncoder(C, part.table.shape[1]).requires_grad_(False)
    encoder.load_state_dict(part.weights)
    state = part.state
    if part.warm_up:
        contexts, _ = solve_contexts(encoder, part.table, part.tolerance, ids=part.ids[: part.warm_up])
        state = contexts[-1]
    rows = np.lib.format.open_memmap(part.file, mode="r+")
    own = part.ids[part.warm_up :]
    out = torch.from_numpy(rows[part.start : part.start + len(own)]).view(getattr(torch, part.dtype))
    before = encoder.initial() if state is None else state
    error, last = solve_onwards(encoder, part.table, own, out, before, part.tolerance)
    rows.flush()
    torch.set_num_threads(threads)
    return Solved(before, last, error)
