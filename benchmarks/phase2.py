"""Phase 2 training speed against the published method and against its own matrix products, and its peak memory.

Ours trains in bf16 where the processor multiplies it, the published method in fp32; both make steps of 8,880
positions on synthetic data. Memory is that of a fresh process, beyond what it held before the
first step: libraries, weights, stores mapped and read through.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import (
    AnonymousPeak,
    in_fresh_process,
    pairs,
    parse,
    parser,
    peak_bytes,
    save,
    seconds_of,
    spread,
)
from benchmarks.published import PublishedLM, Split
from benchmarks.workload import (
    FULL,
    QUICK,
    Sizes,
    compute_type,
    endless,
    our_model,
    our_step,
    product_chain,
    published_step,
    random_stream,
    random_table,
)
from ctxkv_lightning.run.machine import keep_freed_memory
from ctxkv_lightning.store import create_array
from ctxkv_lightning.windows import Stream, WindowLoader

STEPS = 4
"""Steps' worth of positions in the stream."""


def speed(V: int, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Training tokens per second of ours and of the published method, and ours as a share of the bare products.

    The two methods run by turns in processes of their own, each with the allocator it would have.
    """
    rounds = [
        [in_fresh_process(step_seconds, method, V, sizes) for method in ("published", "ours")] for _ in range(repeats)
    ]
    seconds = dict(zip(("published", "ours"), zip(*rounds, strict=True), strict=True))
    ratios = [published / ours for published, ours in rounds]
    bound = in_fresh_process(against_products, V, sizes, 2 * repeats)
    return {
        "positions": sizes.step,
        "compute_type": str(compute_type(_device())).removeprefix("torch."),
        "device": _device().type,
        "seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "tokens_per_second": {name: sizes.step / statistics.median(times) for name, times in seconds.items()},
        "chain": {**bound, "tokens_per_second": sizes.step / bound["baseline"]["median"]},
        "percent_of_chain": {name: 100 * value for name, value in bound["ratio"].items()},
    }


def step_seconds(method: str, V: int, sizes: Sizes) -> float:
    """Median seconds of a training step of `ours` or of `published`; to be called in a fresh process."""
    device, table = _device(), random_table(V, sizes.D)
    stream = random_stream(STEPS * sizes.step + 1, table, sizes.C)
    if method == "ours":
        keep_freed_memory()  # as a run does
        step, steps = _our_step(table, stream, sizes), 4
    else:
        model = PublishedLM(table, sizes.C, sizes.heads, sizes.interval, sizes.max_contexts, sizes.ffn).to(device)
        step, steps = published_step(model, Split(*(x.to(device) for x in Split.of(stream))), sizes.step), 1
    step()
    return statistics.median(seconds_of(step) for _ in range(steps))


def against_products(V: int, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Our step and the bare chain of its products, in pairs; to be called in a fresh process."""
    keep_freed_memory()
    table = random_table(V, sizes.D)
    stream = random_stream(STEPS * sizes.step + 1, table, sizes.C)
    return pairs(product_chain(V, sizes, _device()), _our_step(table, stream, sizes), repeats)


def _our_step(table: Tensor, stream: Stream, sizes: Sizes) -> Callable[[], int]:
    loader = WindowLoader(stream, sizes.history, sizes.step, seed=42)
    return our_step(our_model(table, sizes).to(_device()), endless(loader), _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory(V: int, sizes: Sizes, steps: int) -> dict[str, float]:
    """Memory of `steps` training steps on mapped stores, in GB (10⁹ bytes); to be called in a fresh process."""
    keep_freed_memory()
    libraries = peak_bytes()
    with TemporaryDirectory(prefix="ctxkv-benchmark-") as folder:
        stream = _mapped(Path(folder), V, sizes)
        model = our_model(stream.embeddings, sizes)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        step = our_step(model, endless(WindowLoader(stream, sizes.history, sizes.step, seed=42)), torch.device("cpu"))
        for part in (*stream[:3], *stream.contexts):
            float(part.sum())  # reads every page, so that mapped memory counts before the first step
        gc.collect()
        ready = peak_bytes()
        with AnonymousPeak() as sampled:
            for _ in range(steps):
                step()
        peak = peak_bytes()
    found = {"libraries": libraries, "weights": weights, "ready": ready, "peak": peak}
    # The high-water mark is exact but counts from the highest point of setting up; sampling may miss a short peak.
    found |= {"beyond_mark": peak - ready, "beyond_sampled": sampled.bytes}
    found["beyond"] = max(found["beyond_mark"], found["beyond_sampled"])
    return {f"{name}_gb": value / 1e9 for name, value in found.items()}


def _mapped(folder: Path, V: int, sizes: Sizes) -> Stream:
    """A random stream whose embeddings and contexts are memory-mapped files."""
    plain = random_stream(STEPS * sizes.step + 1, random_table(V, sizes.D), sizes.C)
    mapped = {}
    for name, values in (("embeddings", plain.embeddings), ("contexts", plain.contexts[0])):
        create_array(folder, name, tuple(values.shape), np.float32)[:] = values.numpy()
        mapped[name] = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
    return plain._replace(embeddings=mapped["embeddings"], contexts=(mapped["contexts"],))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures speed at each vocabulary and memory at the largest."""
    made = parser(__doc__)
    made.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50257], metavar="V")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--memory-steps", type=int, default=3)
    options = parse(made, argv)
    vocabularies = [100] if options.quick else options.vocabularies
    sizes, repeats, steps = (QUICK, 1, 1) if options.quick else (FULL, options.repeats, options.memory_steps)
    memory = in_fresh_process(peak_memory, max(vocabularies), sizes, steps)
    result: dict[str, Any] = {"memory": {"vocabulary": max(vocabularies), **memory}, "speed": {}}
    for V in vocabularies:
        result["speed"][str(V)] = speed(V, sizes, repeats)
    save("phase2", result, _rows(result), options)
    return result


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["V", "published, tokens/s", "ours, tokens/s", "ratio", "bare products, tokens/s", "% of them"]]
    for V, row in result["speed"].items():
        rates = [f"{row['tokens_per_second'][method]:,.0f}" for method in ("published", "ours")]
        chain = f"{row['chain']['tokens_per_second']:,.0f}"
        rows.append([V, *rates, spread(row["ratio"]), chain, f"{row['percent_of_chain']['median']:.0f}"])
    memory = result["memory"]
    beyond = f"{memory['beyond_gb']:.2f} GB beyond"
    return [*rows, [f"memory, V={memory['vocabulary']}", "", beyond, "", f"{memory['peak_gb']:.2f} GB in all", ""]]


if __name__ == "__main__":
    main()
