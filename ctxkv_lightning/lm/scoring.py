"""Losses of a text of any length, computed in parallel and in blocks: what each token costs, given all before it."""

import math

import torch
from torch import Tensor

from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.lm.head import score
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.rivals import TransformerLM

BLOCK = 2048
"""Positions that go through the model at a time, about."""


@torch.inference_mode()
def score_tokens(model: TiedLM, tokens: Tensor, given: int = 1) -> tuple[Tensor, Tensor]:
    """Losses (N - given,) in nats of the tokens (N,) after the first `given`, and whether each was the likeliest.

    The text begins at token 0, and every position reads all that the model lets it read of what is before.
    """
    N = len(tokens)
    if not 1 <= given < N:
        raise ValueError(f"{given} tokens given of {N}: at least one must be, and one must be left to score")
    memory = _memory(model.eval(), tokens[:-1])
    history, alignment = _reach(model, N)
    block = -(-BLOCK // alignment) * alignment
    losses, hits = [], []
    for start in range((given - 1) // alignment * alignment, N - 1, block):
        stop = min(N - 1, start + block)
        rows = memory[None, max(0, start - history) : stop]
        hidden = model(model.embed(tokens[None, start:stop]), rows)[0]
        first = max(start, given - 1)
        loss, hit = score(hidden[first - start :], model.embedding.weight, tokens[first + 1 : stop + 1])
        losses.append(loss)
        hits.append(hit)
    return torch.cat(losses), torch.cat(hits)


def _memory(model: TiedLM, tokens: Tensor) -> Tensor:
    """What the model reads of each position: contexts side by side (N, ΣC), or embeddings (N, D)."""
    encoders = model.encoders()
    if not encoders:
        return model.embed(tokens)
    ids, index = tokens.unique(return_inverse=True)
    table = model.embed(ids)
    return torch.cat([solve_contexts(encoder, table, ids=index)[0] for encoder in encoders], dim=1)


def _reach(model: TiedLM, N: int) -> tuple[int, int]:
    """Positions before a block that its first one reads, and what blocks begin at a multiple of."""
    if isinstance(model, TransformerLM):
        return (N if model.attention.window is None else model.attention.window - 1), 1
    if not isinstance(model, ContextKVLM):
        return 0, 1
    intervals = model.attention.intervals
    alignment = math.lcm(*intervals) if model.attention.selection == "grid" else 1
    return (model.attention.max_contexts - 1) * max(intervals), alignment
