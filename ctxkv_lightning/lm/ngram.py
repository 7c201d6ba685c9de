"""Counting as a part of a model: the Kneser-Ney trigram of the training text, in tensors that travel with the weights.

Nothing in it is trained, and it grows with the training text alone, never with the text that is read.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ctxkv_lightning.text.ngram import KneserNeyTrigram

ORDERS = ("bigram", "trigram")


class NgramExpert(nn.Module):
    """p(w | x_{t-1} x_t), as `text.ngram.KneserNeyTrigram` has it; uniform until it is filled."""

    unigram: Tensor
    bigram_grams: Tensor
    trigram_grams: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("unigram", torch.full((vocab_size,), 1 / vocab_size))
        for order in ORDERS:
            for name, dtype in (("grams", torch.int64), ("contexts", torch.int64), ("mass", None), ("left", None)):
                self.register_buffer(f"{order}_{name}", torch.zeros(0, dtype=dtype))

    def fill(self, trigram: KneserNeyTrigram) -> None:
        """Takes the counts of a training text."""
        for name, table in trigram.tables().items():
            self.register_buffer(name, torch.from_numpy(table).to(self.unigram.device))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """p (n, V) after pairs of tokens (n,), and what trigram and bigram left to the order below (n, 2).

        The token V stands for none in `first`.
        """
        first, second = first.contiguous(), second.contiguous()
        p = self.unigram.expand(len(second), -1).clone()
        p, of_bigram = self._interpolate("bigram", second, p)
        p, of_trigram = self._interpolate("trigram", first * (self.vocab_size + 1) + second, p)
        return p, torch.stack([of_trigram, of_bigram], dim=-1)

    def _interpolate(self, order: str, wanted: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        """p (n, V) of an order, given that of the order below, and the weight (n,) that is left to it."""
        grams, contexts, mass, left = (getattr(self, f"{order}_{x}") for x in ("grams", "contexts", "mass", "left"))
        if not len(contexts):
            return lower, lower.new_ones(len(wanted))
        place = torch.searchsorted(contexts, wanted).clamp_max(len(contexts) - 1)
        weight = torch.where(contexts[place] == wanted, left[place], 1.0)
        base = self.vocab_size + 1
        start, stop = (torch.searchsorted(grams, (wanted + end) * base) for end in (0, 1))
        row = torch.repeat_interleave(torch.arange(len(wanted), device=wanted.device), stop - start)
        earlier = (stop - start).cumsum(0) - (stop - start)
        at = torch.arange(len(row), device=row.device) - earlier[row] + start[row]
        p = (weight[:, None] * lower).index_put((row, grams[at] % base), mass[at], accumulate=True)
        return p, weight

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Makes room first, for how much was counted is known to the saved model alone."""
        errors = rest[-1]
        for name, buffer in list(self.named_buffers()):
            saved = state.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device))
        if fault := self._fault({name: state.get(prefix + name) for name, _ in self.named_buffers()}):
            errors.append(f"{prefix}{fault}")
        super()._load_from_state_dict(state, prefix, *rest)

    def _fault(self, saved: dict[str, Tensor | None]) -> str | None:
        """What is wrong with tables from a file, if anything is: an index out of place could stop a whole device."""
        whole = {name: tensor for name, tensor in saved.items() if tensor is not None}
        if len(whole) < len(saved):
            return None  # torch reports what is missing
        if whole["unigram"].shape != (self.vocab_size,):
            return f"unigram has {len(whole['unigram'])} tokens, not {self.vocab_size}"
        for order in ORDERS:
            grams, contexts, mass, left = (whole[f"{order}_{x}"] for x in ("grams", "contexts", "mass", "left"))
            paired = grams.ndim == contexts.ndim == 1 and grams.shape == mass.shape and contexts.shape == left.shape
            integers = grams.dtype == contexts.dtype == torch.int64
            if not (paired and integers and _ascending(grams) and _ascending(contexts)):
                return f"{order}_grams are no table of n-grams"
            if bool((grams % (self.vocab_size + 1) == self.vocab_size).any()):
                return f"{order}_grams name a token that does not exist"
        return None


def _ascending(keys: Tensor) -> bool:
    return bool((keys[1:] > keys[:-1]).all()) and bool((keys >= 0).all())
