"""Folded strided attention against gathering every slot, forward and backward.

Keys and values are projected already; the gather reads (token, slot) pairs with one advanced index, the plainest
vectorised form. The first row is fp32, the second bf16.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import pairs, parse, parser, save, spread
from ctxkv_lightning.lm.attention import strided_attention
from ctxkv_lightning.run.machine import keep_freed_memory

Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, interval: int, max_contexts: int) -> Tensor:
    """The same as `strided_attention` without history, through (B, H, T, M, d) gathered keys and values."""
    T, d = query.shape[2:]
    slots = torch.arange(T, device=query.device)[:, None] - torch.arange(max_contexts, device=query.device) * interval
    index = slots.clamp_min(0)
    scores = (query[..., None, :] @ key[:, :, index].transpose(-1, -2)).squeeze(-2) / math.sqrt(d)
    weights = scores.masked_fill(slots < 0, -math.inf).softmax(dim=-1)
    return (weights[..., None, :] @ value[:, :, index]).squeeze(-2)


def forward_backward(attention: Attention, inputs: list[Tensor], interval: int, max_contexts: int) -> list[Tensor]:
    """The output and the gradients of its sum of squares / 2 to query, key and value."""
    query, key, value = inputs
    output = attention(query, key, value, interval, max_contexts)
    return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]


def measure(dtype: torch.dtype, T: int, heads: int, d: int, interval: int, max_contexts: int, repeats: int) -> Any:
    """Times, ratio, and the largest difference of outputs and gradients in one type."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(42)
    inputs = [torch.randn(1, heads, T, d, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    results: dict[str, list[Tensor]] = {}

    def runner(name: str, attention: Attention) -> Callable[[], None]:
        def run() -> None:
            results[name] = forward_backward(attention, inputs, interval, max_contexts)

        return run

    timed: dict[str, Any] = pairs(
        runner("gather", gathered_attention), runner("fold", strided_attention), repeats, warmup=1
    )
    differences = [(a - b).abs().max() for a, b in zip(results["gather"], results["fold"], strict=True)]
    return {**timed, "max_difference": float(torch.stack(differences).max())}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures both types, and fp32 once more with the allocator that a run has."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=5120)
    options = parse(made, argv)
    shape = (40, 2, 8, 3, 4, 1) if options.quick else (options.tokens, 8, 96, 20, 32, 5)
    names = ("T", "heads", "d", "interval", "max_contexts")
    result: dict[str, Any] = {"shape": dict(zip(names, shape, strict=False))}
    rows = [["type", "gather, ms", "fold, ms", "ratio", "max difference"]]
    kept = "fp32, freed memory kept"  # as a run keeps it: gathering gains more from that
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float32, kept)):
        if name == kept:
            keep_freed_memory()
        row = result[name] = measure(dtype, *shape)
        times = [f"{1000 * row[side]['median']:.1f}" for side in ("baseline", "ours")]
        rows.append([name, *times, spread(row["ratio"]), f"{row['max_difference']:.1e}"])
    save("attention", result, rows, options)
    return result


if __name__ == "__main__":
    main()
