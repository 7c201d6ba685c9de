"""What a decoder keeps: which rings of which layers, of contexts, of keys and values, of the tokens that followed."""

from typing import Literal

import torch
from torch import Tensor

from ctxkv_lightning.lm.attention import head_groups
from ctxkv_lightning.lm.layers import ContextAttention, TokenAttention, rotated
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.rings import Ring
from ctxkv_lightning.lm.rivals import TransformerLM

Keep = Literal["contexts", "kv"]

Reads = list[tuple[list[int], int, str]]
"""What a layer reads: heads, their interval, the name of their ring."""


class DecoderState:
    """What is kept of B texts that have been read up to the same `position`, in tensors that are made once.

    `keep="contexts"` keeps contexts, 2D / C times fewer bytes; `keep="kv"` projects each context once and keeps keys
    and values. Models that attend to tokens keep keys and values, those without attention their current context.
    `device="meta"` makes a state that takes no memory, to be measured.
    """

    def __init__(
        self, model: TiedLM, batch: int = 1, keep: Keep = "contexts", device: torch.device | str | None = None
    ) -> None:
        self.model, self.batch, self.position = model, batch, 0
        self.device = torch.device(device) if device is not None else model.embedding.weight.device
        self.keep: Keep = keep if isinstance(model, ContextKVLM) else "kv"
        self.state: dict[str, Tensor] = {}
        self.rings: dict[str, Ring] = {}  # by name in the state
        self.reads: list[Reads] = []  # of each layer
        self.pairs: set[str] = set()  # the names of rings of keys and values
        self.encoders = model.encoders()
        self.layers = model.layers if isinstance(model, ContextKVLM | TransformerLM) else ()
        if self.encoders:
            self.state["context"] = self._zeros(sum(encoder.context_dim for encoder in self.encoders))
        self.grows = isinstance(model, TransformerLM) and model.attention.window is None
        self._make_state()

    @property
    def steady(self) -> bool:
        """Whether each step from now on does what the last one did, at other places."""
        rings = self.rings.values()
        if self.grows or any(ring.selection == "grid" for ring in rings):
            return False
        return self.position >= max((ring.length for ring in rings), default=0)

    def kept(self) -> dict[str, Tensor]:
        """The tensors that the state consists of now, by name; what is reserved but not yet filled is left out."""
        if self.grows:
            return {**self.state, **{name: self.state[name][:, :, : self.position] for name in self._growing}}
        return dict(self.state)

    def bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.kept().values())

    def reads_pairs(self, number: int) -> bool:
        """Whether keys and values are kept for a layer, not the contexts that they would be made of."""
        return self.keep == "kv" or self.reads_tokens(number)

    def reads_tokens(self, number: int) -> bool:
        return isinstance(self.layers[number].attention, TokenAttention)

    def key_value(self, number: int, rows: Tensor, start: int | Tensor) -> Tensor:
        """Keys and values (B, H, n, 2d), side by side, of what a layer reads, (B, n, ·), at `start` and after it."""
        layer = self.layers[number]
        attention = layer.attention
        if isinstance(attention, TokenAttention):
            rows = attention.attended(rows)
        key, value = attention.split(attention.key(rows)), attention.split(attention.value(rows))
        return torch.cat([turned(attention, key, start), value], dim=-1)

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in a state that grows, twice as many as before at least."""
        for name in self._growing:
            kv = self.state[name]
            if tokens > kv.shape[2]:
                more = kv.new_zeros(*kv.shape[:2], max(tokens, 2 * kv.shape[2]) - kv.shape[2], kv.shape[3])
                self.state[name] = torch.cat([kv, more], dim=2)

    @property
    def _growing(self) -> list[str]:
        """The names of what grows: each layer's keys and values."""
        return [of_layer("kv", number) for number in range(len(self.layers))]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, *shape, device=self.device, dtype=self.model.embedding.weight.dtype)

    def _make_state(self) -> None:
        if self.grows:
            attention = self.layers[0].attention
            for name in self._growing:
                self.state[name] = self._zeros(attention.heads, 0, 2 * attention.head_dim)
        else:
            self.reads = [self._make_rings(number) for number in range(len(self.layers))]
        if self.model.recipe.pointer_heads:
            self._make_pointer()
        if self.model.recipe.ngram:  # the token before the current one: none
            self.state["before"] = self._zeros().int().fill_(self.model.embedding.num_embeddings)

    def _make_rings(self, number: int) -> Reads:
        """The rings that a layer reads, made where they are not those of another: all read the same contexts."""
        attention = self.layers[number].attention
        groups, pairs, found = head_groups(attention.intervals), self.reads_pairs(number), []
        shared = not pairs and attention.selection == "strided"
        for interval, heads in groups.items():
            name = "kv" if pairs else "contexts"
            name = name if shared or len(groups) == 1 else f"{name}_{interval}"
            name = of_layer(name, number) if pairs else name
            found.append((heads, interval, name))
            if name in self.rings:
                continue
            pointed_at = self._pointed_at if shared else 0
            ring = Ring(max(groups) if shared else interval, attention.max_contexts, attention.selection, pointed_at)
            self.rings[name] = ring
            if pairs:
                self.pairs.add(name)
                self.state[name] = self._zeros(len(heads), ring.length, 2 * attention.head_dim)
            else:
                self.state[name] = self._zeros(ring.length, self.state["context"].shape[1])
        return found

    @property
    def _pointed_at(self) -> int:
        """How many contexts the pointer needs; 0 without one."""
        return self.model.recipe.pointer_window if self.model.recipe.pointer_heads else 0

    def _make_pointer(self) -> None:
        """The pointer's ring, which is the attention's where that one holds every context of its reach."""
        self._pointer_ring = "contexts"
        if "contexts" not in self.rings or self.rings["contexts"].selection == "grid":
            self._pointer_ring = "pointer"
            self.rings["pointer"] = Ring(1, self._pointed_at + 1, "strided")
            self.state["pointer"] = self._zeros(self._pointed_at, self.state["context"].shape[1])
        self.state["followers"] = self._zeros(self.rings[self._pointer_ring].length).int()


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


def _unfilled(model: TiedLM, tokens: int, keep: Keep) -> DecoderState:
    """A decoder that has room for so many tokens and has read none."""
    decoder = DecoderState(model, keep=keep, device="meta")
    if decoder.grows:
        decoder.reserve(tokens)
    decoder.position = tokens
    return decoder
