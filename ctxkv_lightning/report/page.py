"""`report.md` and the short table of the terminal, both from `metrics.json` alone.

MB is 2^20 bytes and KB 10^3, as in the published tables; every PPL is per token of this run's tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report.figures import draw_all, encoders
from ctxkv_lightning.report.kept import cache_section, decoder_section, kept_sentence, window_section
from ctxkv_lightning.report.markdown import flat, percent, ppl, ratio, table, thinned
from ctxkv_lightning.run.folder import RunFolder

Metrics = dict[str, Any]

FOOTING = {
    "unigram": "unigram model",
    "kneser_ney": "Kneser-Ney trigram",
    "kneser_ney_cache": "Kneser-Ney trigram + cache",
}
"""Entry of `footing` without its ending, and what the page calls it."""

ORDINALS = ("First", "Second")
"""What the encoders of a model with two are called, in their order."""

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
        *window_section(metrics),
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
        *cache_section(metrics),
        *decoder_section(metrics),
        *_origin(metrics),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def summary(metrics: Metrics) -> str:
    """One paragraph of plain words, whichever way the numbers fall."""
    data, train, result = (metrics[key] for key in ("data", "train", "result"))
    column, ours = ("test", result["test_ppl"]) if _has_test(metrics) else ("validation", result["val_ppl"])
    verdicts = [_verdict(name, ours, _footing(metrics, key, test=column == "test")) for key, name in FOOTING.items()]
    sentences = [
        f"Trained on {data['train_tokens']:,} tokens, the model was best at epoch {train['best_epoch']} of "
        f"{len(train['epochs'])}: a validation PPL of {ppl(result['val_ppl'])}, "
        f"and {percent(result['val_accuracy'])} of the next tokens right.",
        f"On the test text, read once at the end, its PPL is {ppl(result['test_ppl'])}."
        if result.get("test_ppl") is not None
        else "",
        f"On the same {column} tokens it is {', '.join(verdicts[:-1])}, and {verdicts[-1]}.",
        "Training stopped when validation no longer improved."
        if train["stopped_early"]
        else "Training ran to its last epoch without an early stop.",
        kept_sentence(metrics),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def summary_table(metrics: Metrics) -> Table:
    """What the terminal shows when a run ends: about a dozen rows that fit in 80 columns."""
    train, result, parameters = metrics["train"], metrics["result"], metrics["parameters"]
    rows = {
        "training tokens": f"{metrics['data']['train_tokens']:,}",
        "parameters": f"{parameters['total']:,} ({parameters['trainable']:,} trained)",
        **_pretrain_rows(metrics["pretrain"]),
        "best epoch": f"{train['best_epoch']} of {len(train['epochs'])}",
        "validation PPL": ppl(result["val_ppl"]),
        "validation accuracy": percent(result["val_accuracy"]),
        "test PPL": ppl(result.get("test_ppl")),
    }
    for key, name in FOOTING.items():
        test = _footing(metrics, key, test=True)
        rows[f"{name}, PPL"] = ppl(_footing(metrics, key)) + (f" (test {ppl(test)})" if test is not None else "")
    rows["total time"] = f"{metrics['seconds']['total']:,.1f} s"
    shown = Table(show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column()
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def _pretrain_rows(pretrain: Metrics | None) -> dict[str, str]:
    if pretrain is None:
        return {}
    each = encoders(pretrain)
    converged = "; ".join(
        f"iteration {phase['iterations']}, {percent(phase['convergence_rate'])} converged"
        + (f", {len(phase['lm_history'])} epochs as a language model" if phase.get("lm_history") else "")
        + (" (reused)" if phase.get("reused") else "")
        for phase in each
    )
    return {"Phase 1": converged, "effective rank": ", ".join(percent(phase["effective_rank"]) for phase in each)}


def _text(metrics: Metrics) -> list[str]:
    def count(key: str) -> str:
        return f"{data[key]:,}" if data.get(key) is not None else "–"

    data = metrics["data"]
    names = {"train": "train", "val": "validation", "test": "test"}
    rows = [(names[key], count(f"{key}_documents"), count(f"{key}_tokens")) for key in names]
    note = f"Vocabulary: {count('vocab_size')} tokens. SHA-256 of the text: `{data['sha256']}`."
    return ["## Text", table(("Stream", "Documents", "Tokens"), rows), note]


def _settings(metrics: Metrics) -> list[str]:
    rows = [(f"`{key}`", value) for key, value in flat(metrics["config"])]
    return ["## Settings", table(("Key", "Value"), rows, left=2)]


def _parameters(metrics: Metrics) -> list[str]:
    parameters = metrics["parameters"]
    parts = [key for key in parameters if key not in ("total", "trainable")]
    names = {"ffn": "feed-forward", "trainable": "trained"}
    rows = [
        (names.get(key, key.replace("_", " ")), f"{parameters[key]:,}", percent(parameters[key] / parameters["total"]))
        for key in (*parts, "total", "trainable")
    ]
    return ["## Parameters", table(("Part", "Parameters", "Share"), rows), *_ngram(metrics.get("ngram"))]


def _ngram(counted: Mapping[str, int] | None) -> list[str]:
    if counted is None:
        return []
    return [
        f"Besides, {counted['bytes'] / 2**20:,.1f} MB of counts that are not trained: {counted['bigrams']:,} bigrams "
        f"and {counted['trigrams']:,} trigrams of the training text."
    ]


def _pretrain(metrics: Metrics) -> list[str]:
    if metrics["pretrain"] is None:
        return []
    each = encoders(metrics["pretrain"])
    reasons = {"target": "target reached", "plateau": "no more progress", "limit": "iteration limit"}
    columns = [
        (
            f"{phase['iterations']:,}",
            reasons.get(phase.get("stopped_by", ""), "–"),
            percent(phase["convergence_rate"]),
            percent(phase["effective_rank"]),
            f"{phase['seconds']:,.1f}",
            "reused from the cache" if phase.get("reused") else "trained in this run",
            f"{metrics['contexts']['seam_error']:.1e}",
        )
        for phase in each
    ]
    names = (
        *("Iterations", "Stopped by", "Convergence rate", "Effective rank", "Seconds", "Encoder"),
        "Error of the stored contexts at a seam",
    )
    head = ("Quantity", *([f"{name} encoder" for name in ORDINALS] if len(each) > 1 else ["Value"]))
    blocks = ["## Phase 1", table(head, list(zip(names, *columns, strict=True)))]
    for phase, ordinal in zip(each, ORDINALS, strict=False):
        of = f", {ordinal.lower()} encoder" if len(each) > 1 else ""
        blocks += [f"### Convergence by iteration{of}", _history(phase)]
        if phase.get("lm_history"):
            blocks += [f"### Then, as a language model{of}", _lm_history(phase)]
    return blocks


def _lm_history(phase: Metrics) -> str:
    rows = [(row["epoch"], ppl(row["train_ppl"]), f"{row['seconds']:,.1f}") for row in thinned(phase["lm_history"])]
    return table(("Epoch", "Train PPL", "Seconds"), rows, left=0)


def _history(phase: Metrics) -> str:
    if not phase["history"]:
        return "The history of this encoder was not stored."
    history = [
        (row["iteration"], f"{row['loss']:.4f}", percent(row["convergence_rate"]), f"{row['seconds']:,.2f}")
        for row in thinned(phase["history"])
    ]
    return table(("Iteration", "Loss", "Converged", "Seconds"), history, left=0)


def _epochs(metrics: Metrics) -> list[str]:
    epochs, best = metrics["train"]["epochs"], metrics["train"]["best_epoch"]
    rows = [
        (
            f"**{row['epoch']}**" if row["epoch"] == best else row["epoch"],
            ppl(row["train_ppl"]),
            f"**{ppl(row['val_ppl'])}**" if row["epoch"] == best else ppl(row["val_ppl"]),
            percent(row["val_accuracy"]),
            f"{row['seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "best" if row["epoch"] == best else "",
        )
        for row in thinned(epochs, keep=[row["epoch"] for row in epochs].index(best), limit=40)
    ]
    head = ("Epoch", "Train PPL", "Validation PPL", "Accuracy", "Seconds", "Tokens/s", "")
    return ["## Phase 2, epoch by epoch", table(head, rows, left=0)]


def _result(metrics: Metrics) -> list[str]:
    result = metrics["result"]
    ours = f"this model, epoch {metrics['train']['best_epoch']}"
    rows = [(ours, ppl(result["val_ppl"]), "1.00 ×", ppl(result.get("test_ppl")), "1.00 ×")]
    for key, name in FOOTING.items():
        val, test = _footing(metrics, key), _footing(metrics, key, test=True)
        ratios = ratio(result["val_ppl"], val), ratio(result.get("test_ppl"), test)
        rows.append((name, ppl(val), ratios[0], ppl(test), ratios[1]))
    head = ("Model", "Validation PPL", "Ours / its", "Test PPL", "Ours / its")
    accuracy = f"Accuracy of this model: validation {percent(result['val_accuracy'])}"
    if result.get("test_accuracy") is not None:
        accuracy += f", test {percent(result['test_accuracy'])}"
    note = (
        "All rows were trained on the same tokens and scored on the same tokens; where ours / its is below 1, ours is "
        "the better model. The weights of the trigram's mixture with its cache were chosen on validation."
    )
    return ["## Result, and its footing", table(head, rows), f"{accuracy}. {note}"]


def _gap(metrics: Metrics) -> list[str]:
    epochs = {row["epoch"]: row for row in metrics["train"]["epochs"]}
    best, last = epochs[metrics["train"]["best_epoch"]], list(epochs.values())[-1]
    rows = [
        (
            f"{name} ({row['epoch']})",
            ppl(row["train_ppl"]),
            ppl(row["val_ppl"]),
            ppl(gap),
            ratio(row["val_ppl"], row["train_ppl"]),
        )
        for name, row, gap in (
            ("best", best, metrics["result"]["train_val_gap"]),
            ("last", last, last["val_ppl"] - last["train_ppl"]),
        )
    ]
    head = ("Epoch", "Train PPL", "Validation PPL", "Gap", "Ratio")
    return ["## Overfitting", table(head, rows), "The gap is validation minus train PPL, the ratio their quotient."]


def _seconds(metrics: Metrics) -> list[str]:
    seconds = metrics["seconds"]
    total = seconds["total"]
    rows = [
        (stage, f"{spent:,.1f}", percent(spent / total if total else None))
        for stage, spent in sorted(seconds.items(), key=lambda item: item[0] == "total")
    ]
    return ["## Time by stage", table(("Stage", "Seconds", "Share"), rows)]


def _memory(metrics: Metrics) -> list[str]:
    def size(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [(row["stage"], size(row["cpu_gb"]), size(row.get("gpu_gb"))) for row in metrics["memory"]]
    return ["## Memory by stage", table(("Stage", "CPU GB", "GPU GB"), rows)] if rows else []


def _origin(metrics: Metrics) -> list[str]:
    rows = [*flat(metrics["versions"]), *flat(metrics.get("machine", {}))]
    return ["## Versions and machine", table(("What", "Which"), rows, left=2)]


def _has_test(metrics: Metrics) -> bool:
    return None not in (metrics["result"].get("test_ppl"), *(_footing(metrics, key, test=True) for key in FOOTING))


def _footing(metrics: Metrics, key: str, test: bool = False) -> float | None:
    footing = metrics["footing"]
    return footing.get(f"test_{key}_ppl") if test else footing[f"{key}_ppl"]


def _verdict(name: str, ours: float, its: float | None) -> str:
    assert its is not None
    share = ours / its - 1
    if abs(share) < 0.005:
        return f"level with the {name} ({ppl(its)})"
    better, lower = ("better", "lower") if share < 0 else ("worse", "higher")
    return f"{better} than the {name} ({ppl(its)}; ours is {100 * abs(share):.0f} % {lower})"
