"""What `keep_freed_memory` is worth: a training step of Phase 2 with it and without, each in processes of its own."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import in_fresh_process, parse, parser, save, seconds_of
from benchmarks.workload import FULL, QUICK, Sizes, endless, our_model, our_step, random_stream, random_table
from ctxkv_lightning.run.machine import keep_freed_memory
from ctxkv_lightning.windows import WindowLoader


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and reports."""
    options = parse(parser(__doc__), argv)
    sizes, vocabularies, rounds = (QUICK, (50,), 1) if options.quick else (FULL, (8192, 50257), 3)
    result: dict[str, Any] = {}
    rows = [("V", "without, s", "with, s", "without / with")]
    for V in vocabularies:
        # Alternating processes: a slow stretch of the machine hits both.
        times = [[in_fresh_process(step_seconds, kept, V, sizes) for kept in (False, True)] for _ in range(rounds)]
        without, kept = (statistics.median(pair[i] for pair in times) for i in (0, 1))
        ratio = statistics.median(a / b for a, b in times)
        result[str(V)] = {"seconds": times, "without": without, "with": kept, "ratio": ratio}
        rows.append((f"{V:,}", f"{without:.3f}", f"{kept:.3f}", f"{ratio:.3f} ×"))
    save("allocator", result, rows, options)
    return result


def step_seconds(kept: bool, V: int, sizes: Sizes) -> float:
    """Median seconds of a training step in this process."""
    if kept:
        keep_freed_memory()
    table = random_table(V, sizes.D)
    loader = WindowLoader(random_stream(2 * sizes.step, table, sizes.C), sizes.history, sizes.step, seed=1)
    step = our_step(our_model(table, sizes), endless(loader), torch.device("cpu"))
    step()
    return statistics.median(seconds_of(step) for _ in range(4))


if __name__ == "__main__":
    main()
