"""Exact contexts of a whole stream: segments in lock-step against the step-by-step loop.

Both start from the normalised table and the ids; the loop calls the encoder once per token, as a decoder would.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import pairs, parse, parser, save, spread
from benchmarks.workload import FULL, QUICK, random_table, zipf_tokens
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.solve import solve_contexts


@torch.no_grad()
def step_by_step(encoder: ContextEncoder, table: Tensor, ids: Tensor) -> Tensor:
    """Contexts (N, C), one token after another."""
    contexts = table.new_empty(len(ids), encoder.context_dim)
    state = encoder.initial()
    for t, token in enumerate(ids.tolist()):
        state = encoder(state, table[token])
        contexts[t] = state
    return contexts


def measure(N: int, V: int, D: int, C: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Times, ratio, the largest absolute difference between the two, and the certificate."""
    torch.manual_seed(42)
    encoder = ContextEncoder(C, D).to(device)
    table = F.layer_norm(random_table(V, D), (D,)).to(device)
    ids = torch.from_numpy(zipf_tokens(N, V)).long().to(device)
    found: dict[str, Any] = {}

    def loop() -> None:
        found["loop"] = step_by_step(encoder, table, ids)

    def ours() -> None:
        found["ours"], found["seam_error"] = solve_contexts(encoder, table, ids=ids)

    timed: dict[str, Any] = pairs(loop, ours, repeats)
    error = float((found["loop"] - found["ours"]).abs().max())
    rates = {side: N / timed[key]["median"] for side, key in (("loop", "baseline"), ("ours", "ours"))}
    return {"tokens": N, **timed, "tokens_per_second": rates, "max_error": error, "seam_error": found["seam_error"]}


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table of one measurement."""
    seconds = [f"{result[side]['median']:.3f}" for side in ("baseline", "ours")]
    errors = [f"{result[name]:.1e}" for name in ("max_error", "seam_error")]
    heading = ["tokens", "loop, s", "segments, s", "ratio", "max error", "seam error"]
    return [heading, [f"{result['tokens']:,}", *seconds, spread(result["ratio"]), *errors]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the default number of tokens."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=122_794)
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--repeats", type=int, default=3)
    options = parse(made, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.quick:
        result = measure(600, 50, QUICK.D, QUICK.C, device, 1)
    else:
        result = measure(options.tokens, options.vocabulary, FULL.D, FULL.C, device, options.repeats)
    save("contexts", result, rows(result), options)
    return result


if __name__ == "__main__":
    main()
