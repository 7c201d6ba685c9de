"""A step of decoding compiled by torch.compile against the eager one, and after how many tokens compiling pays.

The published model, untrained, on one thread unless `--threads` says otherwise, in blocks of steps that alternate.
Compiled is all arithmetic of a step; where in the ring its contexts stand is found in Python, for a graph that sees the
position is compiled anew at every token. Compiling is timed twice, in fresh processes: with nothing compiled before,
and with what the first one left on the disk.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.generate import build
from benchmarks.harness import in_fresh_process, pairs, parse, parser, save, seconds_of, spread
from benchmarks.workload import FULL, QUICK, Sizes
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.run.machine import keep_freed_memory

TIMES = {"new": "for the first time", "again": "again, from what is on the disk"}

CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledDecoder(Decoder):
    """Goes on where a decoder of the published selection stands, with a compiled step.

    So much must have been read that every step reads as many contexts as the next.
    """

    def __init__(self, model: ContextKVLM, after: Decoder) -> None:
        super().__init__(model)
        self.position = after.position
        self.state = {name: kept.clone() for name, kept in after.state.items()}
        self._compiled = torch.compile(self._arithmetic)

    @torch.no_grad()  # the compiler cannot alter the tensors of inference mode
    def step(self, tokens: Tensor) -> Tensor:
        """As `Decoder.step`."""
        ring = self.rings["contexts"]
        past = ring.past(self.state["contexts"], self.position, ring.interval)
        logits, context = self._compiled(tokens, self.state["context"], past)
        self.state["context"].copy_(context)
        self.state["contexts"][:, ring.row(self.position)] = context
        self.position += 1
        return logits

    def _arithmetic(self, tokens: Tensor, before: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and the new context (B, C), from the context before and those in the ring (B, m, C)."""
        model = self.model
        assert isinstance(model, ContextKVLM)
        attention = model.attention
        embedding = model.embed(tokens)
        (encoder,) = self.encoders
        now = encoder(before, model.encoder_input(tokens))
        keys, values = (part.weight.unflatten(0, (attention.heads, -1)) for part in (attention.key, attention.value))
        query = attention.ask(embedding).unflatten(1, (attention.heads, -1))
        asked = torch.einsum("bhd,hdc->bhc", query, keys) * attention.head_dim**-0.5
        seen = torch.cat([now[:, None], past], dim=1)
        mean = (asked @ seen.transpose(1, 2)).softmax(dim=-1) @ seen
        mixed = torch.einsum("bhc,hdc->bhd", mean, values) + attention.value.bias.unflatten(0, (attention.heads, -1))
        hidden = model.ffn(attention.combine(embedding[:, None], mixed[:, :, None], now[:, None]))[:, 0]
        return model.logits(hidden), now


def measure(V: int, sizes: Sizes, steps: int, blocks: int, threads: int) -> dict[str, Any]:
    """Blocks of so many steps, eager and compiled, over a full ring; to be called in a fresh process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = build("context_kv", V, sizes)
    assert isinstance(model, ContextKVLM)
    eager = Decoder(model)
    eager.read(torch.randint(V, (1, sizes.interval * sizes.max_contexts)))
    compiled = CompiledDecoder(model, eager)
    token, graphs = torch.randint(V, (1,)), counters["stats"]
    first = seconds_of(lambda: compiled.step(token))
    eager.step(token)
    apart = max(difference(eager.step(token), compiled.step(token)) for token in torch.randint(V, (steps, 1)))
    made = graphs["unique_graphs"]
    timed = pairs(block(eager, V, steps), block(compiled, V, steps), blocks)
    if graphs["unique_graphs"] != made:
        raise RuntimeError("a graph was compiled while steps were timed: their times say nothing")
    step_ms, ours_ms = (1e3 * timed[side]["median"] / steps for side in ("baseline", "ours"))
    return {
        "eager_ms": step_ms,
        "compiled_ms": ours_ms,
        "ratio": timed["ratio"],
        "compile_seconds": first - ours_ms / 1e3,
        "largest_difference": apart,
        "tokens_to_earn_back": tokens_to_earn_back(first, step_ms / 1e3, ours_ms / 1e3),
    }


def difference(logits: Tensor, other: Tensor) -> float:
    """The largest between two (B, V) of logits, as a share of the largest logit."""
    return float((logits - other).abs().max() / logits.abs().max())


def tokens_to_earn_back(first: float, eager: float, compiled: float) -> int | None:
    """Tokens after which compiling has cost no time, of seconds for the first step and for each; None for never."""
    return math.ceil((first - compiled) / (eager - compiled)) if compiled < eager else None


def block(decoder: Decoder, V: int, steps: int) -> Callable[[], None]:
    """So many steps on random tokens."""

    def take() -> None:
        for token in torch.randint(V, (steps, 1)):
            decoder.step(token)

    return take


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures with nothing on the disk, then with what that left there."""
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=1)
    options = parse(made, argv)
    sizes, V, steps, blocks = (QUICK, 50, 5, 1) if options.quick else (FULL, 8192, 50, 20)
    kept = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            found = {name: in_fresh_process(measure, V, sizes, steps, blocks, options.threads) for name in TIMES}
        finally:
            os.environ.pop(CACHE) if kept is None else os.environ.update({CACHE: kept})
    result = {"vocabulary": V, "threads": options.threads, **found}
    rows = [["compiled", "eager, ms", "compiled, ms", "eager / compiled", "compiling, s", "tokens to earn it back"]]
    for name, at in found.items():
        earned = "never" if at["tokens_to_earn_back"] is None else f"{at['tokens_to_earn_back']:,}"
        times = [f"{at['eager_ms']:.3f}", f"{at['compiled_ms']:.3f}", spread(at["ratio"])]
        rows.append([TIMES[name], *times, f"{at['compile_seconds']:.1f}", earned])
    save("compile_step", result, rows, options)
    return result


if __name__ == "__main__":
    main()
