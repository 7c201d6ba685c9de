"""Phase 2 on synthetic data, as callables of one training step each: ours, the published method's, the bare products.

Ids follow a Zipf law and contexts are noise: enough for speed and memory, which do not depend on them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.published import PublishedLM, Split, make_optimizer, train_step
from ctxkv_lightning.lm.head import chunks, frozen_cross_entropy, width_of
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.run.machine import cpu_multiplies_bf16
from ctxkv_lightning.windows import Stream, WindowLoader, Windows


@dataclass(frozen=True)
class Sizes:
    """The published sizes."""

    D: int = 768
    C: int = 256
    heads: int = 8
    interval: int = 20
    max_contexts: int = 32
    ffn: int = 3072
    step: int = 8880
    """Positions in a training step."""

    @property
    def history(self) -> int:
        """S: contexts before a window."""
        return (self.max_contexts - 1) * self.interval


FULL = Sizes()
QUICK = Sizes(D=16, C=8, heads=2, interval=3, max_contexts=4, ffn=32, step=64)


def with_dims(sizes: Sizes, dim: int | None, context_dim: int | None) -> Sizes:
    """The same sizes but for D (with a feed-forward layer four times as wide) and C, where given."""
    if dim is not None:
        sizes = replace(sizes, D=dim, ffn=4 * dim)
    return sizes if context_dim is None else replace(sizes, C=context_dim)


def compute_type(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it, else fp32."""
    cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def zipf_tokens(N: int, V: int, seed: int = 42) -> np.ndarray:
    """Ids (N,) int32 of a Zipf law over V ranks."""
    weights = 1.0 / np.arange(1, V + 1)
    return np.random.default_rng(seed).choice(V, N, p=weights / weights.sum()).astype(np.int32)


def random_table(V: int, D: int, seed: int = 42) -> Tensor:
    """A table (V, D) of noise, in size like a token embedding."""
    return torch.randn(V, D, generator=torch.Generator().manual_seed(seed)) * 0.1


def random_stream(N: int, table: Tensor, C: int, seed: int = 42) -> Stream:
    """N Zipf ids over a raw table (V, D), with contexts (N, C) of noise."""
    tokens = torch.from_numpy(zipf_tokens(N, len(table), seed)).long()
    contexts = torch.randn(N, C, generator=torch.Generator().manual_seed(seed))
    return Stream(tokens, F.layer_norm(table, table.shape[1:]), tokens, (contexts,))


def our_model(table: Tensor, sizes: Sizes) -> ContextKVLM:
    """An untrained `ContextKVLM` on this table."""
    model = ContextKVLM(
        len(table), sizes.D, sizes.C, sizes.heads, sizes.interval, sizes.max_contexts, sizes.ffn, dropout=0.1
    )
    model.embedding.weight.data.copy_(table)
    return model


def our_step(model: ContextKVLM, batches: Iterator[Windows], device: torch.device) -> Callable[[], int]:
    """One training step of ours, the next batch's reading included; returns its positions."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    dtype = compute_type(device)

    def step() -> int:
        batch = on_device(next(batches), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = frozen_cross_entropy(hidden_of(model, batch), model.embedding.weight, batch.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return batch.targets.numel()

    return step


def hidden_of(model: ContextKVLM, batch: Windows) -> Tensor:
    """Hidden states (n, D) of the positions that count, as `ContextKVLMModule` takes them."""
    hidden = model(batch.embeddings, batch.memory, batch.first).flatten(0, 1)
    return hidden if batch.counted is None else hidden[batch.counted]


def on_device(batch: Windows, device: torch.device) -> Windows:
    """The batch where the model is, as the trainer would move it."""
    moved = {name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    return batch._replace(**moved)


def endless(loader: WindowLoader) -> Iterator[Windows]:
    """Pass after pass of a loader's batches."""
    while True:
        yield from loader


def published_step(model: PublishedLM, split: Split, size: int) -> Callable[[], int]:
    """One training step of the published method, on `size` shuffled positions; returns their number."""
    optimizer, generator = make_optimizer(model), torch.Generator().manual_seed(42)

    def step() -> int:
        positions = torch.randperm(len(split.tokens) - 1, generator=generator)[:size]
        train_step(model, optimizer, split, positions)
        return size

    return step


def product_chain(V: int, sizes: Sizes, device: torch.device) -> Callable[[], int]:
    """The matrix products of one training step of ours and nothing else, in its shapes and compute type.

    A product counts forward; backward it counts once for the weight where that is trained, and once for the
    input where something below it is. Attention's own products, 0.2 % of the whole, are left out.
    """
    windows = max(1, sizes.step // 1110)
    n, keys = sizes.step, sizes.step + windows * sizes.history
    dtype = compute_type(device)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * 0.02

    # rows, inputs, outputs, gradient of the input wanted
    layers = [
        (n, sizes.D, sizes.D, False),  # query: its input is the frozen embedding
        (keys, sizes.C, sizes.D, False),
        (keys, sizes.C, sizes.D, False),
        (n, sizes.D, sizes.D, True),
        (n, sizes.D, sizes.ffn, True),
        (n, sizes.ffn, sizes.D, True),
    ]
    body = [(tensor(r, i), tensor(o, i), tensor(r, o), wanted) for r, i, o, wanted in layers]
    P, hidden = width_of(V, device), tensor(n, sizes.D)
    table, probabilities = tensor(P, sizes.D), tensor(chunks(hidden)[0].stop, P)

    def chain() -> int:
        for x, weight, gradient, wanted in body:
            _ = x @ weight.T
            _ = gradient.T @ x
            if wanted:
                _ = gradient @ weight
        for rows in chunks(hidden):
            _ = hidden[rows] @ table.T
            _ = probabilities[: len(hidden[rows])] @ table
        return n

    return chain
