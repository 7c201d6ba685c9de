"""A training step of Phase 2 compiled by torch.compile against the eager one, and what compiling takes."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import pairs, parse, parser, save, spread
from benchmarks.workload import FULL, QUICK, endless, our_model, our_step, random_stream, random_table
from ctxkv_lightning.run.machine import keep_freed_memory
from ctxkv_lightning.windows import WindowLoader


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and reports."""
    options = parse(parser(__doc__), argv)
    sizes, V, repeats = (QUICK, 50, 1) if options.quick else (FULL, 8192, 5)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = random_table(V, sizes.D)
    loader = WindowLoader(random_stream(4 * sizes.step + 1, table, sizes.C), sizes.history, sizes.step, seed=1)
    models = [our_model(table, sizes).to(device) for _ in range(2)]
    models[1].compile()
    eager, compiled = (our_step(model, endless(loader), device) for model in models)
    started = time.perf_counter()
    for _ in loader:  # every shape of a pass
        compiled()
    first = time.perf_counter() - started
    timed = pairs(eager, compiled, repeats)
    compiling = max(first - len(loader) * statistics.median(timed["ours"]["seconds"]), 0.0)
    saved = timed["baseline"]["median"] - timed["ours"]["median"]
    result = {**timed, "compile_seconds": compiling, "steps_to_earn_back": compiling / saved if saved > 0 else None}
    earned = f"{result['steps_to_earn_back']:,.0f}" if saved > 0 else "never"
    seconds = [f"{timed[side]['median']:.3f}" for side in ("baseline", "ours")]
    rows = [["eager, s", "compiled, s", "eager / compiled", "compiling, s", "steps to earn it back"]]
    save("compile", result, [*rows, [*seconds, spread(timed["ratio"]), f"{compiling:.1f}", earned]], options)
    return result


if __name__ == "__main__":
    main()
