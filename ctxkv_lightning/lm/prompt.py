"""Reading a prompt in parallel: it leaves the state that stepping through it would leave."""

import torch
from torch import Tensor

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.solve import solve_onwards
from ctxkv_lightning.lm.attention import of_heads
from ctxkv_lightning.lm.layers import causal_attention, local_reach
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.lm.rivals import TransformerLM
from ctxkv_lightning.lm.state import DecoderState, of_layer, turned

CHUNK = 1 << 16
"""Tokens of a prompt whose contexts are solved at a time: bounds what reading takes, however long the prompt."""

DEEP_ROWS = 1 << 11
"""Tokens of a prompt that go through a layer of full attention at a time."""

ROWS_AT_A_TIME = 1 << 14
"""Tokens of a prompt whose keys and values are computed at a time."""

TOLERANCE = 1e-5
"""Of the contexts of a prompt, at the seams of the segments that are solved side by side."""


def fill(decoder: DecoderState, tokens: Tensor) -> None:
    """The state after these tokens (B, n), as if they had been read one by one."""
    n = tokens.shape[1]
    start = max(0, n - local_reach(decoder.layers)) if not decoder.grows else 0
    if isinstance(decoder.model, ContextKVLM) and start < n:
        start -= start % decoder.model.alignment
    contexts, first = _fill_contexts(decoder, tokens, start) if decoder.encoders else (tokens, n)
    if decoder.grows:
        decoder.reserve(n)
        for start in range(0, n, ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            direct = contexts[:, part] if _states_read(decoder) else None
            _fill_all(decoder, decoder.model.embed(tokens[:, part]), start, direct)
    else:
        _fill_layers(decoder, decoder.model.embed(tokens[:, start:]), start, contexts, first)
    if "followers" in decoder.state:
        _fill_followers(decoder, tokens)
    if "before" in decoder.state:
        decoder.state["before"].copy_(tokens[:, -1])


def _fill_contexts(decoder: DecoderState, tokens: Tensor, start: int) -> tuple[Tensor, int]:
    """The current contexts after these tokens (B, n), and what is kept of those before.

    Returns those (B, m, ΣC) of a first position and all after it: what was written, and what layers read from
    `start` on, where states are to be computed from there.
    """
    n = tokens.shape[1]
    own = {name for number, reads in enumerate(decoder.reads) if decoder.reads_tokens(number) for _, _, name in reads}
    oldest = [ring.kept(n)[0] for name, ring in decoder.rings.items() if ring.length and name not in own]
    if isinstance(decoder.model, ContextKVLM) and start < n:
        oldest.append(max(0, start - (decoder.model.history - decoder.model.lead)))
    if isinstance(decoder.model, TransformerLM) and _states_read(decoder) and start < n:
        oldest.append(start)
    first = min(oldest, default=n - 1)
    texts, row_of = tokens.unique(dim=0, return_inverse=True)  # a prompt that is asked several times is solved once
    contexts = torch.stack([_solved(decoder, text, first) for text in texts])[row_of]
    decoder.state["context"].copy_(contexts[:, -1])
    for name in decoder.rings:
        if name not in decoder.pairs:
            to, read, _ = _kept_of(decoder, name, contexts, first)
            decoder.state[name][:, to] = read
    return contexts, first


def _states_read(decoder: DecoderState) -> bool:
    """Whether contexts are read into states that deeper layers keep something of."""
    return decoder.model.recipe.read_current and len(decoder.layers) > 1


def _fill_layers(decoder: DecoderState, hidden: Tensor, start: int, contexts: Tensor, first: int) -> None:
    """What layers keep as keys and values, from embeddings (B, n, D) at `start` and contexts (B, m, C) at `first`.

    Each layer that attends to tokens needs one window more of what is before it.
    """
    for number, layer in enumerate(decoder.layers):
        of_tokens = decoder.reads_tokens(number)
        if of_tokens or decoder.keep == "kv":
            _fill_pairs(decoder, number, *((hidden, start) if of_tokens else (contexts, first)))
        if number < len(decoder.layers) - 1 and hidden.shape[1]:
            direct = contexts if _states_read(decoder) else None
            read = (hidden, None, direct) if of_tokens else (contexts,)
            hidden = layer.ffn(layer.attention(hidden, *read))


def _fill_all(decoder: DecoderState, hidden: Tensor, start: int, direct: Tensor | None) -> None:
    """Notes all layers' keys and values of the tokens at `start` and after it, with embeddings (B, n, D).

    `direct` are their contexts (B, n, C) where the first layer reads them, and deeper ones what it makes of them.
    """
    stop = start + hidden.shape[1]
    for number, layer in enumerate(decoder.layers):
        pairs = decoder.state[of_layer("kv", number)]
        pairs[:, :, start:stop] = decoder.key_value(number, hidden, start)
        if number == len(decoder.layers) - 1:
            return
        parts: list[Tensor] = []
        for rows in hidden.split(DEEP_ROWS, dim=1):
            begin = start + sum(part.shape[1] for part in parts)
            query = turned(layer.attention, layer.attention.split(layer.attention.ask(rows)), begin)
            key, value = pairs[:, :, : begin + rows.shape[1]].chunk(2, dim=-1)
            mixed = causal_attention(query, key, value, None)
            now = None if direct is None else direct[:, begin - start :][:, : rows.shape[1]]
            parts.append(layer.ffn(layer.attention.combine(rows, mixed, now)))
        hidden = torch.cat(parts, dim=1)


def _fill_pairs(decoder: DecoderState, number: int, rows: Tensor, first: int) -> None:
    """Writes a layer's keys and values of what it keeps of (B, n, ·), of `first` and the positions after it."""
    for heads, _, name in decoder.reads[number]:
        to, read, oldest = _kept_of(decoder, name, rows, first)
        if len(to):  # rotary positions are those of a window over tokens, which lie side by side
            decoder.state[name][:, :, to] = of_heads(decoder.key_value(number, read, oldest), heads)


def _kept_of(decoder: DecoderState, name: str, rows: Tensor, first: int) -> tuple[Tensor, Tensor, int]:
    """Which rows of a ring to write, with which of (B, n, ·), `first` and after it, and the oldest position."""
    ring = decoder.rings[name]
    positions = ring.kept(first + rows.shape[1]) if ring.length else []
    to, of = (torch.tensor(each, device=decoder.device, dtype=torch.long) for each in (
        [ring.row(position) for position in positions], [position - first for position in positions]
    ))  # fmt: skip
    return to, rows[:, of], positions[0] if positions else first


def _fill_followers(decoder: DecoderState, tokens: Tensor) -> None:
    """Notes what followed each of the last positions, of tokens (B, n); the last one's comes with the next step."""
    length = decoder.state["followers"].shape[1]
    positions = torch.arange(max(0, tokens.shape[1] - 1 - length), tokens.shape[1] - 1, device=decoder.device)
    decoder.state["followers"][:, positions % length] = tokens[:, positions + 1].int()


def _solved(decoder: DecoderState, text: Tensor, first: int) -> Tensor:
    """Contexts (n - first, ΣC) of a text (n,) from position `first` on, solved in parallel, chunk by chunk."""
    return torch.cat([_solved_by(decoder, encoder, text, first) for encoder in decoder.encoders], dim=1)


def _solved_by(decoder: DecoderState, encoder: ContextEncoder, text: Tensor, first: int) -> Tensor:
    state, contexts = encoder.initial(), encoder.initial(0)
    cuts = [*range(0, first, CHUNK), first] if len(text) > CHUNK else [0]
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        ids, index = text[start:stop].unique(return_inverse=True)
        contexts = encoder.initial(stop - start)
        _, state = solve_onwards(encoder, decoder.model.encoder_input(ids), index, contexts, state, TOLERANCE)
    return contexts[first - cuts[-1] :]
