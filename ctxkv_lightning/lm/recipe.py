"""What a model may have beyond the published one, each part alone or all; the cascade has none of it."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["post", "pre"]


LARGEST = 1 << 20
"""Of a pointer's sizes: far beyond use, and small enough that a foreign file does not exhaust the memory."""


@dataclass(frozen=True)
class Recipe:
    """The default is the published model: nothing but its layers, normalised after each, on a frozen embedding.

    `norm`: where layers are normalised, after the sum (Vaswani et al., 2017) or before the layer (Xiong et al., 2020);
    with the latter, layers start as the identity but for what `read_current` adds, the feed-forward layer has dropout,
    the final state is normalised.
    `train_embedding`: input and output share a trained copy of the frozen table; the encoder goes on reading that one.
    `embedding_dropout`, `context_dropout`, `output_dropout`: of normalised embeddings, of contexts, of final states.
    `projection`: logits = E W h + b instead of E h; W starts at zero and b at the training text's unigram.
    `read_current`: to what attention reads comes W c_t, the current context as `recurrence` reads it; in all layers
    that read contexts, or in the first one of a model that attends to tokens.
    `pointer_heads`: heads of a `CachePointer` of `pointer_dim` numbers each over the last `pointer_window` contexts;
    0 for none. `pointer_values`: what is pointed at is also read into the final state.
    `ngram`: the Kneser-Ney trigram of the training text speaks too, while training that of the rest of the text.
    `apart`: the head learns by its own loss, and the voices' shares in the first epoch alone; see `Output`.
    """

    norm: Norm = "post"
    train_embedding: bool = False
    embedding_dropout: float = 0.0
    context_dropout: float = 0.0
    output_dropout: float = 0.0
    projection: bool = False
    read_current: bool = False
    pointer_heads: int = 0
    pointer_dim: int = 64
    pointer_window: int = 620
    pointer_values: bool = False
    ngram: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what no model can be built with, wherever it comes from."""
        sizes = (self.pointer_dim, self.pointer_window, self.pointer_heads + 1)
        if self.norm not in ("post", "pre") or min(sizes) < 1 or max(sizes) > LARGEST:
            raise ValueError(f"{self} has a norm or a pointer that does not exist")

    @property
    def plain_head(self) -> bool:
        """Whether the head is the published one, whose loss needs nothing but the final states."""
        more = self.train_embedding or self.output_dropout or self.projection or self.pointer_heads or self.ngram
        return self.norm == "post" and not more

    @property
    def reads_contexts(self) -> bool:
        """Whether contexts are read, whatever attention reads."""
        return bool(self.pointer_heads) or self.read_current

    @property
    def history(self) -> int:
        """Positions before a window that the other voices read: the pointer's, or the token before for counts."""
        return self.pointer_window if self.pointer_heads else int(self.ngram)
