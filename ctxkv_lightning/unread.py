"""Which configuration keys have no effect: for the front doors, which run equal experiments once, and for reports."""

_WINDOW = ("interval", "max_contexts", "selection")
_PHASE_ONE = ("context_dim", "pretrain", "contexts")
_OF_MODEL = ("model.window_tokens", "model.local_window")
_BY_MODEL = {
    "context_kv": ("model.window_tokens",),
    "cascade": (*_WINDOW, "heads", *_OF_MODEL, "model.ffn_dim", "model.dropout", "model.layers", "recipe"),
    "transformer": (*_WINDOW, *_OF_MODEL, "recipe.read_current"),
    "sliding_window": (*_WINDOW, "model.local_window", "recipe.read_current"),
    "recurrence": (*_WINDOW, "heads", *_OF_MODEL, "recipe.read_current"),
}
_OF_CONTEXTS = (*_PHASE_ONE, "recipe.context_dropout")
"""What a model that attends to tokens reads only if there is a pointer, which points at contexts."""
_OF_POINTERS = ("recipe.pointer_dim", "recipe.pointer_window", "recipe.pointer_values")


def unread_keys(
    model: str, pointer: bool, counts: bool = True, schedule: str = "linear", source: str = "mqar", layers: int = 2
) -> tuple[str, ...]:
    """Dotted keys, or groups of them, that a model of this name does not read, with a pointer and counts or without.

    `schedule` and `source` are the values of `train.schedule` and `data.source`; the defaults read all of theirs.
    """
    found = _BY_MODEL.get(model, ())
    found = found if layers > 1 else tuple({**dict.fromkeys(found), "model.local_window": None})
    found = found if pointer or counts else (*found, "recipe.apart")
    if not pointer:
        found = (*found, *_OF_POINTERS, *(_OF_CONTEXTS if model in ("transformer", "sliding_window") else ()))
    found = found if schedule == "linear" else (*found, "train.warmup_steps")
    return found if source == "mqar" else (*found, "data.mqar")
