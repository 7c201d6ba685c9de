"""What a model may have beyond the published one; each part alone, and all of them in every model but the cascade."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["post", "pre"]


@dataclass(frozen=True)
class Recipe:
    """The default is the published model: nothing but its layers, normalised after each, on a frozen embedding.

    `norm`: where layers are normalised, after the sum (Vaswani et al., 2017) or before the layer (Xiong et al., 2020).
    `train_embedding`: input and output share a trained copy of the frozen table; the encoder goes on reading that one.
    `embedding_dropout`, `context_dropout`, `output_dropout`: of normalised embeddings, of contexts, of final states.
    `projection`: logits = E W h + b instead of E h; W starts at zero and b at the training text's unigram.
    `pointer_heads`: heads of a `CachePointer` of `pointer_dim` numbers each over the last `pointer_window` contexts;
    0 for none. `pointer_values`: what is pointed at is also read into the final state.
    """

    norm: Norm = "post"
    train_embedding: bool = False
    embedding_dropout: float = 0.0
    context_dropout: float = 0.0
    output_dropout: float = 0.0
    projection: bool = False
    pointer_heads: int = 0
    pointer_dim: int = 64
    pointer_window: int = 620
    pointer_values: bool = False

    @property
    def published(self) -> bool:
        """Whether the head is the published one, whose loss needs nothing but the final states."""
        return not (self.train_embedding or self.output_dropout or self.projection or self.pointer_heads)
