"""`report.md` and the short table of the terminal, both from `metrics.json` alone.

MB is 2^20 bytes and KB 10^3, as in the published tables; every PPL is per token of this run's tokenizer.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report.figures import draw_all
from ctxkv_lightning.run.folder import RunFolder

Metrics = dict[str, Any]

FOOTING = {
    "unigram": "unigram model",
    "kneser_ney": "Kneser-Ney trigram",
    "kneser_ney_cache": "Kneser-Ney trigram + cache",
}
"""Entry of `footing` without its ending, and what the page calls it."""

CAPTIONS = {
    "pretrain": "Phase 1: the share of positions whose context has come to rest, and the loss, by iteration.",
    "spectrum": "Singular values of the training contexts: the flatter, the more dimensions carry something.",
    "perplexity": "Perplexity by epoch; the ring marks the epoch that is kept, grey lines the count-based models.",
    "attention": "Mean attention weight by distance; above the dashed line, a slot gets more than an equal share.",
}


def write_report(run: RunFolder) -> Path:
    """Draws the figures, writes `report.md`, returns its path; reads nothing but `metrics.json`.

    Raises UserError when `metrics.json` is missing, broken or lacks an entry, or the disk refuses.
    """
    metrics = run.read_metrics()
    try:
        figures = draw_all(metrics, run.figures)
        text = render(metrics, {path.stem: path.relative_to(run.path).as_posix() for path in figures})
    except KeyError as missing:
        raise UserError(f"{run.metrics} lacks the entry {missing}, run the experiment again.") from missing
    except OSError as error:
        raise UserError(f"Cannot draw into {run.figures} ({error.strerror}), make room or free the name.") from error
    run.write_report(text)
    return run.report


def render(metrics: Metrics, figures: dict[str, str]) -> str:
    """The page as Markdown; `figures` maps a figure's name to its link."""

    def figure(name: str) -> str:
        return f"![{name}]({figures[name]})\n\n*{CAPTIONS[name]}*" if name in figures else ""

    data = metrics["data"]
    blocks = [
        f"# {metrics['config']['model']['name']} on {metrics['config']['data']['source']}, "
        f"{data['train_tokens']:,} training tokens",
        summary(metrics),
        *_text(metrics),
        *_settings(metrics),
        *_window(metrics),
        *_parameters(metrics),
        *_pretrain(metrics),
        figure("pretrain"),
        figure("spectrum"),
        *_epochs(metrics),
        figure("perplexity"),
        *_result(metrics),
        *_gap(metrics),
        figure("attention"),
        *_seconds(metrics),
        *_memory(metrics),
        *_cache(metrics),
        *_decoder_memory(metrics),
        *_origin(metrics),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def summary(metrics: Metrics) -> str:
    """One paragraph of plain words, whichever way the numbers fall."""
    data, train, result, window = (metrics[key] for key in ("data", "train", "result", "window"))
    column, ours = ("test", result["test_ppl"]) if _has_test(metrics) else ("validation", result["val_ppl"])
    verdicts = [_verdict(name, ours, _footing(metrics, key, test=column == "test")) for key, name in FOOTING.items()]
    kept = window["span_tokens"] * metrics["config"]["context_dim"] * 4
    sentences = [
        f"Trained on {data['train_tokens']:,} tokens, the model was best at epoch {train['best_epoch']} of "
        f"{len(train['epochs'])}: a validation PPL of {_ppl(result['val_ppl'])}, "
        f"and {_percent(result['val_accuracy'])} of the next tokens right.",
        f"On the test text, read once at the end, its PPL is {_ppl(result['test_ppl'])}."
        if result.get("test_ppl") is not None
        else "",
        f"On the same {column} tokens it is {', '.join(verdicts[:-1])}, and {verdicts[-1]}.",
        "Training stopped when validation no longer improved."
        if train["stopped_early"]
        else "Training ran to its last epoch without an early stop.",
        f"However long the text, a decoder keeps at most {window['span_tokens']:,} contexts: "
        f"{kept:,} bytes ({kept / 1000:,.0f} KB) in fp32.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def summary_table(metrics: Metrics, report: Path | None = None) -> Table:
    """What the terminal shows when a run ends: about a dozen rows that fit in 80 columns."""
    train, result, pretrain = metrics["train"], metrics["result"], metrics["pretrain"]
    parameters = metrics["parameters"]
    reused = " (reused)" if pretrain.get("reused") else ""
    rows = {
        "training tokens": f"{metrics['data']['train_tokens']:,}",
        "parameters": f"{parameters['total']:,} ({parameters['trainable']:,} trained)",
        "Phase 1": f"iteration {pretrain['iterations']}, {_percent(pretrain['convergence_rate'])} converged{reused}",
        "effective rank": _percent(pretrain["effective_rank"]),
        "best epoch": f"{train['best_epoch']} of {len(train['epochs'])}",
        "validation PPL": _ppl(result["val_ppl"]),
        "validation accuracy": _percent(result["val_accuracy"]),
        "test PPL": _ppl(result.get("test_ppl")),
    }
    for key, name in FOOTING.items():
        test = _footing(metrics, key, test=True)
        rows[f"{name}, PPL"] = _ppl(_footing(metrics, key)) + (f" (test {_ppl(test)})" if test is not None else "")
    rows["total time"] = f"{metrics['seconds']['total']:,.1f} s"
    if report is not None:
        rows["report"] = str(report)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))  # Text: a path may hold [brackets], which are not markup
    return table


def _text(metrics: Metrics) -> list[str]:
    def count(key: str) -> str:
        return f"{data[key]:,}" if data.get(key) is not None else "–"

    data = metrics["data"]
    names = {"train": "train", "val": "validation", "test": "test"}
    rows = [(names[key], count(f"{key}_documents"), count(f"{key}_tokens")) for key in names]
    note = f"Vocabulary: {count('vocab_size')} tokens. SHA-256 of the text: `{data['sha256']}`."
    return ["## Text", _table(("Stream", "Documents", "Tokens"), rows), note]


def _settings(metrics: Metrics) -> list[str]:
    rows = [(f"`{key}`", value) for key, value in _flat(metrics["config"])]
    return ["## Settings", _table(("Key", "Value"), rows, left=2)]


def _window(metrics: Metrics) -> list[str]:
    window, C = metrics["window"], metrics["config"]["context_dim"]
    interval, M, span = window["interval"], window["max_contexts"], window["span_tokens"]
    rows = [
        ("Interval I", f"{interval:,}"),
        ("Contexts read at a position, M", f"{M:,}"),
        ("Theoretical contexts, N / I + 1", f"{window['theoretical_max']:,}"),
        ("Tokens of history, M × I", f"{M * interval:,}"),
        ("Contexts a decoder must keep", f"{span:,}"),
        ("Bytes of those in fp32", f"{span * C * 4:,} ({span * C * 4 / 1000:,.0f} KB)"),
    ]
    note = (
        "Successive positions read different contexts, so a decoder keeps more of them than it reads at "
        "once; their number does not grow with the text."
    )
    return ["## Context window", _table(("Quantity", "Value"), rows), note]


def _parameters(metrics: Metrics) -> list[str]:
    parameters = metrics["parameters"]
    parts = [key for key in parameters if key not in ("total", "trainable")]
    names = {"ffn": "feed-forward", "trainable": "trained"}
    rows = [
        (names.get(key, key.replace("_", " ")), f"{parameters[key]:,}", _percent(parameters[key] / parameters["total"]))
        for key in (*parts, "total", "trainable")
    ]
    return ["## Parameters", _table(("Part", "Parameters", "Share"), rows)]


def _pretrain(metrics: Metrics) -> list[str]:
    phase = metrics["pretrain"]
    reasons = {"target": "target reached", "plateau": "no more progress", "limit": "iteration limit"}
    rows = [
        ("Iterations", f"{phase['iterations']:,}"),
        ("Stopped by", reasons.get(phase.get("stopped_by"), "–")),
        ("Convergence rate", _percent(phase["convergence_rate"])),
        ("Effective rank", _percent(phase["effective_rank"])),
        ("Seconds", f"{phase['seconds']:,.1f}"),
        ("Encoder", "reused from the cache" if phase.get("reused") else "trained in this run"),
        ("Error of the stored contexts at a seam", f"{metrics['contexts']['seam_error']:.1e}"),
    ]
    blocks = ["## Phase 1", _table(("Quantity", "Value"), rows), "### Convergence by iteration"]
    if not phase["history"]:
        return [*blocks, "The history of this encoder was not stored."]
    history = [
        (row["iteration"], f"{row['loss']:.4f}", _percent(row["convergence_rate"]), f"{row['seconds']:,.2f}")
        for row in thinned(phase["history"])
    ]
    return [*blocks, _table(("Iteration", "Loss", "Converged", "Seconds"), history, left=0)]


def _epochs(metrics: Metrics) -> list[str]:
    epochs, best = metrics["train"]["epochs"], metrics["train"]["best_epoch"]
    rows = [
        (
            f"**{row['epoch']}**" if row["epoch"] == best else row["epoch"],
            _ppl(row["train_ppl"]),
            f"**{_ppl(row['val_ppl'])}**" if row["epoch"] == best else _ppl(row["val_ppl"]),
            _percent(row["val_accuracy"]),
            f"{row['seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "best" if row["epoch"] == best else "",
        )
        for row in thinned(epochs, keep=[row["epoch"] for row in epochs].index(best), limit=40)
    ]
    head = ("Epoch", "Train PPL", "Validation PPL", "Accuracy", "Seconds", "Tokens/s", "")
    return ["## Phase 2, epoch by epoch", _table(head, rows, left=0)]


def _result(metrics: Metrics) -> list[str]:
    result = metrics["result"]
    ours = f"this model, epoch {metrics['train']['best_epoch']}"
    rows = [(ours, _ppl(result["val_ppl"]), "1.00 ×", _ppl(result.get("test_ppl")), "1.00 ×")]
    for key, name in FOOTING.items():
        val, test = _footing(metrics, key), _footing(metrics, key, test=True)
        ratios = _ratio(result["val_ppl"], val), _ratio(result.get("test_ppl"), test)
        rows.append((name, _ppl(val), ratios[0], _ppl(test), ratios[1]))
    head = ("Model", "Validation PPL", "Ours / its", "Test PPL", "Ours / its")
    accuracy = f"Accuracy of this model: validation {_percent(result['val_accuracy'])}"
    if result.get("test_accuracy") is not None:
        accuracy += f", test {_percent(result['test_accuracy'])}"
    note = (
        "All rows were trained on the same tokens and scored on the same tokens; where ours / its is below 1, ours is "
        "the better model. The weights of the trigram's mixture with its cache were chosen on validation."
    )
    return ["## Result, and its footing", _table(head, rows), f"{accuracy}. {note}"]


def _gap(metrics: Metrics) -> list[str]:
    epochs = {row["epoch"]: row for row in metrics["train"]["epochs"]}
    best, last = epochs[metrics["train"]["best_epoch"]], list(epochs.values())[-1]
    rows = [
        (
            f"{name} ({row['epoch']})",
            _ppl(row["train_ppl"]),
            _ppl(row["val_ppl"]),
            _ppl(gap),
            _ratio(row["val_ppl"], row["train_ppl"]),
        )
        for name, row, gap in (
            ("best", best, metrics["result"]["train_val_gap"]),
            ("last", last, last["val_ppl"] - last["train_ppl"]),
        )
    ]
    head = ("Epoch", "Train PPL", "Validation PPL", "Gap", "Ratio")
    return ["## Overfitting", _table(head, rows), "The gap is validation minus train PPL, the ratio their quotient."]


def _seconds(metrics: Metrics) -> list[str]:
    seconds = metrics["seconds"]
    total = seconds["total"]
    rows = [
        (stage, f"{spent:,.1f}", _percent(spent / total if total else None))
        for stage, spent in sorted(seconds.items(), key=lambda item: item[0] == "total")
    ]
    return ["## Time by stage", _table(("Stage", "Seconds", "Share"), rows)]


def _memory(metrics: Metrics) -> list[str]:
    def size(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [(row["stage"], size(row["cpu_gb"]), size(row.get("gpu_gb"))) for row in metrics["memory"]]
    return ["## Memory by stage", _table(("Stage", "CPU GB", "GPU GB"), rows)] if rows else []


def _cache(metrics: Metrics) -> list[str]:
    sizes = metrics["contexts"]["bytes"]
    stored = {name: count for name, count in sizes.items() if name not in ("as_table", "as_tokens")}
    chosen = metrics["config"]["embeddings"]
    if f"as_{chosen}" in sizes and not any(name == "table" or name.endswith("_embedding") for name in stored):
        stored["embeddings"] = sizes[f"as_{chosen}"]
    rows = [(name.replace("_", " "), _mb(count)) for name, count in stored.items()]
    rows.append(("total", _mb(sum(stored.values()))))
    blocks = ["## Cache", _table(("Tensor", "MB"), rows)]
    if "as_table" in sizes and "as_tokens" in sizes:
        ways = [
            ("`table`, a row per vocabulary entry", _mb(sizes["as_table"])),
            ("`tokens`, a row per token of the text", _mb(sizes["as_tokens"])),
        ]
        note = f"The same embeddings both ways; this run used `embeddings={chosen}`."
        blocks += [note, _table(("`embeddings=`", "MB"), ways)]
    return blocks


def _decoder_memory(metrics: Metrics) -> list[str]:
    C, D = metrics["config"]["context_dim"], metrics["config"]["embedding"]["dim"]
    span = metrics["window"]["span_tokens"]
    rows = [
        (f"{n:,}", _mb(min(n, span) * C * 4), _mb(min(n, span) * 2 * D * 4), _mb(n * 2 * D * 4))
        for n in (1_000, 10_000, 100_000)
    ]
    head = ("Tokens read", "Contexts, MB", "Their keys and values, MB", "Full attention of the same width, MB")
    note = (
        f"In fp32, for one layer: a context has {C:,} numbers, a key and a value {D:,} each. "
        "In all tables MB is 2^20 bytes, and KB is 1,000 bytes."
    )
    return ["## What a decoder keeps", _table(head, rows, left=0), note]


def _origin(metrics: Metrics) -> list[str]:
    rows = [*_flat(metrics["versions"]), *_flat(metrics.get("machine", {}))]
    return ["## Versions and machine", _table(("What", "Which"), rows, left=2)]


def thinned(rows: Sequence[Any], keep: int | None = None, limit: int = 20) -> list[Any]:
    """About `limit` evenly spaced `rows` of a longer table; the first, the last and number `keep` always stay."""
    step = math.ceil(len(rows) / limit)
    return [row for i, row in enumerate(rows) if i % step == 0 or i in (keep, len(rows) - 1)]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table whose source is aligned too; the first `left` columns to the left, others to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flat(tree: Metrics, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested dict as dotted keys and values, written as on the command line."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _has_test(metrics: Metrics) -> bool:
    return None not in (metrics["result"].get("test_ppl"), *(_footing(metrics, key, test=True) for key in FOOTING))


def _footing(metrics: Metrics, key: str, test: bool = False) -> float | None:
    footing = metrics["footing"]
    return footing.get(f"test_{key}_ppl") if test else footing[f"{key}_ppl"]


def _verdict(name: str, ours: float, its: float | None) -> str:
    assert its is not None
    share = ours / its - 1
    if abs(share) < 0.005:
        return f"level with the {name} ({_ppl(its)})"
    better, lower = ("better", "lower") if share < 0 else ("worse", "higher")
    return f"{better} than the {name} ({_ppl(its)}; ours is {100 * abs(share):.0f} % {lower})"


def _ppl(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _ratio(ours: float | None, its: float | None) -> str:
    return "–" if ours is None or not its else f"{ours / its:.2f} ×"


def _mb(count: int) -> str:
    return f"{count / 2**20:,.2f}"
