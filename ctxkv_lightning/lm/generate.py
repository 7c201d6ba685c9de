"""Decoding token by token, in memory that does not grow with the text (the full transformer's alone does).

Unless it is writing, what a decoder computes is what the parallel model computes, from its state and nothing else. A
prompt is read in parallel (`Decoder.read`) and leaves the same state as stepping through it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.lm.attention import in_order, of_heads
from ctxkv_lightning.lm.graph import StepGraph
from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.lm.output import Counted
from ctxkv_lightning.lm.pointer import NEVER, CachePointer, Pointed
from ctxkv_lightning.lm.prompt import fill
from ctxkv_lightning.lm.state import DecoderState, Keep, of_layer, turned

GRAPHED = ("cuda",)
"""Devices on which steps are recorded, once they are `steady`, and replayed."""

RECORDED_AFTER = 16
"""Such steps that are launched first: recording takes as long as many, and a step must have run once."""


class Decoder(DecoderState):
    """Reads B texts in step with each other and gives the logits of what comes next.

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
        super().__init__(model.eval(), batch, keep, device)
        self.writing, self._own_words = writing, False
        self._at: int | Tensor = 0  # the position, as a step reads it
        self._graph: StepGraph | None = None
        self._launched = 0  # steps since they are steady

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

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows after a whole prompt (B, N), read in parallel; only at the beginning.

        Raises ValueError for an empty prompt or a decoder that has read something.
        """
        N = tokens.shape[1]
        if self.position or N == 0:
            raise ValueError(f"a prompt of {N} tokens after {self.position}: read one prompt first, then step")
        if N > 1:
            fill(self, tokens[:, :-1])
            self.position = N - 1
        logits = self._eager((tokens[:, -1], *self._counted(tokens[:, -1])))
        self._own_words = self.writing
        return logits

    def _eager(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self._at = self.position
        self.position += 1
        return self._step(*inputs)

    def _step(self, tokens: Tensor, *counted: Tensor) -> Tensor:
        """A step at `_at`; where that is a tensor, nothing is looked at on the host, and it is moved on."""
        embedding = self.model.embed(tokens)
        if self.encoders:
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

    def _advance(self, embedding: Tensor) -> Tensor:
        before = self.state["context"].split([encoder.context_dim for encoder in self.encoders], dim=1)
        return torch.cat([encoder(c, embedding) for encoder, c in zip(self.encoders, before, strict=True)], dim=1)

    def _hidden(self, embedding: Tensor) -> Tensor:
        """Final hidden states (B, D) of the tokens with these embeddings (B, D); pairs that are kept are noted."""
        model, hidden = self.model, embedding
        if not self.layers:
            return model(embedding[:, None], self.state["context"][:, None])[:, 0]
        now = self.state["context"][:, None] if self.encoders else None
        for number, layer in enumerate(self.layers):
            if self.grows:
                mixed = self._attend_to_all(number, hidden)
            elif self.reads_pairs(number):
                mixed = self._attend_to_pairs(number, hidden)
            else:
                mixed = self._attend_to_contexts(number, hidden)
            hidden = layer.ffn(layer.attention.combine(hidden[:, None], mixed, now))[:, 0]
        return hidden

    def _own_rows(self, number: int, hidden: Tensor) -> Tensor:
        """The current keys and values (B, H, 1, 2d) of the layer of this number, of which `hidden` (B, D) is read."""
        now = hidden if self.reads_tokens(number) else self.state["context"]
        return self.key_value(number, now[:, None], self._at)

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
        rows, position, window = self.state[self._pointer_ring], self._at, pointer.window
        length, noted = rows.shape[1], torch.full_like(tokens, -1) if self._own_words else tokens
        before = torch.as_tensor((position - 1) % length, device=rows.device)
        self.state["followers"].index_copy_(1, before[None], noted[:, None].int())
        asked = pointer.ask(state[:, 0], self.state["context"])
        back = (position - 1 - torch.arange(length, device=rows.device)).remainder(length) + 1
        followers = self.state["followers"].long()
        exists = ((back <= position) & (back <= window) & (followers >= 0))[:, None, None]
        scores = (asked @ rows[:, None].transpose(-1, -2)).float()
        followers = followers.clamp_min(0)
        embeddings = pointer.embeddings(followers, self.model.table)
        told = (slice(0, 1), state, scores, back, exists, followers, embeddings)
        if not self.writing:
            return pointer.weigh(*told)
        filled = exists.sum(dim=-1).transpose(1, 2) / window
        return pointer.weigh(*told, filled)._replace(trust=filled.log().clamp_min(NEVER))

    def _attend_to_contexts(self, number: int, hidden: Tensor) -> Tensor:
        """The heads' outputs (B, H, 1, d) over the rings of contexts.

        Nothing is projected once per context: q · (W_k c) = (W_kᵀ q) · c, and the mean of W_v c is W_v of the mean. The
        keys' bias adds the same to every slot, which the softmax ignores; the values' own is added once.
        """
        attention, now = self.layers[number].attention, self.state["context"]
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
        self.reserve(self._at + 1)
        pairs = self.state[of_layer("kv", number)]
        pairs[:, :, self._at] = self._own_rows(number, hidden)[:, :, 0]
        key, value = pairs[:, :, : self._at + 1].chunk(2, dim=-1)
        return F.scaled_dot_product_attention(self._query(number, hidden), key, value)

    def _together(self, number: int, parts: list[Tensor]) -> Tensor:
        """(B, H, ...) of the parts of a layer's groups, each head where it belongs."""
        return parts[0] if len(parts) == 1 else in_order(parts, [heads for heads, _, _ in self.reads[number]])

    def _query(self, number: int, hidden: Tensor) -> Tensor:
        """(B, H, 1, d) from (B, D)."""
        attention = self.layers[number].attention
        return turned(attention, attention.split(attention.ask(hidden)[:, None]), self._at)
