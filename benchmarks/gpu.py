"""The GPU set in one command: Phase 2 at V=50,257, contexts, decoding, the whole experiment at the published size.

The experiment runs through the real pipeline, Phase 1 to report, on synthetic tokens and a table of noise in place of
GPT-2's: its perplexity means nothing, its times do. The published run took 97.9 s on an L4.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import contexts
from benchmarks.experiment import QUICK as QUICK_CONFIG
from benchmarks.harness import parse, parser, save, seconds_of
from benchmarks.workload import (
    FULL,
    QUICK,
    Sizes,
    endless,
    our_model,
    our_step,
    product_chain,
    random_stream,
    random_table,
    zipf_tokens,
)
from ctxkv_lightning import pipeline
from ctxkv_lightning.config import Config, EmbeddingConfig, TrainConfig
from ctxkv_lightning.errors import EXIT_CODE
from ctxkv_lightning.lm import generate
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.state import Keep
from ctxkv_lightning.report.page import write_report
from ctxkv_lightning.run.callbacks import Stages, announcing
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.machine import compile_mode
from ctxkv_lightning.store import create_array, get_or_build
from ctxkv_lightning.windows import WindowLoader

V = 50_257
TRAIN_TOKENS = 122_794
HELD_OUT = 22_800
LOOPED = 10_000
"""Tokens that the step-by-step loop is timed on, of which a GPU makes a few thousand a second."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
"""Dense bf16 peaks from the makers' data sheets."""


def phase2(sizes: Sizes, vocabulary: int, device: torch.device, steps: int, compiled: bool = False) -> dict[str, Any]:
    """Training tokens per second with the stream on the device, and ours as a share of the bare products."""
    table = random_table(vocabulary, sizes.D)
    stream = random_stream(14 * sizes.step + 1, table, sizes.C)
    stream = stream.to(device)
    batches = endless(WindowLoader(stream, sizes.history, sizes.step, seed=42))
    model = our_model(table, sizes).to(device)
    step = our_step(model, batches, device)
    if compiled:
        model.compile(mode=compile_mode("cuda"))
    first = seconds_of(lambda: [step() for _ in range(14)])  # a pass: windows of every shape
    chain = product_chain(vocabulary, sizes, device)
    ours, bare = (statistics.median(_per_call(call, steps)) for call in (step, chain))
    rate = sizes.step / ours
    return {
        "tokens_per_second": rate,
        "milliseconds_per_step": 1e3 * ours,
        "first_pass_seconds": first,
        "percent_of_chain": 100 * bare / ours,
        "percent_of_peak": _percent_of_peak(rate, sizes, vocabulary, device),
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def decoding(sizes: Sizes, vocabulary: int, device: torch.device, steps: int) -> dict[str, Any]:
    """Milliseconds of a step of one text, its rings full, as a recorded graph and launched anew, by what is kept."""
    model, token = our_model(random_table(vocabulary, sizes.D), sizes).to(device), torch.zeros(1, dtype=torch.long)
    prompt, found = torch.from_numpy(zipf_tokens(sizes.history + 2, vocabulary)).long()[None].to(device), {}
    for keep in get_args(Keep):
        times = {}
        for name, devices in (("eager", ()), ("graph", generate.GRAPHED)):
            with patch.object(generate, "GRAPHED", devices):
                decoder, now = Decoder(model, keep=keep), token.to(device)
                decoder.read(prompt)
                times[name] = 1e3 * statistics.median(_per_call(lambda d=decoder, t=now: d.step(t), steps))
        found[keep] = {**times, "ratio": times["eager"] / times["graph"]}
    return found


def _per_call(call: Any, calls: int, runs: int = 5) -> list[float]:
    """Seconds per call in each of some runs; the clock waits for the device once a run."""

    def run() -> None:
        for _ in range(calls):
            call()

    run()
    return [seconds_of(run) / calls for _ in range(runs)]


def _percent_of_peak(rate: float, sizes: Sizes, vocabulary: int, device: torch.device) -> float | None:
    """Share of the data sheet's bf16 peak, by the products that training needs; None for an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = [peak for known, peak in PEAK_FLOPS.items() if known in name]
    D, C = sizes.D, sizes.C
    body = 2 * D * D + 2 * C * D + 2 * D * sizes.ffn
    with_input_gradient = D * D + 2 * D * sizes.ffn
    flops = 2 * (2 * body + with_input_gradient + 2 * D * vocabulary)
    return 100 * rate * flops / peaks[0] if peaks else None


def experiment(config: Config, tokens: int, held_out: int, vocabulary: int) -> dict[str, Any]:
    """The pipeline after tokenisation, into a folder that vanishes; seconds by stage and by epoch."""
    with TemporaryDirectory(prefix="ctxkv-benchmark-") as folder:
        config = replace(config, cache_dir=str(Path(folder) / "cache"))
        if config.embedding.source == "gpt2":
            weights = Path(folder) / "gpt2.safetensors"
            save_file({"wte.weight": random_table(vocabulary, FULL.D)}, weights)
            config = replace(config, embedding=replace(config.embedding, file=str(weights)))
        text, stages = _synthetic_text(config, tokens, held_out, vocabulary), Stages()
        run = RunFolder.claim(Path(folder) / "run")
        with announcing():
            metrics = pipeline.run_stages(config, run, text, stages)
            run.write_metrics(metrics)
            with stages("report"):
                write_report(run)
    epochs = metrics["train"]["epochs"]
    return {
        "tokens": tokens,
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "epochs": len(epochs),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in epochs),
        "phase1_iterations": metrics["pretrain"]["iterations"],
    }


def _synthetic_text(config: Config, tokens: int, held_out: int, vocabulary: int) -> pipeline.Text:
    sizes = {"train": tokens, "validation": held_out, "test": held_out}

    def build(folder: Path) -> None:
        for seed, (name, n) in enumerate(sizes.items()):
            create_array(folder, name, (n,), np.int32)[:] = zipf_tokens(n, vocabulary, seed)

    store = get_or_build(config.cache_dir, "tokens", {"synthetic": sizes, "V": vocabulary}, build)
    return pipeline.Text(dict.fromkeys(sizes, ()), store, vocabulary, None)


def published_size() -> Config:
    """The published settings, eight epochs long whatever the perplexity does."""
    train = TrainConfig(max_epochs=8, patience=8)
    return Config(embedding=EmbeddingConfig(source="gpt2"), train=train)


def measure(quick: bool, device: torch.device) -> dict[str, Any]:
    """The four measurements."""
    if quick:
        config = replace(QUICK_CONFIG, embedding=EmbeddingConfig(source="random", dim=32))
        return {
            "phase2": {"eager": phase2(QUICK, 100, device, 1)},
            "contexts": contexts.measure(600, 50, QUICK.D, QUICK.C, device, 1),
            "decoding": decoding(QUICK, 100, device, 2),
            "experiment": experiment(config, 3000, 500, 300),
        }
    return {
        "experiment": experiment(published_size(), TRAIN_TOKENS, HELD_OUT, V),
        "phase2": {name: phase2(FULL, V, device, 40, name == "compiled") for name in ("eager", "compiled")},
        "contexts": contexts.measure(LOOPED, V, FULL.D, FULL.C, device, 3),
        "decoding": decoding(FULL, V, device, 200),
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """What the issue asks for, one figure a line."""
    solved, whole = result["contexts"], result["experiment"]
    stages = [[f"  {name}, s", f"{seconds:.2f}"] for name, seconds in whole["seconds"].items() if name != "total"]
    return [
        ["measured", "value"],
        *(row for mode, phase in result["phase2"].items() for row in _phase2_rows(mode, phase)),
        [f"contexts of {solved['tokens']:,} tokens, s", f"{solved['ours']['median']:.3f}"],
        ["  times faster than the loop", f"{solved['ratio']['median']:.1f}"],
        ["  max error", f"{solved['max_error']:.1e}"],
        *(row for keep, times in result["decoding"].items() for row in _decoding_rows(keep, times)),
        [f"whole experiment, {whole['epochs']} epochs, s", f"{whole['seconds']['total']:.2f}"],
        *stages,
        ["  Phase 2 in the trainer, tokens/s", f"{whole['tokens_per_second']:,.0f}"],
    ]


def _phase2_rows(mode: str, phase: dict[str, Any]) -> list[list[str]]:
    peak = phase["percent_of_peak"]
    return [
        [f"Phase 2 step, {mode}, tokens/s", f"{phase['tokens_per_second']:,.0f}"],
        ["  % of bf16 peak", "unknown" if peak is None else f"{peak:.1f}"],
        ["  % of its bare products", f"{phase['percent_of_chain']:.0f}"],
        ["  first pass over 14 steps, s", f"{phase['first_pass_seconds']:.1f}"],
    ]


def _decoding_rows(keep: str, times: dict[str, float]) -> list[list[str]]:
    return [
        [f"decoding step over {keep}, ms", f"{times['graph']:.3f}"],
        ["  times faster than launching it anew", f"{times['ratio']:.1f}"],
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures on the current GPU; without one, says so and exits with code 2."""
    options = parse(parser(__doc__), argv)
    if not torch.cuda.is_available():
        print("error: benchmarks.gpu needs a CUDA GPU and torch sees none: run it where there is one.", file=sys.stderr)
        raise SystemExit(EXIT_CODE)
    result = measure(options.quick, torch.device("cuda"))
    save("gpu", result, rows(result), options)
    return result


if __name__ == "__main__":
    main()
