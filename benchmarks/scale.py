"""Time per token and peak memory as the stream grows: building the context store, then a fixed number of steps.

Each size runs in a process of its own, on synthetic tokens, through the real stores and data module. Memory that
files back (the mapped stores) may be as large as it likes; what counts is the anonymous rest.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import AnonymousPeak, in_fresh_process, parse, parser, peak_bytes, save
from benchmarks.workload import (
    FULL,
    QUICK,
    Sizes,
    endless,
    our_model,
    our_step,
    random_table,
    with_dims,
    zipf_tokens,
)
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.pretrain import save_encoder
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.store import Store, create_array, get_or_build

HELD_OUT = 2000
PIECE = 1 << 20


def measure(N: int, V: int, sizes: Sizes, steps: int, scratch: str | None) -> dict[str, Any]:
    """Build and training of a stream of N tokens; to be called in a fresh process."""
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="ctxkv-benchmark-", dir=scratch) as folder:
        data = _data(Path(folder), N, V, sizes)
        started = time.perf_counter()
        with AnonymousPeak() as building:
            data.prepare_data()
        built = time.perf_counter() - started
        with AnonymousPeak() as training:
            trained, positions = _train(data, sizes, steps)
        stored = data.context_stores()[0].size("train")
    tokens = N + 2 * HELD_OUT
    return {
        "tokens": N,
        "build": {
            "seconds": built,
            "microseconds_per_token": 1e6 * built / tokens,
            "anonymous_gb": building.bytes / 1e9,
        },
        "train": {
            "steps": steps,
            "seconds": trained,
            "microseconds_per_token": 1e6 * trained / positions,
            "anonymous_gb": training.bytes / 1e9,
        },
        "context_store_gb": stored / 1e9,
        "peak_resident_gb": peak_bytes() / 1e9,
    }


def _train(data: ContextDataModule, sizes: Sizes, steps: int) -> tuple[float, int]:
    """Seconds and positions of `steps` training steps, after one that does not count."""
    data.setup("fit")
    step = our_step(our_model(data.table, sizes), endless(data.train_dataloader()), torch.device("cpu"))  # type: ignore[arg-type]
    step()
    started = time.perf_counter()
    positions = sum(step() for _ in range(steps))
    return time.perf_counter() - started, positions


def _data(root: Path, N: int, V: int, sizes: Sizes) -> ContextDataModule:
    """The data module over freshly written stores of tokens, table and an untrained encoder."""

    def tokens(folder: Path) -> None:
        for name, n in (("train", N), ("validation", HELD_OUT), ("test", HELD_OUT)):
            array = create_array(folder, name, (n,), np.int32)
            for start in range(0, n, PIECE):
                array[start : start + PIECE] = zipf_tokens(min(PIECE, n - start), V, seed=start)

    def table(folder: Path) -> None:
        create_array(folder, "table", (V, sizes.D), np.float32)[:] = random_table(V, sizes.D).numpy()

    def encoder(folder: Path) -> None:
        torch.manual_seed(42)
        save_encoder(ContextEncoder(sizes.C, sizes.D), folder)

    stores: dict[str, Store] = {
        build.__name__: get_or_build(root, build.__name__, {"N": N}, build) for build in (tokens, table, encoder)
    }
    return ContextDataModule(
        tokens=str(stores["tokens"].path),
        embedding=str(stores["table"].path),
        encoders=[str(stores["encoder"].path)],
        cache_dir=str(root),
        history=sizes.history,
        batch_tokens=sizes.step,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures every size; the ratios are those of the largest to the smallest."""
    made = parser(__doc__)
    made.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], metavar="N")
    made.add_argument("--steps", type=int, default=5, help="training steps that are timed at each size")
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--dim", type=int, help="embedding dimension (default 768)")
    made.add_argument("--context-dim", type=int, help="context dimension (default 256)")
    made.add_argument("--scratch", help="folder for the stores: 1 KB a token at the default dimensions")
    options = parse(made, argv)
    if options.quick:
        sizes, counts, steps, V = QUICK, [3000, 6000], 1, 50
    else:
        sizes, counts, steps, V = FULL, sorted(options.sizes), options.steps, options.vocabulary
    sizes = with_dims(sizes, options.dim, options.context_dim)
    runs = [in_fresh_process(measure, N, V, sizes, steps, options.scratch) for N in counts]
    ratios = {
        part: runs[-1][part]["microseconds_per_token"] / runs[0][part]["microseconds_per_token"]
        for part in ("build", "train")
    }
    result = {"vocabulary": V, "D": sizes.D, "C": sizes.C, "runs": runs, "largest_to_smallest": ratios}
    save("scale", result, _rows(result), options)
    return result


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["tokens", "build, µs/token", "build, GB", "train, µs/token", "train, GB", "store, GB"]]
    for run in result["runs"]:
        figures = [
            f"{value:.2f}"
            for part in ("build", "train")
            for value in (run[part]["microseconds_per_token"], run[part]["anonymous_gb"])
        ]
        rows.append([f"{run['tokens']:,}", *figures, f"{run['context_store_gb']:.2f}"])
    ratios = [f"{result['largest_to_smallest'][part]:.2f} ×" for part in ("build", "train")]
    return [*rows, ["largest / smallest", ratios[0], "", ratios[1], "", ""]]


if __name__ == "__main__":
    main()
