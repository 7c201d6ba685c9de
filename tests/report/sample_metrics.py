"""A whole `metrics.json`, with the numbers of the published run (DESIGN §2) where it gave any, and made-up sweeps."""

import json
import math
import random
from pathlib import Path
from typing import Any

TRAIN_TOKENS, VAL_TOKENS, TEST_TOKENS, VOCABULARY, D, C = 122_794, 22_800, 24_310, 50_257, 768, 256
TRAIN_PPL = [3085.4, 413.9, 276.8, 199.0, 148.7, 111.5, 81.9, 59.8]
VAL_PPL = [572.0, 436.8, 380.3, 374.2, 361.0, 387.9, 424.1, 484.4]
VAL_ACCURACY = [0.116, 0.137, 0.151, 0.157, 0.162, 0.155, 0.161, 0.160]


def sample_metrics(
    epochs: int = 8, iterations: int = 18, heads: int = 8, max_contexts: int = 32, interval: int = 20
) -> dict[str, Any]:
    """The metrics of a run with at most 8 `epochs` and any number of Phase 1 `iterations`, 0 included."""
    rows = _epochs(epochs)
    best = min(rows, key=lambda row: row["val_ppl"])
    return {
        "config": _config(interval, heads, max_contexts),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6", "ctxkv_lightning": "0.1.0"},
        "machine": {"device": "cpu", "precision": "32-true", "threads": 2, "processor": "x86_64"},
        **_sizes(),
        "window": {
            "interval": interval,
            "max_contexts": max_contexts,
            "span_tokens": (max_contexts - 1) * interval + 1,
            "theoretical_max": TRAIN_TOKENS // interval + 1,
        },
        "pretrain": _pretrain(iterations),
        "contexts": _contexts(),
        "train": {"epochs": rows, "best_epoch": best["epoch"], "stopped_early": epochs == 8},
        "result": {
            "val_ppl": best["val_ppl"],
            "val_accuracy": best["val_accuracy"],
            "test_ppl": 372.6,
            "test_accuracy": 0.159,
            "train_val_gap": best["val_ppl"] - best["train_ppl"],
        },
        **_measured(),
        "seconds": {"text": 1.1, "pretrain": 7.0, "contexts": 0.6, "train": 89.2, "total": 97.9},
        "attention": {"slot_weights": [_slot_weights(head, max_contexts) for head in range(heads)]},
    }


def _sizes() -> dict[str, Any]:
    return {
        "data": {
            "train_tokens": TRAIN_TOKENS,
            "val_tokens": VAL_TOKENS,
            "test_tokens": TEST_TOKENS,
            "train_documents": 100,
            "val_documents": 20,
            "test_documents": 21,
            "vocab_size": VOCABULARY,
            "sha256": "5f2b" * 16,
        },
        "parameters": {
            "total": 45_163_264,
            "trainable": 6_301_440,
            "embedding": 38_597_376,
            "embedding_norm": 1_536,
            "encoder": 262_912,
            "attention": 1_577_472,
            "ffn": 4_723_968,
        },
    }


def _measured() -> dict[str, Any]:
    return {
        "footing": {
            "unigram_ppl": 982.0,
            "kneser_ney_ppl": 407.0,
            "kneser_ney_cache_ppl": 128.0,
            "test_unigram_ppl": 1004.1,
            "test_kneser_ney_ppl": 415.3,
            "test_kneser_ney_cache_ppl": 133.9,
        },
        "memory": [
            {"stage": "text", "cpu_gb": 0.61, "gpu_gb": None},
            {"stage": "pretrain", "cpu_gb": 1.32, "gpu_gb": None},
            {"stage": "contexts", "cpu_gb": 1.38, "gpu_gb": None},
            {"stage": "train", "cpu_gb": 2.71, "gpu_gb": None},
        ],
    }


def model_metrics(
    model: str = "context_kv",
    *,
    seed: int = 42,
    samples: int = 100,
    interval: int | list[int] = 20,
    max_contexts: int = 32,
    selection: str = "strided",
    window_tokens: int | None = None,
    val_ppl: float | None = None,
) -> dict[str, Any]:
    """The metrics of a run of any model as the pipeline writes them now; PPL follows a made-up law unless given."""
    metrics = sample_metrics(interval=20, max_contexts=max_contexts)
    config = metrics["config"]
    config.update(interval=interval, selection=selection, seed=seed, samples=samples)
    config["model"].update(name=model, window_tokens=window_tokens)
    metrics["data"]["train_documents"] = samples
    span = (max_contexts - 1) * (max(interval) if isinstance(interval, list) else interval) + 1
    k = window_tokens or max(1, span * C // (2 * D))
    metrics["window"] = _window(model, interval, max_contexts, selection, span, k)
    metrics["decode_state"] = _decode_state(model, max_contexts if selection == "grid" else span, k)
    if model in ("transformer", "sliding_window"):
        metrics["pretrain"] = metrics["contexts"] = None
    if model == "cascade":
        metrics["pretrain"]["encoders"] = [_pretrain(18), {**_pretrain(9), "effective_rank": 0.8}]
    intervals = interval if isinstance(interval, list) else [interval] * 8
    distances = [[slot * each for slot in range(max_contexts)] for each in intervals]
    metrics["attention"] = {**metrics["attention"], "distances": distances} if model == "context_kv" else None
    ppl = val_ppl or _law(model, samples, intervals, max_contexts, selection, k, seed)
    _scale(metrics, ppl / metrics["result"]["val_ppl"])
    return metrics


def _window(
    model: str, interval: int | list[int], max_contexts: int, selection: str, span: int, k: int
) -> dict[str, Any]:
    if model != "context_kv":
        spans = {"transformer": None, "sliding_window": k}
        nothing = dict.fromkeys(("interval", "max_contexts", "selection", "theoretical_max"))
        return {**nothing, "span_tokens": spans.get(model, 1)}
    least = min(interval) if isinstance(interval, list) else interval
    return {
        "interval": interval,
        "max_contexts": max_contexts,
        "selection": selection,
        "span_tokens": span,
        "theoretical_max": TRAIN_TOKENS // least + 1,
    }


def _decode_state(model: str, contexts: int, k: int) -> dict[str, Any]:
    def bytes_at(tokens: int) -> int:
        match model:
            case "context_kv":
                return min(contexts, tokens) * C * 4
            case "transformer":
                return tokens * 2 * D * 4
            case "sliding_window":
                return min(k, tokens) * 2 * D * 4
            case _:
                return (2 if model == "cascade" else 1) * C * 4

    shapes = {"transformer": {"kv": [1, 8, 1000, 192]}, "sliding_window": {"kv": [1, 8, k, 192]}}
    contexts_shape = {"context": [1, C], "contexts": [1, contexts - 1, C]}
    alone = {"context": [1, 2 * C if model == "cascade" else C]}
    tensors = shapes.get(model, contexts_shape if model == "context_kv" else alone)
    return {"tensors": tensors, "bytes": {str(n): bytes_at(n) for n in (1_000, 10_000, 100_000)}}


def _law(model: str, samples: int, intervals: list[int], max_contexts: int, selection: str, k: int, seed: int) -> float:
    floor = {"transformer": 96.0, "context_kv": 128.0, "sliding_window": 140.0, "cascade": 171.0}.get(model, 205.0)
    if model == "context_kv":
        floor *= 1 + 0.06 * abs(math.log(sum(intervals) / len(intervals) / 14)) + 0.7 / max_contexts
        floor *= 1.035 if selection == "grid" else 1
    if model == "sliding_window":
        floor *= 1 + 1.1 / math.sqrt(k)
    noise = random.Random(f"{model} {samples} {seed} {intervals} {max_contexts} {selection}").gauss(0, 0.012)
    return (floor + 9000 * samples**-0.8) * (1 + noise)


def _scale(metrics: dict[str, Any], factor: float) -> None:
    for row in metrics["train"]["epochs"]:
        row["train_ppl"] *= factor**0.7
        row["val_ppl"] *= factor
    best = min(metrics["train"]["epochs"], key=lambda row: row["val_ppl"])
    result = metrics["result"]
    result.update(
        val_ppl=best["val_ppl"],
        test_ppl=result["test_ppl"] * factor,
        train_val_gap=best["val_ppl"] - best["train_ppl"],
        val_accuracy=0.162 * factor**-0.4,
    )


def write_run(folder: Path, metrics: dict[str, Any]) -> Path:
    """A finished run's folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def write_status(folder: Path, state: str, reason: str | None, **config: Any) -> Path:
    """The folder of a trial that left nothing but its status."""
    folder.mkdir(parents=True)
    status = {
        "state": state,
        "reason": reason,
        "overrides": [f"{key}={value}" for key, value in config.items()],
        "config": config,
        "started": "2026-11-24T09:00:00",
        "ended": None if state == "running" else "2026-11-24T09:01:00",
        "pid": 4711,
        "host": "here",
    }
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


def write_sweep(folder: Path) -> Path:
    """Five models and the choices of context_kv at several samples, three seeds each, and two trials that failed."""
    rivals = [{"model": model} for model in ("transformer", "sliding_window", "recurrence", "cascade", "context_kv")]
    trials: list[dict[str, Any]] = [
        {**rival, "samples": samples, "seed": seed}
        for rival in rivals
        for samples in (50, 100, 250, 500)
        for seed in (1, 2, 3)
    ]
    choices = [{"selection": "grid"}, {"interval": [1, 1, 5, 5, 20, 20, 80, 80]}, {"interval": 50}, {"interval": 5}]
    trials += [{**choice, "samples": 500, "seed": seed} for choice in choices for seed in (1, 2, 3)]
    trials += [{"model": "sliding_window", "window_tokens": k, "samples": 500, "seed": 1} for k in (16, 32, 64, 256)]
    for number, trial in enumerate(trials):
        write_run(folder / str(number), model_metrics(**trial))
    write_status(folder / "900", "failed", "interval=200000 must be below the 109,863 training tokens", interval=200000)
    write_status(folder / "901", "interrupted", "signal 15")
    return folder


def _config(interval: int, heads: int, max_contexts: int) -> dict[str, Any]:
    return {
        "interval": interval,
        "heads": heads,
        "max_contexts": max_contexts,
        "context_dim": C,
        "samples": 100,
        "seed": 42,
        "embeddings": "table",
        "data": {"source": "pydocs", "files": [], "errors": "strict"},
        "tokenizer": {"source": "tiktoken", "vocab_size": 8192, "name": "gpt2"},
        "embedding": {"source": "svd", "dim": D, "window": 4},
        "pretrain": {"max_iterations": 60, "lr": 0.002, "target_rate": 0.9, "plateau_rate": 0.5},
        "contexts": {"tolerance": 1e-05},
        "model": {"name": "context_kv", "dropout": 0.1, "ffn_dim": 3072},
        "train": {"lr": 0.001, "weight_decay": 0.01, "batch_tokens": 8880, "max_epochs": 40, "patience": 3},
        "trainer": {"accelerator": "auto", "precision": "auto", "enable_progress_bar": None},
    }


def _epochs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": 1 + i,
            "train_ppl": TRAIN_PPL[i],
            "val_ppl": VAL_PPL[i],
            "val_accuracy": VAL_ACCURACY[i],
            "seconds": 11.0 + 0.1 * i,
            "tokens_per_second": 11_012.4 - 40.0 * i,
        }
        for i in range(count)
    ]


def _pretrain(iterations: int) -> dict[str, Any]:
    history = [
        {
            "iteration": i,
            "loss": -0.008 - 0.21 * (1 - math.exp(-i / 6)),
            "convergence_rate": 0.92 * math.sin(math.pi / 2 * (i - 1) / max(1, iterations - 1)),
            "seconds": 0.39,
        }
        for i in range(1, iterations + 1)
    ]
    return {
        "iterations": iterations,
        "convergence_rate": history[-1]["convergence_rate"] if history else 0.92,
        "effective_rank": 0.822,
        "seconds": 7.0,
        "reused": not history,
        "stopped_by": "target",
        "history": history,
        # This decay has an effective rank of 82.2 %.
        "singular_values": [900 * math.exp(-2.308 * i / C) for i in range(C)],
    }


def _contexts() -> dict[str, Any]:
    tokens = TRAIN_TOKENS + VAL_TOKENS + TEST_TOKENS
    return {
        "seconds": 0.6,
        "seam_error": 3.1e-06,
        "reused": False,
        "bytes": {
            "train_context": TRAIN_TOKENS * C * 4,
            "val_context": VAL_TOKENS * C * 4,
            "test_context": TEST_TOKENS * C * 4,
            "table": VOCABULARY * D * 4,
            "as_tokens": tokens * D * 4,
            "as_table": VOCABULARY * D * 4,
        },
    }


def _slot_weights(head: int, slots: int) -> list[float]:
    raw = [math.exp(-slot / (2 + 3 * head)) + 0.12 + 0.01 * math.sin(slot + head) for slot in range(slots)]
    return [weight / sum(raw) for weight in raw]
