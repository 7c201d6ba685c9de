"""Decoding token by token, in memory that does not grow with the text (the full transformer's alone does).

A decoder keeps what the next steps will read and nothing else, in tensors that are made once: rings of the last
contexts, or of their keys and values, and of the tokens that followed them where a recipe has a pointer. Unless it is
writing, what it computes is what the parallel model computes. A prompt is read in parallel (`Decoder.read`) and leaves
the same state as stepping through it.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.solve import solve_onwards
from ctxkv_lightning.lm.attention import head_groups, in_order, of_heads
from ctxkv_lightning.lm.graph import StepGraph
from ctxkv_lightning.lm.layers import ContextAttention, TokenAttention, causal_attention, local_reach, rotated
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.output import Counted
from ctxkv_lightning.lm.pointer import NEVER, CachePointer, Pointed
from ctxkv_lightning.lm.rings import Ring
from ctxkv_lightning.lm.rivals import TransformerLM

Keep = Literal["contexts", "kv"]

Reads = list[tuple[list[int], int, str]]
"""What a layer reads: heads, their interval, the name of their ring."""

CHUNK = 1 << 16
"""Tokens of a prompt whose contexts are solved at a time: bounds what reading takes, however long the prompt."""

GRAPHED = ("cuda",)
"""Devices on which steps are recorded, once they are `steady`, and replayed."""

RECORDED_AFTER = 16
"""Such steps that are launched first: recording takes as long as many, and a step must have run once."""

DEEP_ROWS = 1 << 11
"""Tokens of a prompt that go through a layer of full attention at a time."""

ROWS_AT_A_TIME = 1 << 14
"""Tokens of a prompt whose keys and values are computed at a time."""

TOLERANCE = 1e-5
"""Of the contexts of a prompt, at the seams of the segments that are solved side by side."""


class Decoder:
    """Reads B texts in step with each other and gives the logits of what comes next.

    `keep="contexts"` keeps contexts, 2D / C times fewer bytes; `keep="kv"` projects each context once and keeps keys
    and values. Models that attend to tokens keep keys and values, those without attention their current context.
    `device="meta"` makes a state that takes no memory, to be measured.

    With `writing`, what comes after the prompt is the model's own words, which a pointer is not shown: it would point
    at them, write them again, and soon nothing else. Its share, and what is read of what it points at, are cut to how
    much of its window it may point at.
    """

    def __init__(
        self,
        model: TiedLM,
        batch: int = 1,
        keep: Keep = "contexts",
        device: torch.device | str | None = None,
        writing: bool = False,
    ) -> None:
        self.writing, self._own_words = writing, False
        self.model, self.batch, self.position = model.eval(), batch, 0
        self.device = torch.device(device) if device is not None else model.embedding.weight.device
        self.keep: Keep = keep if isinstance(model, ContextKVLM) else "kv"
        self.state: dict[str, Tensor] = {}
        self._at: int | Tensor = 0  # the position, as a step reads it
        self._graph: StepGraph | None = None
        self._launched = 0  # steps since they are steady
        self.rings: dict[str, Ring] = {}  # by name in the state
        self.reads: list[Reads] = []  # of each layer
        self.pairs: set[str] = set()  # the names of rings of keys and values
        self._encoders = model.encoders()
        self._layers = model.layers if isinstance(model, ContextKVLM | TransformerLM) else ()
        if self._encoders:
            self.state["context"] = self._zeros(sum(encoder.context_dim for encoder in self._encoders))
        self.grows = isinstance(model, TransformerLM) and model.attention.window is None
        self._make_state()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows after tokens (B,), which are read now; with a recipe's output, log p itself."""
        inputs = (tokens, *self._counted(tokens))
        if self._graph is None and self.device.type in GRAPHED and self.steady:
            self._launched += 1
            if self._launched > RECORDED_AFTER:
                self._at = torch.tensor(self.position, device=self.device)
                self._graph = StepGraph(self._step, inputs)
        if self._graph is not None:
            self.position += 1
            return self._graph(*inputs)
        return self._eager(inputs)

    def _eager(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self._at = self.position
        self.position += 1
        return self._step(*inputs)

    @property
    def steady(self) -> bool:
        """Whether each step from now on does what the last one did, at other places."""
        rings = self.rings.values()
        if self.grows or any(ring.selection == "grid" for ring in rings):
            return False
        return self.position >= max((ring.length for ring in rings), default=0)

    def _step(self, tokens: Tensor, *counted: Tensor) -> Tensor:
        """A step at `_at`; where that is a tensor, nothing is looked at on the host, and it is moved on."""
        embedding = self.model.embed(tokens)
        if self._encoders:
            self.state["context"].copy_(self._advance(self.model.encoder_input(tokens)))
        logits = self._logits(self._hidden(embedding), tokens, Counted(*counted) if counted else None)
        for name, ring in self.rings.items():  # last, for the oldest row is read before it is overwritten
            if name not in self.pairs and ring.keeps(self._at):
                ring.put(self.state[name], self._at, self.state["context"])
        if isinstance(self._at, Tensor):
            self._at += 1
        return logits

    def _counted(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """What counts say of what follows tokens (B,), which are noted: a `Counted`, or nothing."""
        if "before" not in self.state:
            return ()
        assert self.model.output is not None
        counted = self.model.output.count(self.state["before"][:, None].long(), tokens[:, None])
        self.state["before"].copy_(tokens)
        return () if counted is None else counted

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
        logits = self._eager((tokens[:, -1], *self._counted(tokens[:, -1])))
        self._own_words = self.writing
        return logits

    def kept(self) -> dict[str, Tensor]:
        """The tensors that the state consists of now, by name; what is reserved but not yet filled is left out."""
        if self.grows:
            return {**self.state, **{name: self.state[name][:, :, : self.position] for name in self._growing}}
        return dict(self.state)

    def bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.kept().values())

    @property
    def _attention(self):  # type: ignore[no-untyped-def]
        return self.model.attention

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, *shape, device=self.device, dtype=self.model.embedding.weight.dtype)

    def _make_state(self) -> None:
        if self.grows:
            for name in self._growing:
                self.state[name] = self._zeros(self._attention.heads, 0, 2 * self._attention.head_dim)
        else:
            self.reads = [self._make_rings(number) for number in range(len(self._layers))]
        if self.model.recipe.pointer_heads:
            self._make_pointer(self.model.recipe.pointer_window)
        if self.model.recipe.ngram:  # the token before the current one: none
            self.state["before"] = self._zeros().int().fill_(self.model.embedding.num_embeddings)

    def _make_rings(self, number: int) -> Reads:
        """The rings that a layer reads, made where they are not those of another: all read the same contexts."""
        attention = self._layers[number].attention
        groups, pairs, found = head_groups(attention.intervals), self._reads_pairs(number), []
        shared = not pairs and attention.selection == "strided"
        for interval, heads in groups.items():
            name = "kv" if pairs else "contexts"
            name = name if shared or len(groups) == 1 else f"{name}_{interval}"
            name = of_layer(name, number) if pairs else name
            found.append((heads, interval, name))
            if name in self.rings:
                continue
            ring = Ring(max(groups) if shared else interval, attention.max_contexts, attention.selection)
            self.rings[name] = ring
            if pairs:
                self.pairs.add(name)
                self.state[name] = self._zeros(len(heads), ring.length, 2 * attention.head_dim)
            else:
                self.state[name] = self._zeros(ring.length, self.state["context"].shape[1])
        return found

    def _reads_pairs(self, number: int) -> bool:
        """Whether keys and values are kept for a layer, not the contexts that they would be made of."""
        return self.keep == "kv" or self._reads_tokens(number)

    def _reads_tokens(self, number: int) -> bool:
        return isinstance(self._layers[number].attention, TokenAttention)

    def _make_pointer(self, window: int) -> None:
        """The pointer's ring, which is the attention's where that one holds the very same contexts."""
        self._pointer_ring = "contexts"
        same = "contexts" in self.rings and self.rings["contexts"].selection == "strided"
        if not same or self.rings["contexts"].length != window:
            self._pointer_ring = "pointer"
            self.rings["pointer"] = Ring(1, window + 1, "strided")
            self.state["pointer"] = self._zeros(window, self.state["context"].shape[1])
        self.state["followers"] = self._zeros(window).int()

    def _advance(self, embedding: Tensor) -> Tensor:
        before = self.state["context"].split([encoder.context_dim for encoder in self._encoders], dim=1)
        return torch.cat([encoder(c, embedding) for encoder, c in zip(self._encoders, before, strict=True)], dim=1)

    def _hidden(self, embedding: Tensor) -> Tensor:
        """Final hidden states (B, D) of the tokens with these embeddings (B, D); pairs that are kept are noted."""
        model, hidden = self.model, embedding
        if not self._layers:
            return model(embedding[:, None], self.state["context"][:, None])[:, 0]
        now = None if model.reads_tokens else self.state["context"][:, None]
        for number, layer in enumerate(self._layers):
            if self.grows:
                mixed = self._attend_to_all(number, hidden)
            elif self._reads_pairs(number):
                mixed = self._attend_to_pairs(number, hidden)
            else:
                mixed = self._attend_to_contexts(number, hidden)
            hidden = layer.ffn(layer.attention.combine(hidden[:, None], mixed, now))[:, 0]
        return hidden

    def _own_rows(self, number: int, hidden: Tensor) -> Tensor:
        """The current keys and values (B, H, 1, 2d) of the layer of this number, of which `hidden` (B, D) is read."""
        now = hidden if self._reads_tokens(number) else self.state["context"]
        return self._key_value(number, now[:, None], self._at)

    def _logits(self, hidden: Tensor, tokens: Tensor, counted: Counted | None) -> Tensor:
        """(B, V) from the final states (B, D) at tokens (B,)."""
        output = self.model.output
        if output is None:
            return self.model.logits(hidden)
        state, pointed = output.norm(hidden[:, None]), None
        if output.pointer is not None:
            pointed = self._pointed(output.pointer, state, tokens)
            state = pointed.state
        return output.mixed(state, self.model.table, pointed, counted)[:, 0]

    def _pointed(self, pointer: CachePointer, state: Tensor, tokens: Tensor) -> Pointed:
        """What the pointer says after tokens (B,), which are noted as the followers of the position before.

        Own words are noted as -1, which is not pointed at.
        """
        rows, position = self.state[self._pointer_ring], self._at
        window, noted = rows.shape[1], torch.full_like(tokens, -1) if self._own_words else tokens
        before = torch.as_tensor((position - 1) % window, device=rows.device)
        self.state["followers"].index_copy_(1, before[None], noted[:, None].int())
        asked = pointer.ask(state[:, 0], self.state["context"])
        back = (position - 1 - torch.arange(window, device=rows.device)).remainder(window) + 1
        followers = self.state["followers"].long()
        exists = ((back <= position) & (followers >= 0))[:, None, None]
        scores = (asked @ rows[:, None].transpose(-1, -2)).float()
        followers = followers.clamp_min(0)
        told = (slice(0, 1), state, scores, back, exists, followers, self.model.table)
        if not self.writing:
            return pointer.weigh(*told)
        filled = exists.sum(dim=-1).transpose(1, 2) / window
        return pointer.weigh(*told, filled)._replace(trust=filled.log().clamp_min(NEVER))

    def _attend_to_contexts(self, number: int, hidden: Tensor) -> Tensor:
        """The heads' outputs (B, H, 1, d) over the rings of contexts.

        Nothing is projected once per context: q · (W_k c) = (W_kᵀ q) · c, and the mean of W_v c is W_v of the mean. The
        keys' bias adds the same to every slot, which the softmax ignores; the values' own is added once.
        """
        attention, now = self._layers[number].attention, self.state["context"]
        keys, values = (part.weight.unflatten(0, (attention.heads, -1)) for part in (attention.key, attention.value))
        query = attention.ask(hidden).unflatten(1, (attention.heads, -1))
        asked = torch.einsum("bhd,hdc->bhc", query, keys) * attention.head_dim**-0.5
        means = []
        for heads, interval, name in self.reads[number]:
            past = self.rings[name].past(self.state[name], self._at, interval)
            seen = torch.cat([now[:, None], past], dim=1)
            scores = of_heads(asked, heads) @ seen.transpose(1, 2)
            means.append(scores.softmax(dim=-1) @ seen)
        mixed = torch.einsum("bhc,hdc->bhd", self._together(number, means), values)
        return (mixed + attention.value.bias.unflatten(0, (attention.heads, -1)))[:, :, None]

    def _attend_to_pairs(self, number: int, hidden: Tensor) -> Tensor:
        """The heads' outputs (B, H, 1, d) over a layer's rings of keys and values, and the current ones, now noted."""
        query, own, mixed = self._query(number, hidden), self._own_rows(number, hidden), []
        for heads, interval, name in self.reads[number]:
            ring, rows, current = self.rings[name], self.state[name], of_heads(own, heads)
            past = ring.past(rows, self._at, interval)
            key, value = torch.cat([current, past], dim=2).chunk(2, dim=-1)
            mixed.append(F.scaled_dot_product_attention(of_heads(query, heads), key, value))
            if ring.keeps(self._at):
                ring.put(rows, self._at, current[:, :, 0])
        return self._together(number, mixed)

    def _attend_to_all(self, number: int, hidden: Tensor) -> Tensor:
        """The heads' outputs (B, H, 1, d) over all keys and values of a layer, the current ones, now noted, too."""
        assert isinstance(self._at, int)
        self._reserve(self._at + 1)
        pairs = self.state[of_layer("kv", number)]
        pairs[:, :, self._at] = self._own_rows(number, hidden)[:, :, 0]
        key, value = pairs[:, :, : self._at + 1].chunk(2, dim=-1)
        return F.scaled_dot_product_attention(self._query(number, hidden), key, value)

    def _together(self, number: int, parts: list[Tensor]) -> Tensor:
        """(B, H, ...) of the parts of a layer's groups, each head where it belongs."""
        return parts[0] if len(parts) == 1 else in_order(parts, [heads for heads, _, _ in self.reads[number]])

    def _query(self, number: int, hidden: Tensor) -> Tensor:
        """(B, H, 1, d) from (B, D)."""
        attention = self._layers[number].attention
        return turned(attention, attention.split(attention.ask(hidden)[:, None]), self._at)

    def _key_value(self, number: int, rows: Tensor, start: int | Tensor) -> Tensor:
        """Keys and values (B, H, n, 2d), side by side, of what a layer reads, (B, n, ·), at `start` and after it."""
        layer = self._layers[number]
        attention = layer.attention
        if isinstance(attention, TokenAttention):
            rows = attention.attended(rows)
        key, value = attention.split(attention.key(rows)), attention.split(attention.value(rows))
        return torch.cat([turned(attention, key, start), value], dim=-1)

    def _reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in a state that grows, twice as many as before at least."""
        for name in self._growing:
            kv = self.state[name]
            if tokens > kv.shape[2]:
                more = kv.new_zeros(*kv.shape[:2], max(tokens, 2 * kv.shape[2]) - kv.shape[2], kv.shape[3])
                self.state[name] = torch.cat([kv, more], dim=2)

    @property
    def _growing(self) -> list[str]:
        """The names of what grows: each layer's keys and values."""
        return [of_layer("kv", number) for number in range(len(self._layers))]

    def _fill(self, tokens: Tensor) -> None:
        """The state after these tokens (B, n), as if they had been read one by one."""
        n = tokens.shape[1]
        start = max(0, n - local_reach(self._layers)) if not self.grows else 0
        if isinstance(self.model, ContextKVLM) and start < n:
            start -= start % self.model.alignment
        contexts, first = self._fill_contexts(tokens, start) if self._encoders else (tokens, n)
        if self.grows:
            self._reserve(n)
            for start in range(0, n, ROWS_AT_A_TIME):
                self._fill_all(self.model.embed(tokens[:, start : start + ROWS_AT_A_TIME]), start)
        else:
            self._fill_layers(self.model.embed(tokens[:, start:]), start, contexts, first)
        if "followers" in self.state:
            self._fill_followers(tokens)
        if "before" in self.state:
            self.state["before"].copy_(tokens[:, -1])

    def _fill_contexts(self, tokens: Tensor, start: int) -> tuple[Tensor, int]:
        """The current contexts after these tokens (B, n), and what is kept of those before.

        Returns those (B, m, ΣC) of a first position and all after it: what was written, and what layers read from
        `start` on, where states are to be computed from there.
        """
        n = tokens.shape[1]
        own = {name for number, reads in enumerate(self.reads) if self._reads_tokens(number) for _, _, name in reads}
        oldest = [ring.kept(n)[0] for name, ring in self.rings.items() if ring.length and name not in own]
        if isinstance(self.model, ContextKVLM) and start < n:
            oldest.append(max(0, start - (self.model.attention.max_contexts - 1) * max(self.model.attention.intervals)))
        first = min(oldest, default=n - 1)
        texts, row_of = tokens.unique(dim=0, return_inverse=True)  # a prompt that is asked several times is solved once
        contexts = torch.stack([self._solved(text, first) for text in texts])[row_of]
        self.state["context"].copy_(contexts[:, -1])
        for name in self.rings:
            if name not in self.pairs:
                to, read, _ = self._kept_of(name, contexts, first)
                self.state[name][:, to] = read
        return contexts, first

    def _fill_layers(self, hidden: Tensor, start: int, contexts: Tensor, first: int) -> None:
        """What layers keep as keys and values, from embeddings (B, n, D) at `start` and contexts (B, m, C) at `first`.

        Each layer that attends to tokens needs one window more of what is before it.
        """
        for number, layer in enumerate(self._layers):
            of_tokens = self._reads_tokens(number)
            if of_tokens or self.keep == "kv":
                self._fill_pairs(number, *((hidden, start) if of_tokens else (contexts, first)))
            if number < len(self._layers) - 1 and hidden.shape[1]:
                hidden = layer.ffn(layer.attention(hidden, hidden if of_tokens else contexts))

    def _fill_all(self, hidden: Tensor, start: int) -> None:
        """Notes all layers' keys and values of the tokens at `start` and after it, with embeddings (B, n, D)."""
        stop = start + hidden.shape[1]
        for number, layer in enumerate(self._layers):
            pairs = self.state[of_layer("kv", number)]
            pairs[:, :, start:stop] = self._key_value(number, hidden, start)
            if number == len(self._layers) - 1:
                return
            parts: list[Tensor] = []
            for rows in hidden.split(DEEP_ROWS, dim=1):
                begin = start + sum(part.shape[1] for part in parts)
                query = turned(layer.attention, layer.attention.split(layer.attention.ask(rows)), begin)
                key, value = pairs[:, :, : begin + rows.shape[1]].chunk(2, dim=-1)
                parts.append(layer.ffn(layer.attention.combine(rows, causal_attention(query, key, value, None))))
            hidden = torch.cat(parts, dim=1)

    def _fill_pairs(self, number: int, rows: Tensor, first: int) -> None:
        """Writes a layer's keys and values of what it keeps of (B, n, ·), of `first` and the positions after it."""
        for heads, _, name in self.reads[number]:
            to, read, oldest = self._kept_of(name, rows, first)
            if len(to):  # rotary positions are those of a window over tokens, which lie side by side
                self.state[name][:, :, to] = of_heads(self._key_value(number, read, oldest), heads)

    def _kept_of(self, name: str, rows: Tensor, first: int) -> tuple[Tensor, Tensor, int]:
        """Which rows of a ring to write, with which of (B, n, ·), `first` and after it, and the oldest position."""
        ring = self.rings[name]
        positions = ring.kept(first + rows.shape[1]) if ring.length else []
        to, of = (torch.tensor(each, device=self.device, dtype=torch.long) for each in (
            [ring.row(position) for position in positions], [position - first for position in positions]
        ))  # fmt: skip
        return to, rows[:, of], positions[0] if positions else first

    def _fill_followers(self, tokens: Tensor) -> None:
        """Notes what followed each of the last positions, of tokens (B, n); the last one's comes with the next step."""
        window = self.state["followers"].shape[1]
        positions = torch.arange(max(0, tokens.shape[1] - 1 - window), tokens.shape[1] - 1, device=self.device)
        self.state["followers"][:, positions % window] = tokens[:, positions + 1].int()

    def _solved(self, text: Tensor, first: int) -> Tensor:
        """Contexts (n - first, ΣC) of a text (n,) from position `first` on, solved in parallel, chunk by chunk."""
        return torch.cat([self._solved_by(encoder, text, first) for encoder in self._encoders], dim=1)

    def _solved_by(self, encoder: ContextEncoder, text: Tensor, first: int) -> Tensor:
        state, contexts = encoder.initial(), encoder.initial(0)
        cuts = [*range(0, first, CHUNK), first] if len(text) > CHUNK else [0]
        for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
            ids, index = text[start:stop].unique(return_inverse=True)
            contexts = encoder.initial(stop - start)
            _, state = solve_onwards(encoder, self.model.encoder_input(ids), index, contexts, state, TOLERANCE)
        return contexts[first - cuts[-1] :]


def turned(attention: ContextAttention, x: Tensor, start: int | Tensor) -> Tensor:
    """Queries or keys (B, H, n, d) at `start` and after it with rotary positions, if this attention has them."""
    if not isinstance(attention, TokenAttention):
        return x
    return rotated(x, start + torch.arange(x.shape[2], device=x.device))


def of_layer(name: str, number: int) -> str:
    """What the state calls that tensor of a layer which is called `name` in the first."""
    return name if number == 0 else f"{name}_layer{number + 1}"


def kept_tensors(model: TiedLM, tokens: int, keep: Keep = "contexts") -> dict[str, Tensor]:
    """What a decoder of one text keeps after so many tokens, as tensors without memory."""
    return _unfilled(model, tokens, keep).kept()


def state_bytes(model: TiedLM, tokens: int, keep: Keep = "contexts") -> int:
    """Bytes of what a decoder of one text keeps after so many tokens."""
    return _unfilled(model, tokens, keep).bytes()


def _unfilled(model: TiedLM, tokens: int, keep: Keep) -> Decoder:
    """A decoder that has room for so many tokens and has read none."""
    decoder = Decoder(model, keep=keep, device="meta")
    if decoder.grows:
        decoder._reserve(tokens)
    decoder.position = tokens
    return decoder
