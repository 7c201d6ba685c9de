"""The one exception a user is meant to read."""

import re

EXIT_CODE = 2


MEMORY = ("can't allocate memory", "out of memory", "not enough memory")
"""How torch says that there is no more, of a processor or of a GPU."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where and what to do.

    The front doors print it without a traceback and exit with `EXIT_CODE`.
    """


def lack_of_memory(error: MemoryError | RuntimeError) -> UserError | None:
    """What to tell where `error` says that there is not enough memory; None for any other."""
    said = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in said for words in MEMORY):
        return None
    asked = re.search(r"allocate ([\d.]+ \w+)", said, re.IGNORECASE)
    wanted = f" for {asked[1]} more" if asked else ""
    return UserError(
        f"there is not enough memory{wanted}: lower train.batch_tokens or pretrain.batch_tokens, or what makes the "
        "model large (context_dim, embedding.dim, model.ffn_dim, max_contexts, recipe.pointer_window)"
    )
