"""The page's sections on memory: what a position reads, what the stores hold, what a decoder keeps."""

from typing import Any

from ctxkv_lightning.report.markdown import kilobytes, megabytes, table
from ctxkv_lightning.windows import WINDOW

Metrics = dict[str, Any]


def kept_sentence(metrics: Metrics) -> str:
    """What a decoder keeps, in one sentence that is true of this model."""
    window = metrics["window"]
    if "decode_state" not in metrics:
        kept = window["span_tokens"] * metrics["config"]["context_dim"] * 4
        return (
            f"However long the text, a decoder keeps at most {window['span_tokens']:,} contexts: "
            f"{kept:,} bytes ({kilobytes(kept)}) in fp32."
        )
    bytes_at = metrics["decode_state"]["bytes"]
    last = bytes_at["100000"]
    if window["span_tokens"] is None:
        return (
            f"What a decoder keeps grows with the text: {kilobytes(bytes_at['1000'])} in fp32 after 1,000 tokens, "
            f"{kilobytes(bytes_at['10000'])} after 10,000 and {kilobytes(last)} after 100,000. PPL is "
            f"measured as it was trained, with the last {WINDOW:,} tokens in reach, or somewhat more."
        )
    if last == bytes_at["10000"] or window["span_tokens"] <= 100_000:
        return f"However long the text, a decoder keeps at most {last:,} bytes ({kilobytes(last)}) in fp32."
    return (
        f"After 100,000 tokens a decoder keeps {last:,} bytes ({kilobytes(last)}) in fp32, and its window of "
        f"{window['span_tokens']:,} tokens is not yet full."
    )


def window_section(metrics: Metrics) -> list[str]:
    """What one position reads; nothing for models that read neither contexts nor tokens by a window."""
    window = metrics["window"]
    if window["interval"] is not None:
        return ["## Context window", table(("Quantity", "Value"), _window_rows(metrics)), _window_note(window)]
    if metrics["config"]["model"]["name"] == "sliding_window":
        rows = [("Tokens read at a position, its own included", f"{window['span_tokens']:,}")]
        return ["## Token window", table(("Quantity", "Value"), rows)]
    return []


def _window_rows(metrics: Metrics) -> list[tuple[str, str]]:
    window, C = metrics["window"], metrics["config"]["context_dim"]
    interval, M = window["interval"], window["max_contexts"]
    by_head = isinstance(interval, list)
    rows = [
        ("Interval I, by head" if by_head else "Interval I", _intervals(interval)),
        ("Contexts read at a position, M", f"{M:,}"),
        ("Theoretical contexts, N / I + 1", f"{window['theoretical_max']:,}"),
        ("Tokens of history, M × I", _intervals([M * i for i in interval] if by_head else M * interval)),
    ]
    if "decode_state" not in metrics:
        span = window["span_tokens"]
        kept = f"{span * C * 4:,} ({kilobytes(span * C * 4)})"
        return [*rows, ("Contexts a decoder must keep", f"{span:,}"), ("Bytes of those in fp32", kept)]
    grid = window.get("selection") == "grid"
    selection = "grid: the current one and multiples of I" if grid else "strided: every I-th back from the current one"
    return [("Selection", selection), *rows]


def _intervals(interval: int | list[int]) -> str:
    return ", ".join(f"{each:,}" for each in interval) if isinstance(interval, list) else f"{interval:,}"


def _window_note(window: Metrics) -> str:
    if window.get("selection") == "grid":
        return (
            "All positions between two multiples of the interval read the same stored contexts, so a decoder keeps "
            "what it reads and no more."
        )
    return (
        "Successive positions read different contexts, so a decoder keeps more of them than it reads at "
        "once; their number does not grow with the text."
    )


def cache_section(metrics: Metrics) -> list[str]:
    """Bytes of the stored contexts and embeddings; nothing for models that read tokens."""
    if metrics["contexts"] is None:
        return []
    sizes = metrics["contexts"]["bytes"]
    stored = {name: count for name, count in sizes.items() if name not in ("as_table", "as_tokens")}
    chosen = metrics["config"]["embeddings"]
    if f"as_{chosen}" in sizes and not any(name == "table" or name.endswith("_embedding") for name in stored):
        stored["embeddings"] = sizes[f"as_{chosen}"]
    rows = [(name.replace("_", " "), megabytes(count)) for name, count in stored.items()]
    rows.append(("total", megabytes(sum(stored.values()))))
    blocks = ["## Cache", table(("Tensor", "MB"), rows)]
    if "as_table" in sizes and "as_tokens" in sizes:
        ways = [
            ("`table`, a row per vocabulary entry", megabytes(sizes["as_table"])),
            ("`tokens`, a row per token of the text", megabytes(sizes["as_tokens"])),
        ]
        note = f"The same embeddings both ways; this run used `embeddings={chosen}`."
        blocks += [note, table(("`embeddings=`", "MB"), ways)]
    return blocks


def decoder_section(metrics: Metrics) -> list[str]:
    """What a decoder keeps after so many tokens: counted from its tensors, or by formula in old metrics."""
    if "decode_state" not in metrics:
        return _decoder_by_formula(metrics)
    state, config = metrics["decode_state"], metrics["config"]
    pair = 2 * config["embedding"]["dim"] * config["model"].get("layers", 1)
    tensors = [(f"`{name}`", " × ".join(f"{n:,}" for n in shape)) for name, shape in state["tensors"].items()]
    grows = metrics["window"]["span_tokens"] is None
    head = ("Tokens read", "Bytes", "MB", *(() if grows else ("Full attention of the same width and depth, MB",)))
    rows = [
        (f"{int(n):,}", f"{count:,}", megabytes(count), *(() if grows else (megabytes(int(n) * pair * 4),)))
        for n, count in state["bytes"].items()
    ]
    note = (
        "Counted from the tensors of a real decoder of one text, in fp32. "
        "In all tables MB is 2^20 bytes, and KB is 1,000 bytes."
    )
    shapes = table(("Tensor, after 10,000 tokens", "Shape"), tensors)
    return ["## What a decoder keeps", shapes, table(head, rows, left=0), note]


def _decoder_by_formula(metrics: Metrics) -> list[str]:
    C, D = metrics["config"]["context_dim"], metrics["config"]["embedding"]["dim"]
    span = metrics["window"]["span_tokens"]
    rows = [
        (
            f"{n:,}",
            megabytes(min(n, span) * C * 4),
            megabytes(min(n, span) * 2 * D * 4),
            megabytes(n * 2 * D * 4),
        )
        for n in (1_000, 10_000, 100_000)
    ]
    head = ("Tokens read", "Contexts, MB", "Their keys and values, MB", "Full attention of the same width, MB")
    note = (
        f"In fp32, for one layer: a context has {C:,} numbers, a key and a value {D:,} each. "
        "In all tables MB is 2^20 bytes, and KB is 1,000 bytes."
    )
    return ["## What a decoder keeps", table(head, rows, left=0), note]
