"""Which configuration keys have no effect: for the front doors, which run equal experiments once, and for reports."""

from typing import NamedTuple

_WINDOW = ("interval", "max_contexts", "selection")
_PHASE_ONE = ("context_dim", "pretrain", "contexts")
_OF_MODEL = ("model.window_tokens", "model.local_window")
_BY_MODEL = {
    "context_kv": ("model.window_tokens",),
    "cascade": (*_WINDOW, "heads", *_OF_MODEL, "model.ffn_dim", "model.dropout", "model.layers", "recipe"),
    "transformer": (*_WINDOW, *_OF_MODEL),
    "sliding_window": (*_WINDOW, "model.local_window"),
    "recurrence": (*_WINDOW, "heads", *_OF_MODEL, "recipe.read_current"),
}
_BY_TOKENIZER: dict[str | None, tuple[str, ...]] = {
    "bpe": ("tokenizer.name",),
    "tiktoken": ("tokenizer.vocab_size",),
    "symbols": ("tokenizer.name", "tokenizer.vocab_size"),
}
_OF_CONTEXTS = (*_PHASE_ONE, "recipe.context_dropout")
"""What a model that attends to tokens reads only if there is a pointer, which points at contexts, or a direct read."""
_OF_POINTERS = ("recipe.pointer_dim", "recipe.pointer_window", "recipe.pointer_values")


class Voices(NamedTuple):
    """Which parts of a recipe a run has, of those on which it depends what else is read."""

    pointer: bool = False
    counts: bool = False
    direct: bool = False
    """The current context is read beside attention."""


class Chosen(NamedTuple):
    """Other settings on which it depends what else is read; with the defaults, all of it is."""

    schedule: str = "linear"
    source: str = "mqar"
    layers: int = 2
    lm_epochs: int = 1
    tokenizer: str | None = None
    embedding: str | None = None
    init_from: str | None = None


CHOOSING = (
    "train.schedule",
    "data.source",
    "model.layers",
    "pretrain.lm_epochs",
    "tokenizer.source",
    "embedding.source",
    "init_from",
)
"""The keys of `Chosen`."""


ALL_READ = Chosen()


def unread_keys(model: str, voices: Voices, chosen: Chosen = ALL_READ) -> tuple[str, ...]:
    """Dotted keys, or groups of them, that a model of this name does not read, with these voices and settings."""
    found = _BY_MODEL.get(model, ())
    found = found if chosen.layers > 1 else tuple({**dict.fromkeys(found), "model.local_window": None})
    found = found if voices.pointer or voices.counts else (*found, "recipe.apart")
    found = found if voices.pointer else (*found, *_OF_POINTERS)
    if model in ("transformer", "sliding_window") and not (voices.pointer or voices.direct):
        found = (*found, *_OF_CONTEXTS)
    found = found if chosen.lm_epochs else (*found, "pretrain.lm_weight_dropout")
    found = found if chosen.init_from is None else (*found, "pretrain")  # it brings its encoder
    found = found if chosen.schedule == "linear" else (*found, "train.warmup_steps")
    found = found if chosen.source == "mqar" else (*found, "data.mqar")
    found = found if chosen.embedding in (None, "svd") else (*found, "embedding.window")
    return (*found, *_BY_TOKENIZER.get(chosen.tokenizer, ()))
