"""Parts of metrics.json that take more than a look at the configuration (its schema stands in DESIGN §4)."""

from typing import Any

import torch

from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.lm.attention import slot_distances
from ctxkv_lightning.lm.layers import local_reach
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.rivals import TransformerLM
from ctxkv_lightning.lm.state import kept_tensors, state_bytes
from ctxkv_lightning.store import Store

READ = (1_000, 10_000, 100_000)
"""Tokens read by a decoder whose state is measured."""


def describe_window(model: TiedLM, train_tokens: int) -> dict[str, Any]:
    """What the model reads at a position; null for what it does not have, and for the span of a whole text."""
    if isinstance(model, ContextKVLM):
        attention = model.attention
        intervals = attention.intervals
        return {
            "interval": intervals[0] if len(set(intervals)) == 1 else list(intervals),
            "max_contexts": attention.max_contexts,
            "selection": attention.selection,
            "span_tokens": (attention.max_contexts - 1) * max(intervals) + 1 + local_reach(model.layers),
            "theoretical_max": train_tokens // min(intervals) + 1,
        }
    span: int | None = 1
    if isinstance(model, TransformerLM):
        span = None if model.attention.window is None else local_reach(model.layers) + 1
    return {"interval": None, "max_contexts": None, "selection": None, "span_tokens": span, "theoretical_max": None}


def describe_pretrain(encoders: list[Store]) -> dict[str, Any] | None:
    """Phase 1's summary, of the first encoder where there are several; None where there is none."""
    if not encoders:
        return None
    each = [{**encoder.facts, "reused": encoder.reused} for encoder in encoders]
    return {**each[0], "encoders": each} if len(each) > 1 else each[0]


def describe_contexts(contexts: list[Store], data: ContextDataModule) -> dict[str, Any] | None:
    """Seconds, the worst seam and bytes of the stored contexts; None where the model reads none."""
    if not contexts:
        return None
    return {
        "seam_error": max(store.facts["seam_error"] for store in contexts),
        "seconds": sum(store.facts["seconds"] for store in contexts),
        "reused": all(store.reused for store in contexts),
        "bytes": data.sizes(),
    }


@torch.no_grad()
def describe_attention(module: ContextKVLMModule, data: ContextDataModule) -> dict[str, Any] | None:
    """Mean weight and distance of each slot over the first validation windows; None without slots.

    n · H lists of M, where n layers read contexts.
    """
    model = module.model.cpu().eval()
    if not isinstance(model, ContextKVLM):
        return None
    windows, attention = next(iter(data.val_dataloader())), model.attention
    first = None if windows.first is None else windows.first.cpu()
    embeddings = model.embed(windows.tokens[:, -windows.embeddings.shape[1] :].cpu())
    weights = model.slot_weights(embeddings, windows.memory.cpu(), first)
    distances = slot_distances(attention.intervals, attention.max_contexts, attention.selection)
    layers = len(weights) // len(distances)
    return {"slot_weights": weights.tolist(), "distances": layers * distances.tolist()}


def describe_decode_state(model: TiedLM) -> dict[str, Any]:
    """Shapes and bytes of what a decoder of one text keeps, from the tensors it makes."""
    return {
        "tensors": {name: list(tensor.shape) for name, tensor in kept_tensors(model, READ[1]).items()},
        "bytes": {str(tokens): state_bytes(model, tokens) for tokens in READ},
    }


def describe_ngram(model: TiedLM) -> dict[str, int] | None:
    """What was counted, and its bytes beside the parameters; None where the recipe has no voice for counts."""
    expert = None if model.output is None else model.output.ngram
    if expert is None:
        return None
    size = sum(table.numel() * table.element_size() for table in expert.buffers())
    return {"bigrams": len(expert.bigram_grams), "trigrams": len(expert.trigram_grams), "bytes": size}
