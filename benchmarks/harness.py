"""What all benchmarks share: interleaved timing, fresh processes, peak memory, the result file and its table.

Times are `time.perf_counter` after a synchronisation where there is a GPU. Knows nothing of what is measured.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console
from rich.table import Table

from ctxkv_lightning.run.machine import cpu_multiplies_bf16, describe_versions

RESULTS = Path(__file__).parent / "results"
Result = TypeVar("Result")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the JSON (default: benchmarks/results)")
    made.add_argument("--quick", action="store_true", help="tiny sizes, for tests; writes only where --output says")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `output` None where nothing is to be written, and `command`: what was typed but the folder."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = made.parse_args(argv)
    options.command = _without_output(argv)
    if options.output is None and not options.quick:
        options.output = RESULTS
    return options


def clock() -> float:
    """Seconds by `time.perf_counter`, once the GPU, if there is one, has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    """Duration of one call."""
    started = clock()
    call()
    return clock() - started


def pairs(
    baseline: Callable[[], Any], ours: Callable[[], Any], repeats: int = 3, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Times of both callables, run A B A B, and the ratio baseline / ours pair by pair.

    A slow stretch of the machine hits both members of a pair, so it hardly moves the ratio.
    """
    for _ in range(warmup):
        baseline()
        ours()
    times = [(seconds_of(baseline), seconds_of(ours)) for _ in range(repeats)]
    first, second = ([pair[i] for pair in times] for i in (0, 1))
    ratios = [a / b for a, b in times]
    return {
        "baseline": {"seconds": first, "median": statistics.median(first)},
        "ours": {"seconds": second, "median": statistics.median(second)},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a new interpreter, so that its peak memory is its own; both must pickle."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    # ru_maxrss of a fresh process starts at its parent's; the kernel's high-water mark starts at nothing.
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs: mapped stores do not count (where the kernel tells)."""
    anonymous = _status("RssAnon")
    return psutil.Process().memory_info().rss if anonymous is None else anonymous


class AnonymousPeak:
    """Samples `anonymous_bytes` while the block runs; `bytes` is the largest seen beyond that at the start."""

    def __init__(self, interval: float = 0.005) -> None:
        self.interval, self.bytes = interval, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "AnonymousPeak":
        self._start = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)


def machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU, and whether either multiplies bf16."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "cpu_bf16": cpu_multiplies_bf16(),
        "gpu_bf16": torch.cuda.is_bf16_supported(including_emulation=False) if gpu else False,
    }


def save(name: str, result: dict[str, Any], rows: Iterable[Sequence[str]], options: argparse.Namespace) -> None:
    """Prints `rows`, the first of them the header, and writes `name`.json where `options` say so, all or nothing."""
    _print(name, list(rows))
    if options.output is None:
        return
    record = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks." + name, *options.command]),
        "machine": machine(),
        "versions": describe_versions(),
        "result": result,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    part = options.output / f".{name}.{os.getpid()}.part"
    part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, options.output / f"{name}.json")


def spread(ratio: dict[str, float]) -> str:
    """`median × (min to max)` of a ratio from `pairs`."""
    return f"{ratio['median']:.2f} × ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _print(title: str, rows: list[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def _without_output(argv: list[str]) -> list[str]:
    # The folder is a path of this machine and no part of what was measured.
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--output"):
            kept.append(word)
        skip = word == "--output"
    return kept


def _status(field: str) -> int | None:
    """A size from /proc/self/status in bytes; None where there is no such file or field."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith(field + ":")]
    return int(sizes[0][1]) * 1024 if sizes else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
