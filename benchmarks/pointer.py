"""The recipe's pointer and the gradient of its bias, against the plain formulas that they replace, on the CPU.

A pointer's weights are a softmax, and its evidence is read off the largest of them; plainly, both are made of
log-sum-exp. The gradient of a bias is the sum of the logits' gradients over positions, block by block; plainly, it is
one sum, for which torch copies all of them to fp32 first. Forward and backward, at the sizes of `experiment=best`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import pairs, parse, parser, save, spread
from ctxkv_lightning.lm.normalise import column_sums
from ctxkv_lightning.lm.pointer import BLOCK, NEVER, CachePointer
from ctxkv_lightning.run.machine import keep_freed_memory


def plainly_weighed(pointer: CachePointer, scores: Tensor, distance: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, P, n, m) and evidence (B, P, n, 1) as `CachePointer.weigh`, by log-sum-exp."""
    scores = (scores - pointer.recency[:, None, None] * distance.log()).masked_fill(~exists, NEVER)
    evidence = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - evidence).exp() * exists, evidence


def weighed(pointer: CachePointer, scores: Tensor, distance: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `CachePointer.weigh`, of which nothing is read into states."""
    B, _, n, m = scores.shape
    followers = torch.zeros(B, m, dtype=torch.long)
    pointed = pointer.weigh(slice(0, n), scores.new_zeros(B, n, 1), scores, distance, exists, followers, None)
    return pointed.weights, pointed.evidence.transpose(1, 2)[..., None]


def measure_pointer(heads: int, n: int, window: int, repeats: int) -> dict[str, Any]:
    """Times, ratio, and the largest difference of results and gradients."""
    torch.manual_seed(42)
    pointer, m = CachePointer(8, 8, heads, 8, window), window + n - 1
    distance = torch.arange(n)[:, None] + window - torch.arange(m)
    exists = ((distance >= 1) & (distance <= window))[None, None]
    scores, into = 5 * torch.randn(1, heads, n, m), torch.randn(1, heads, n, m)
    results: dict[str, list[Tensor]] = {}

    def runner(name: str, weigh: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def run() -> None:
            asked = scores.clone().requires_grad_()
            weights, evidence = weigh(pointer, asked, distance.clamp_min(1), exists)
            loss = (weights * into).sum() + evidence.sum()
            results[name] = [weights.detach(), evidence.detach(), *torch.autograd.grad(loss, asked)]

        return run

    timed: dict[str, Any] = pairs(runner("plain", plainly_weighed), runner("ours", weighed), repeats, warmup=2)
    return {**timed, "max_difference": difference(results["plain"], results["ours"])}


def measure_bias(positions: int, V: int, repeats: int) -> dict[str, Any]:
    """Times, ratio, and the largest difference of the sums of bf16 logits over positions."""
    torch.manual_seed(42)
    logits = torch.randn(positions, V).bfloat16()
    results: dict[str, list[Tensor]] = {}

    def runner(name: str, sums: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            results[name] = [sums(logits)]

        return run

    def plainly(logits: Tensor) -> Tensor:
        return logits.sum(dim=0, dtype=torch.float32)

    timed: dict[str, Any] = pairs(runner("plain", plainly), runner("ours", column_sums), repeats, warmup=2)
    return {**timed, "max_difference": difference(results["plain"], results["ours"])}


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures both."""
    options = parse(parser(__doc__), argv)
    keep_freed_memory()
    repeats = 2 if options.quick else 15
    pointer = {"heads": 2, "n": 7, "window": 9} if options.quick else {"heads": 4, "n": BLOCK, "window": 540}
    bias = {"positions": 40, "V": 50} if options.quick else {"positions": 1110, "V": 8192}
    result: dict[str, Any] = {
        "pointer": {"shape": pointer, **measure_pointer(**pointer, repeats=repeats)},
        "bias": {"shape": bias, **measure_bias(**bias, repeats=repeats)},
    }
    rows = [["", "plain, ms", "ours, ms", "ratio", "max difference"]]
    for name, row in result.items():
        times = [f"{1000 * row[side]['median']:.2f}" for side in ("baseline", "ours")]
        rows.append([name, *times, spread(row["ratio"]), f"{row['max_difference']:.1e}"])
    save("pointer", result, rows, options)
    return result


if __name__ == "__main__":
    main()
