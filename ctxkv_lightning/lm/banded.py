"""Strided attention on a CPU: few heads and residues at a time, what stands between two products stays in the cache.

The gradient is written out: keys and values are laid out in windows again instead of being kept, and nothing but the
softmax's weights is.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ctxkv_lightning.lm.bands import Bands, padded

CACHED = 1 << 21
"""Bytes of the windows of keys that go together, about, for each thread."""

Part = tuple[int, slice, slice]
"""A row, heads and residues of it that go together."""


class BandedAttention(torch.autograd.Function):
    """Attention (B, H, T, d) of queries (B, H, T, d) over keys and values (B, H, S+T, d), folded as `bands` say."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bands: Bands) -> Tensor:
        T, more = query.shape[2], bands.tail + bands.extra * bands.interval
        query = padded(query, bands.head, more)
        key, value = padded(key, 0, more), padded(value, 0, more)
        mixed, scale = _room(query), 1 / math.sqrt(query.shape[-1])
        parts, kept = list(_parts(query, bands)), []
        with torch.autocast("cpu", enabled=False):
            to, *given = (_folded(x, bands) for x in (mixed, query, key, value))
            for part in parts:
                queries, keys, values = (x[part] for x in given)
                bias = _bias(mask, part, queries, bands)
                scores = torch.baddbmm(bias, _blocks(queries, bands), _windows(keys, bands).mT, alpha=scale)
                exact = torch.promote_types(scores.dtype, torch.float32)
                weights = torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
                to[part].copy_((weights @ _windows(values, bands)).view_as(queries))
                if any(ctx.needs_input_grad):
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.bands, ctx.more, ctx.scale, ctx.parts = bands, more, scale, parts
        return mixed[:, :, bands.head : bands.head + T]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        bands, T, keys = ctx.bands, grad.shape[2], key.shape[2] - ctx.more
        grad = padded(grad, bands.head, ctx.more)
        gradients = [_room(x) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            given = [_folded(x, bands) for x in (grad, query, key, value)]
            to = [_folded(x, bands) for x in gradients]
            for part, weights in zip(ctx.parts, kept, strict=True):
                _differentiate([x[part] for x in to], [x[part] for x in given], weights, ctx.scale, bands)
        first, second, third = gradients
        return first[:, :, bands.head : bands.head + T], second[:, :, :keys], third[:, :, :keys], None, None


def _differentiate(to: list[Tensor], given: list[Tensor], weights: Tensor, scale: float, bands: Bands) -> None:
    """Writes a part's gradients to queries, keys and values, given that to what was mixed, and these."""
    grads, queries = (_blocks(x, bands) for x in given[:2])
    keys, values = (_windows(x, bands) for x in given[2:])
    _sum_windows(to[2], weights.mT @ grads, bands)
    scores = torch._softmax_backward_data(grads @ values.mT, weights, -1, weights.dtype).mul_(scale)
    to[0].copy_((scores @ keys).view_as(to[0]))
    _sum_windows(to[1], scores.mT @ queries, bands)


def _parts(query: Tensor, bands: Bands) -> Iterator[Part]:
    """Whole heads where these are small."""
    B, H, _, d = query.shape
    residue = bands.blocks * bands.width * d * query.element_size()
    cached = CACHED * torch.get_num_threads()
    residues, heads = max(1, cached // residue), max(1, cached // (residue * bands.interval))
    for b, first, begin in product(range(B), range(0, H, heads), range(0, bands.interval, residues)):
        yield b, slice(first, first + heads), slice(begin, begin + residues)


def _bias(mask: Tensor, part: Part, queries: Tensor, bands: Bands) -> Tensor:
    """What is added to a part's scores, (h · i · blocks, size, width): nothing, or so much that none is left."""
    b, _, residues = part
    own = mask[min(b, len(mask) - 1), 0]
    own = own[residues] if len(own) == bands.interval else own
    bias = torch.zeros(own.shape, dtype=queries.dtype).masked_fill_(~own, torch.finfo(queries.dtype).min)
    return bias.expand(*queries.shape[:2], *bias.shape[1:]).flatten(0, 2)


def _folded(x: Tensor, bands: Bands) -> Tensor:
    """(B, H, n·I, d) -> (B, H, I, n, d), a view: position g·I + r is row g of residue r."""
    return x.unflatten(2, (-1, bands.interval)).transpose(2, 3)


def _blocks(rows: Tensor, bands: Bands) -> Tensor:
    """Of queries (h, i, blocks · size, d), blocks (h · i · blocks, size, d)."""
    return rows.reshape(-1, bands.size, rows.shape[-1])


def _windows(rows: Tensor, bands: Bands) -> Tensor:
    """Of keys (h, i, n, d), what each block reads: (h · i · blocks, width, d), zeros where there is no key."""
    before, missing = bands.before, max(0, -bands.first)
    windows = rows.new_empty(*rows.shape[:2], bands.blocks, bands.width, rows.shape[-1])
    body = rows[:, :, bands.first + before :].unflatten(2, (bands.blocks, bands.size))
    windows[..., before:, :] = body
    windows[:, :, 0, :missing] = 0
    windows[:, :, 0, missing:before] = rows[:, :, bands.first + missing : bands.first + before]
    if bands.blocks > 1:
        windows[:, :, 1:, :before] = body[:, :, :-1, bands.size - before :]
    return windows.flatten(0, 2)


def _sum_windows(rows: Tensor, windows: Tensor, bands: Bands) -> None:
    """Writes to each key's row, (h, i, n, d), the sum of what its windows, as above, say of it; changes these."""
    before, missing = bands.before, max(0, -bands.first)
    windows = windows.view(*rows.shape[:2], bands.blocks, bands.width, rows.shape[-1])
    body = windows[..., before:, :]
    if bands.blocks > 1:
        body[:, :, :-1, bands.size - before :] += windows[:, :, 1:, :before]
    rows[:, :, bands.first + before :].unflatten(2, (bands.blocks, bands.size)).copy_(body)
    rows[:, :, bands.first + missing : bands.first + before] = windows[:, :, 0, missing:before]
    rows[:, :, : bands.first + missing] = 0


def _room(x: Tensor) -> Tensor:
    """For (B, H, n, d); the heads of a position side by side, as layers want them."""
    B, H, n, d = x.shape
    return x.new_empty(B, n, H, d).transpose(1, 2)
