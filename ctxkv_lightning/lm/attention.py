"""Strided attention: each position reads the contexts of now and of I, 2I, … (M-1)I tokens ago.

Folded into `bands`, whose blocks are dense: exact to rounding, no gather, and differentiable on every device.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.lm.banded import BandedAttention
from ctxkv_lightning.lm.bands import Bands, bands, padded

Selection = Literal["strided", "grid"]
"""Which contexts are read: those of every I-th token back, or the current one and those at multiples of I."""

QUERIES_ABOUT = 128
"""Queries that share a block of grid keys."""


def strided_attention(
    query: Tensor, key: Tensor, value: Tensor, interval: int, max_contexts: int, first: Tensor | None = None
) -> Tensor:
    """Attention output (B, H, T, d) of queries (B, H, T, d) over keys and values (B, H, S+T, d).

    The first S ≥ 0 keys are history; query i stands at key S+i and reads keys S+i, S+i-I, …, at most
    M of them. Those before key 0, or before key `first[b]` of row b if `first` (B,) is given, do
    not exist and get no weight, but that a query always sees its own: one before `first[b]` sees nothing else.
    """
    B, H, T, d = query.shape
    if T == 0:
        return torch.empty_like(query)
    S = key.shape[2] - T
    fold = bands(T, S, interval, max_contexts)
    mask = fold.mask(first, query.device)
    if goes_by_parts(query):
        mixed: Tensor = BandedAttention.apply(query, key, value, mask, fold)
        return mixed
    rows = padded(_fold(query, fold.head, fold.tail, interval), 0, fold.extra)
    queries = rows.reshape(B, H, interval, fold.blocks, fold.size, d)
    keys, values = (_windows(_fold(x, 0, fold.tail, interval), fold) for x in (key, value))
    mixed = _dense_blocks(queries, keys, values, mask)
    rows = mixed.reshape(B, H, interval, fold.blocks * fold.size, d)[..., : fold.queries, :]
    unfolded = rows.transpose(2, 3).reshape(B, H, fold.queries * interval, d)
    return unfolded[:, :, fold.head : fold.head + T]


def goes_by_parts(query: Tensor) -> bool:
    """Whether it is computed part by part, with a gradient of its own; a compiler gets what it can see through."""
    return query.device.type == "cpu" and not torch.compiler.is_compiling()


def _fold(x: Tensor, head: int, tail: int, interval: int) -> Tensor:
    """(B, H, T, d), padded to a multiple of I, -> (B, H, I, G, d): position g·I + r becomes row g of residue r."""
    return padded(x, head, tail).unflatten(-2, (-1, interval)).transpose(2, 3)


def _windows(x: Tensor, fold: Bands) -> Tensor:
    """(B, H, I, G, d) -> (B, H, I, blocks, width, d): each block of keys and the rows before it.

    The first window begins at row `first`, zeros where that is negative. Put together from slices: the gradient of
    `unfold` is slow.
    """
    before = fold.before
    body = padded(x[..., fold.first + before :, :], 0, fold.extra).unflatten(-2, (fold.blocks, fold.size))
    ahead = padded(x[..., max(fold.first, 0) : fold.first + before, :], max(-fold.first, 0), 0)[..., None, :, :]
    if fold.blocks > 1:
        ahead = torch.cat([ahead, body[..., :-1, fold.size - before :, :]], dim=-3)
    return torch.cat([ahead, body], dim=-2)


def _dense_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention inside each block; what padding queries see is cut off later."""
    if uses_plain_products(query):
        scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]))
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    outer = query.shape[:3]
    # What holds for every row and residue is left for the kernel to broadcast.
    mask = mask[0, 0] if mask.shape[:3] == (1, 1, 1) else mask.expand(*outer, *mask.shape[3:]).flatten(0, 2)
    query, key, value = (x.flatten(0, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).unflatten(0, outer)


def uses_plain_products(query: Tensor) -> bool:
    """Whether two matrix products beat the fused kernel: on a CPU in bf16 twice, in fp32 the other way round.

    On a GPU they do in bf16 too, unless compiled: the compiler of torch 2.11 fails on them.
    """
    if query.device.type == "cuda" and torch.compiler.is_compiling():
        return False
    return query.device.type in ("cpu", "cuda") and query.dtype == torch.bfloat16


def grid_attention(
    query: Tensor, key: Tensor, value: Tensor, interval: int, max_contexts: int, first: Tensor | None = None
) -> Tensor:
    """Attention over the context of now and the last M-1 before it that stand at multiples of I.

    Shapes and `first` as in `strided_attention`; query 0 stands on the grid. The I queries that follow a grid
    position, up to the next one, read the same grid, so they share one block of keys; their own key is one score more.
    """
    T, d = query.shape[2:]
    if T == 0:
        return torch.empty_like(query)
    S, head = key.shape[2] - T, interval - 1
    chunks = -(-(T + head) // interval)  # chunk 0 ends with query 0, which reads no grid position of the queries
    size = -(-QUERIES_ABOUT // interval)  # chunks in a block
    blocks = -(-chunks // size)
    tail = blocks * size * interval - (T + head)
    queries, own_keys, own_values = (
        padded(x, head, tail).unflatten(2, (blocks, size * interval)) for x in (query, key[:, :, S:], value[:, :, S:])
    )
    column = torch.arange(size + max_contexts - 2, device=query.device)
    row = torch.arange(blocks, device=query.device)[:, None] * size + column - (max_contexts - 1)
    place = S + row * interval  # (blocks, columns), of each grid key among the keys
    chunk = torch.arange(size, device=query.device).repeat_interleave(interval)[:, None]
    seen = (column >= chunk) & (column <= chunk + max_contexts - 2)
    exists = (place >= 0)[None] if first is None else place >= first.view(-1, 1, 1)
    mask = (exists[:, :, None, :] & seen)[:, None]
    keys, values = (x[:, :, place.clamp(0, S + T - 1)] for x in (key, value))
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(~mask, torch.finfo(queries.dtype).min)
    own = (queries * own_keys).sum(-1, keepdim=True)
    weights = torch.softmax(torch.cat([scores, own], dim=-1) / math.sqrt(d), dim=-1).to(value.dtype)
    mixed = weights[..., :-1] @ values + weights[..., -1:] * own_values
    return mixed.flatten(2, 3)[:, :, head : head + T]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Sequence[int],
    max_contexts: int,
    selection: Selection = "strided",
    first: Tensor | None = None,
) -> Tensor:
    """Attention (B, H, T, d) with an interval for each head (H,); heads with the same go together."""
    one = strided_attention if selection == "strided" else grid_attention
    groups = head_groups(intervals)
    if len(groups) == 1:
        return one(query, key, value, intervals[0], max_contexts, first)
    S, parts = key.shape[2] - query.shape[2], []
    for interval, heads in groups.items():
        unread = max(0, S - (max_contexts - 1) * interval)
        later = None if first is None else (first - unread).clamp_min(0)
        keys, values = (of_heads(x, heads)[:, :, unread:] for x in (key, value))
        parts.append(one(of_heads(query, heads), keys, values, interval, max_contexts, later))
    return in_order(parts, groups.values())


def of_heads(x: Tensor, heads: list[int]) -> Tensor:
    """What belongs to these heads, in ascending order, of (B, H, ...); a view where they stand side by side."""
    if heads[-1] - heads[0] == len(heads) - 1:
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, _index(tuple(heads), x.device))


def in_order(parts: list[Tensor], groups: Iterable[list[int]]) -> Tensor:
    """(B, H, ...) of the parts (B, n, ...) of each group's heads, each head where it belongs."""
    together, order = torch.cat(parts, dim=1), [head for heads in groups for head in heads]
    if order == sorted(order):
        return together
    places = sorted(range(len(order)), key=order.__getitem__)
    return together.index_select(1, _index(tuple(places), together.device))


@cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """These heads as a tensor, made once: a step must not copy from the host where it is recorded as a graph."""
    with torch.inference_mode(False):  # training may be next to use it
        return torch.tensor(heads, device=device)


def head_groups(intervals: Sequence[int]) -> dict[int, list[int]]:
    """The heads of each distinct interval."""
    groups: dict[int, list[int]] = {}
    for head, interval in enumerate(intervals):
        groups.setdefault(interval, []).append(head)
    return groups


def slot_positions(T: int, interval: int, max_contexts: int, selection: Selection) -> Tensor:
    """Where the M slots of queries 0 … T-1 stand (T, M), relative to query 0; slot 0 is the query's own."""
    now, slot = torch.arange(T)[:, None], torch.arange(max_contexts)
    if selection == "strided":
        return now - slot * interval
    grid = (torch.div(now - 1, interval, rounding_mode="floor") - (slot - 1)) * interval
    return torch.where(slot == 0, now, grid)


def slot_distances(intervals: Sequence[int], max_contexts: int, selection: Selection) -> Tensor:
    """Mean tokens back (H, M) of each head's slots."""
    rows = []
    for interval in intervals:
        far = max_contexts * interval  # where no slot is missing, over one whole period
        period = slot_positions(far + interval, interval, max_contexts, selection)[far:]
        rows.append((torch.arange(far, far + interval)[:, None] - period).double().mean(dim=0))
    return torch.stack(rows)


def slot_weights(
    query: Tensor,
    key: Tensor,
    intervals: Sequence[int],
    max_contexts: int,
    selection: Selection = "strided",
    first: Tensor | None = None,
) -> Tensor:
    """Mean attention weight (H, M), fp32, by head and slot over the B·T queries; shapes as in `attend`.

    One pass per head and slot: for looking at a model, not for training it.
    """
    B, _, T, d = query.shape
    start = key.shape[2] - T
    existing = torch.zeros(B, 1, device=query.device, dtype=torch.long) if first is None else first[:, None]
    means = []
    for head, interval in enumerate(intervals):
        positions = start + slot_positions(T, interval, max_contexts, selection).to(query.device)
        scores = query.new_empty(max_contexts, B, T, dtype=torch.float32)
        for slot, position in enumerate(positions.T):
            score = (query[:, head] * key[:, head, position.clamp_min(0)]).sum(-1, dtype=torch.float32) / math.sqrt(d)
            scores[slot] = score.masked_fill(position < existing, -math.inf)
        means.append(scores.softmax(dim=0).mean(dim=(1, 2)))
    return torch.stack(means)
