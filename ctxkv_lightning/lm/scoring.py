"""Losses of a text of any length, computed in parallel and in blocks: what each token costs, given all before it."""

import torch
from torch import Tensor

from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.lm.layers import local_reach
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.output import Asked
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
    memory = memory_of(model.eval(), tokens[:-1])
    history, alignment = _reach(model, N)
    block = -(-BLOCK // alignment) * alignment
    losses, hits = [], []
    for start in range((given - 1) // alignment * alignment, N - 1, block):
        stop = min(N - 1, start + block)
        reach, first = slice(max(0, start - history), stop), max(start, given - 1)
        rows, ids = memory[None, reach], tokens[None, reach]
        hidden = model.states(ids, rows, stop - start)
        counted = torch.arange(first - start, stop - start, device=tokens.device)
        loss, hit = model.score(hidden, Asked(rows, ids, tokens[first + 1 : stop + 1], counted, None))
        losses.append(loss)
        hits.append(hit)
    return torch.cat(losses), torch.cat(hits)


def memory_of(model: TiedLM, tokens: Tensor) -> Tensor:
    """What the model reads of each position: contexts side by side (N, ΣC), or embeddings (N, D)."""
    encoders = model.encoders()
    if not encoders:
        return model.embed(tokens)
    ids, index = tokens.unique(return_inverse=True)
    table = model.encoder_input(ids)
    return torch.cat([solve_contexts(encoder, table, ids=index)[0] for encoder in encoders], dim=1)


def _reach(model: TiedLM, N: int) -> tuple[int, int]:
    """Positions before a block that its first one reads, and what blocks begin at a multiple of."""
    voices = model.recipe.history
    if isinstance(model, TransformerLM):
        return (N if model.attention.window is None else max(voices, local_reach(model.layers))), 1
    if not isinstance(model, ContextKVLM):
        return voices, 1
    return max(voices, model.history), model.alignment
