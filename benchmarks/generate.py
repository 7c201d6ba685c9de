"""Decoding: time a token, peak memory and bytes kept as the text grows, and what a long prompt costs.

One text, on the model as published, untrained: time does not depend on the weights. Each model decodes in a process of
its own, on one thread unless `--threads` says otherwise. At each length the prompt is read in parallel, then a
stretch of steps is timed in blocks that alternate between the lengths, so that a slow stretch of the machine hits all;
the time a token is the median step of a block's. Recomputing a window of 640 tokens for every token is the baseline of
decoding, stepping through the prompt, extrapolated from a stretch in its middle, that of reading it. Peak memory is
what no file backs while steps are taken, in a process of its own for every length.
"""

import ctypes
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import AnonymousPeak, anonymous_bytes, in_fresh_process, parse, parser, save, seconds_of
from benchmarks.workload import FULL, QUICK, Sizes
from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.rivals import TransformerLM
from ctxkv_lightning.lm.state import Keep
from ctxkv_lightning.run.machine import keep_freed_memory

SYSTEMS: dict[str, Keep] = {
    "context_kv": "contexts", "context_kv, kv": "kv", "grid": "contexts", "sliding_window": "kv", "transformer": "kv",
}  # fmt: skip
CONSTANT = [name for name in SYSTEMS if name != "transformer"]
WINDOW_TOKENS = 104
"""Of the sliding window: as many as keep no more bytes than the contexts."""

BLOCKS = 10


def build(name: str, V: int, sizes: Sizes) -> TiedLM:
    """The untrained model of this system."""
    torch.manual_seed(42)
    D, H, F = sizes.D, sizes.heads, sizes.ffn
    if name in ("sliding_window", "transformer"):
        return TransformerLM(V, D, H, F, 0.0, WINDOW_TOKENS if name == "sliding_window" else None)
    selection = "grid" if name == "grid" else "strided"
    return ContextKVLM(V, D, sizes.C, H, sizes.interval, sizes.max_contexts, F, 0.0, selection)  # type: ignore[arg-type]


def measure(name: str, V: int, sizes: Sizes, lengths: list[int], steps: int, threads: int) -> dict[str, Any]:
    """What decoding after so many tokens takes; to be called in a fresh process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model, keep = build(name, V, sizes), SYSTEMS[name]
    texts = {N: torch.randint(V, (1, N)) for N in lengths}
    decoders = {N: Decoder(model, keep=keep) for N in lengths}
    warm = Decoder(model, keep=keep)
    warm.read(texts[lengths[0]])
    firsts = {N: seconds_of(lambda N=N: decoders[N].read(texts[N])) for N in lengths}  # type: ignore[misc]
    per_step: dict[int, list[float]] = {N: [] for N in lengths}
    for _ in range(BLOCKS):
        for N in lengths:
            per_step[N].append(statistics.median(timed_steps(decoders[N], max(1, steps // BLOCKS), V)))
    return {
        str(N): {
            "milliseconds_per_token": 1e3 * statistics.median(per_step[N]),
            "blocks": [1e3 * block for block in per_step[N]],
            "state_bytes": decoders[N].bytes(),
            "first_token_seconds": firsts[N],
        }
        for N in lengths
    }


def peak_of_steps(name: str, V: int, sizes: Sizes, N: int, steps: int, threads: int) -> int:
    """Largest memory that no file backs, in bytes, while steps are taken after N tokens; needs a fresh process."""
    torch.set_num_threads(threads)
    decoder = Decoder(build(name, V, sizes), keep=SYSTEMS[name])
    decoder.read(torch.randint(V, (1, N)))
    timed_steps(decoder, 3, V)
    if sys.platform == "linux":  # what reading has freed is no longer counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_bytes()
    with AnonymousPeak(interval=0.001) as peak:
        timed_steps(decoder, steps, V)
    return before + peak.bytes


def timed_steps(decoder: Decoder, steps: int, V: int) -> list[float]:
    """Seconds of each of so many steps, on random tokens."""
    return [seconds_of(lambda token=token: decoder.step(token)) for token in torch.randint(V, (steps, 1))]  # type: ignore[misc]


def recomputed(V: int, sizes: Sizes, steps: int, threads: int) -> dict[str, float]:
    """Milliseconds a token of recomputing the window from its tokens, contexts included, against one step's."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = build("context_kv", V, sizes).eval()
    N = sizes.interval * sizes.max_contexts
    window, decoder = torch.randint(V, (N,)), Decoder(model)
    decoder.read(window[None])
    pairs = [
        (seconds_of(lambda: last_logits(model, window)), statistics.median(timed_steps(decoder, 20, V)))  # type: ignore[attr-defined]
        for _ in range(steps)
    ]
    window_ms, step_ms = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"window_tokens": N, "recompute_ms": window_ms, "step_ms": step_ms, "ratio": ratio}


@torch.inference_mode()
def last_logits(model: TiedLM, tokens: Tensor) -> Tensor:
    """Logits (V,) after tokens (N,), everything computed anew; only the last position goes through the head."""
    ids, index = tokens.unique(return_inverse=True)
    contexts = solve_contexts(model.encoders()[0], model.embed(ids), ids=index)[0]
    return model.logits(model(model.embed(tokens[None, -1:]), contexts[None])[0, -1])


def long_prompt(V: int, sizes: Sizes, N: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of N: read in parallel, and, extrapolated, by stepping through it."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = build("context_kv", V, sizes)
    text = torch.randint(V, (1, N))
    Decoder(model).read(text[:, :1000])
    read = statistics.median(seconds_of(reading(model, text)) for _ in range(3))
    half = Decoder(model)
    half.read(text[:, : N // 2])
    step = statistics.mean(timed_steps(half, steps, V))
    return {"tokens": N, "read_seconds": read, "measured_steps": steps, "step_seconds": step, "ratio": N * step / read}


def reading(model: TiedLM, text: Tensor) -> Callable[[], Tensor]:
    """Reads the text with a new decoder."""
    return lambda: Decoder(model).read(text)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures every system at every length, then recomputing, then the long prompt."""
    made = parser(__doc__)
    made.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    made.add_argument("--million", action="store_true", help="also 1,000,000 tokens, where memory does not grow")
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--steps", type=int, default=400, help="timed steps at each length")
    made.add_argument("--threads", type=int, default=1)
    options = parse(made, argv)
    if options.quick:
        sizes, lengths, V, steps = QUICK, [20, 60], 50, 20
    else:
        sizes, lengths, V, steps = FULL, sorted(options.lengths), options.vocabulary, options.steps
    apart = in_this_process if options.quick else in_fresh_process
    more = [1_000_000] if options.million and not options.quick else []
    systems = {
        name: apart(measure, name, V, sizes, lengths + (more if name in CONSTANT else []), steps, options.threads)
        for name in SYSTEMS
    }
    for name, at in systems.items():
        for N, measured in at.items():
            arguments = (name, V, sizes, int(N), steps // 4, options.threads)
            measured["peak_anonymous_bytes"] = apart(peak_of_steps, *arguments)
    grown = {
        name: at[str(lengths[-1])]["milliseconds_per_token"] / at[str(lengths[0])]["milliseconds_per_token"]
        for name, at in systems.items()
    }
    result = {
        "vocabulary": V,
        "threads": options.threads,
        "systems": systems,
        "longest_to_shortest": grown,
        "against_recomputing": apart(recomputed, V, sizes, max(1, steps // 20), options.threads),
        "prompt": apart(long_prompt, V, sizes, lengths[-1], steps, options.threads),
    }
    save("generate", result, _rows(result), options)
    return result


def in_this_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Where sizes are tiny, numbers mean nothing, and a process would take longer than what it measures."""
    return function(*arguments)


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["system", "tokens", "ms/token", "KB kept", "peak, MB", "read, s"]]
    for name, lengths in result["systems"].items():
        for N, at in lengths.items():
            kept, peak = f"{at['state_bytes'] / 1e3:,.1f}", f"{at['peak_anonymous_bytes'] / 1e6:,.1f}"
            step, first = f"{at['milliseconds_per_token']:.3f}", f"{at['first_token_seconds']:.3f}"
            rows.append([name, f"{int(N):,}", step, kept, peak, first])
        rows.append([name, "longest / shortest", f"{result['longest_to_shortest'][name]:.3f} ×", "", "", ""])
    again, prompt = result["against_recomputing"], result["prompt"]
    rows.append([f"recomputing {again['window_tokens']} tokens", "", f"{again['recompute_ms']:.3f}", "", "", ""])
    rows.append(["recomputing / a step", "", f"{again['ratio']:.1f} ×", "", "", ""])
    tokens, stepped = f"{prompt['tokens']:,}", f"{prompt['tokens'] * prompt['step_seconds']:.1f}"
    rows.append(["stepping through, extrapolated", tokens, "", "", "", stepped])
    rows.append(["reading", tokens, "", "", "", f"{prompt['read_seconds']:.3f}"])
    return [*rows, ["stepping / reading", "", "", "", "", f"{prompt['ratio']:.1f} ×"]]


if __name__ == "__main__":
    main()
