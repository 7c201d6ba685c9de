"""Decoding token by token, in memory that does not grow with the text (the full transformer's alone does).

A decoder keeps what the next steps will read and nothing else, in tensors that are made once: rings of the last
contexts, or of their keys and values. What it computes is what the parallel model computes. A prompt is read in
parallel (`Decoder.read`) and leaves the same state as stepping through it.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.lm.attention import Selection, head_groups, slot_positions
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.rivals import TransformerLM, rotated

Keep = Literal["contexts", "kv"]

ROWS_AT_A_TIME = 1 << 14
"""Tokens of a prompt whose keys and values are computed at a time."""


class Ring:
    """Where positions stand in a ring that holds exactly those that a later query can still read."""

    def __init__(self, interval: int, max_contexts: int, selection: Selection) -> None:
        self.interval, self.max_contexts, self.selection = interval, max_contexts, selection
        self.length = (max_contexts - 1) * (1 if selection == "grid" else interval)

    def keeps(self, position: int) -> bool:
        """Whether a query after this position may read it."""
        return self.length > 0 and (self.selection == "strided" or position % self.interval == 0)

    def row(self, position: Tensor) -> Tensor:
        """Row of each position."""
        return (position // self.interval if self.selection == "grid" else position) % max(1, self.length)

    def past(self, position: int, interval: int) -> Tensor:
        """The M-1 positions (M-1,) before its own that the query at `position` reads; absent ones are negative."""
        since = position % interval  # positions of slots are relative to a query that stands on the grid
        return position - since + slot_positions(since + 1, interval, self.max_contexts, self.selection)[-1, 1:]

    def kept(self, tokens: int) -> Tensor:
        """The positions below `tokens` that the ring holds."""
        step = self.interval if self.selection == "grid" else 1
        newest = (tokens - 1) // step * step
        return torch.arange(newest, max(-1, newest - self.length * step), -step)


class Decoder:
    """Reads B texts in step with each other and gives the logits of what comes next.

    `keep="contexts"` keeps contexts, 2D / C times fewer bytes, and projects the M that a step reads; `keep="kv"`
    projects each context once and keeps keys and values. Models that attend to tokens keep keys and values, those
    without attention their current context. `device="meta"` makes a state that takes no memory, to be measured.
    """

    def __init__(
        self, model: TiedLM, batch: int = 1, keep: Keep = "contexts", device: torch.device | str | None = None
    ) -> None:
        self.model, self.batch, self.keep, self.position = model.eval(), batch, keep, 0
        self.device = torch.device(device) if device is not None else model.embedding.weight.device
        self.state: dict[str, Tensor] = {}
        encoders = model.encoders()
        if encoders:
            self.state["context"] = self._zeros(sum(encoder.context_dim for encoder in encoders))
        self.groups: list[tuple[list[int], int, str, Ring]] = []  # heads, interval, name of their ring, the ring
        self._make_rings()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows after tokens (B,), which are read now."""
        embedding = self.model.embed(tokens)
        if "context" in self.state:
            self.state["context"].copy_(self._advance(embedding))
        hidden = self._hidden(embedding)
        self.position += 1
        return self.model.logits(hidden)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows after a whole prompt (B, N), read in parallel; only at the beginning.

        Raises ValueError for an empty prompt or a decoder that has read something.
        """
        N = tokens.shape[1]
        if self.position or N == 0:
            raise ValueError(f"a prompt of {N} tokens after {self.position}: read one prompt first, then step")
        if N > 1:
            self._fill(tokens[:, :-1])
            self.position = N - 1
        return self.step(tokens[:, -1])

    def kept(self) -> dict[str, Tensor]:
        """The tensors that the state consists of now, by name; what is reserved but not yet filled is left out."""
        if self._grows:
            return {"kv": self.state["kv"][:, :, : self.position]}
        return dict(self.state)

    @property
    def _grows(self) -> bool:
        return isinstance(self.model, TransformerLM) and self.model.attention.window is None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, *shape, device=self.device, dtype=self.model.embedding.weight.dtype)

    def _make_rings(self) -> None:
        if self._grows:
            self.state["kv"] = self._zeros(self._attention.heads, 0, 2 * self._attention.head_dim)
        if self._grows or not isinstance(self.model, ContextKVLM | TransformerLM):
            return
        attention, groups = self._attention, head_groups(self._attention.intervals)
        shared = self.keep == "contexts" and attention.selection == "strided"
        for interval, heads in groups.items():
            name = "" if shared or len(groups) == 1 else f"_{interval}"
            ring = Ring(max(groups) if shared else interval, attention.max_contexts, attention.selection)
            if isinstance(self.model, ContextKVLM) and self.keep == "contexts":
                name = f"contexts{name}"
                self.state.setdefault(name, self._zeros(ring.length, self.state["context"].shape[1]))
            else:
                name = f"kv{name}"
                self.state[name] = self._zeros(len(heads), ring.length, 2 * attention.head_dim)
            self.groups.append((heads, interval, name, ring))

    @property
    def _attention(self):  # type: ignore[no-untyped-def]
        return self.model.attention

    def _advance(self, embedding: Tensor) -> Tensor:
        encoders = self.model.encoders()
        before = self.state["context"].split([encoder.context_dim for encoder in encoders], dim=1)
        return torch.cat([encoder(c, embedding) for encoder, c in zip(encoders, before, strict=True)], dim=1)

    def _hidden(self, embedding: Tensor) -> Tensor:
        """Hidden states (B, D) of the tokens with these embeddings (B, D); what later steps read is written."""
        model = self.model
        if isinstance(model, ContextKVLM | TransformerLM):
            mixed = self._attend_to_all(embedding) if self._grows else self._attend(embedding)
            return model.ffn(model.attention.combine(embedding[:, None], mixed))[:, 0]
        return model(embedding[:, None], self.state["context"][:, None])[:, 0]

    def _attend(self, embedding: Tensor) -> Tensor:
        """The heads' outputs (B, H, 1, d) over the rings, into which what is read now then goes."""
        t = self.position
        now = self.state["context"] if isinstance(self.model, ContextKVLM) else embedding
        query, own = self._query(embedding), self._key_value(now[:, None], torch.tensor([t]))
        mixed = torch.empty_like(query)
        for heads, interval, name, ring in self.groups:
            past = ring.past(t, interval)
            rows, there = ring.row(past).to(self.device), (past >= 0).to(self.device)
            read = self.state[name]
            if self.keep == "contexts" and isinstance(self.model, ContextKVLM):
                seen = self._key_value(read[:, rows], past, heads)
            else:
                seen = read[:, :, rows]
            pairs = torch.cat([own[:, heads], seen], dim=2)
            mask = F.pad(there, (1, 0), value=True)[None]
            key, value = pairs.chunk(2, dim=-1)
            mixed[:, heads] = F.scaled_dot_product_attention(query[:, heads], key, value, attn_mask=mask)
        self._write([t], now[:, None], own)
        return mixed

    def _attend_to_all(self, embedding: Tensor) -> Tensor:
        self._reserve(self.position + 1)
        self.state["kv"][:, :, self.position] = self._key_value(embedding[:, None], torch.tensor([self.position]))[
            :, :, 0
        ]
        key, value = self.state["kv"][:, :, : self.position + 1].chunk(2, dim=-1)
        return F.scaled_dot_product_attention(self._query(embedding), key, value)

    def _query(self, embedding: Tensor) -> Tensor:
        """(B, H, 1, d) from (B, D)."""
        query = self._attention.split(self._attention.query(embedding)[:, None])
        return (
            rotated(query, self._here(torch.tensor([self.position])))
            if isinstance(self.model, TransformerLM)
            else query
        )

    def _key_value(self, rows: Tensor, positions: Tensor, heads: list[int] | None = None) -> Tensor:
        """Keys and values (B, H, n, 2d), side by side, of contexts or embeddings (B, n, ·) at these positions (n,)."""
        attention = self._attention
        key, value = attention.split(attention.key(rows)), attention.split(attention.value(rows))
        if isinstance(self.model, TransformerLM):
            key = rotated(key, self._here(positions))
        pair = torch.cat([key, value], dim=-1)
        return pair if heads is None or len(heads) == attention.heads else pair[:, heads]

    def _here(self, positions: Tensor) -> Tensor:
        return positions.to(self.device)

    def _write(self, positions: Iterable[int], rows: Tensor, pairs: Tensor | None) -> None:
        """Keeps contexts (B, n, C), or keys and values (B, H, n, 2d), of n positions in the rings that want them."""
        for name, (heads, ring) in {name: (heads, ring) for heads, _, name, ring in self.groups}.items():
            kept = [(i, p) for i, p in enumerate(positions) if ring.keeps(p)]
            if not kept:
                continue
            at = torch.tensor([i for i, _ in kept], device=self.device)
            to = ring.row(torch.tensor([p for _, p in kept])).to(self.device)
            if name.startswith("contexts"):
                self.state[name][:, to] = rows[:, at]
            else:
                assert pairs is not None
                self.state[name][:, :, to] = pairs[:, heads][:, :, at]

    def _reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in a state that grows, twice as many as before at least."""
        kv = self.state["kv"]
        if tokens > kv.shape[2]:
            more = kv.new_zeros(*kv.shape[:2], max(tokens, 2 * kv.shape[2]) - kv.shape[2], kv.shape[3])
            self.state["kv"] = torch.cat([kv, more], dim=2)

    def _fill(self, tokens: Tensor) -> None:
        """The state after these tokens (B, n), as if they had been read one by one."""
        n = tokens.shape[1]
        contexts = self._contexts(tokens) if "context" in self.state else None
        if contexts is not None:
            self.state["context"].copy_(contexts[:, -1])
        if self._grows:
            self._reserve(n)
            for start in range(0, n, ROWS_AT_A_TIME):
                positions = torch.arange(start, min(n, start + ROWS_AT_A_TIME))
                embeddings = self.model.embed(tokens[:, positions])
                self.state["kv"][:, :, positions] = self._key_value(embeddings, positions)
        for heads, _, name, ring in self.groups:
            positions = ring.kept(n)
            if not len(positions):
                continue
            rows = self.model.embed(tokens[:, positions]) if contexts is None else contexts[:, positions]
            to = ring.row(positions).to(self.device)
            if name.startswith("contexts"):
                self.state[name][:, to] = rows
            else:
                self.state[name][:, :, to] = self._key_value(rows, positions, heads)

    def _contexts(self, tokens: Tensor) -> Tensor:
        """Contexts (B, n, ΣC) of tokens (B, n), solved in parallel."""
        table = self.model.embedding_norm(self.model.embedding.weight)
        texts = [
            torch.cat([solve_contexts(encoder, table, ids=text)[0] for encoder in self.model.encoders()], dim=1)
            for text in tokens
        ]
        return torch.stack(texts)


def kept_tensors(model: TiedLM, tokens: int, keep: Keep = "contexts") -> dict[str, Tensor]:
    """What a decoder of one text keeps after so many tokens, as tensors without memory."""
    decoder = Decoder(model, keep=keep, device="meta")
    if decoder._grows:
        decoder._reserve(tokens)
    decoder.position = tokens
    return decoder.kept()


def state_bytes(model: TiedLM, tokens: int, keep: Keep = "contexts") -> int:
    """Bytes of what a decoder of one text keeps after so many tokens."""
    return sum(tensor.numel() * tensor.element_size() for tensor in kept_tensors(model, tokens, keep).values())
