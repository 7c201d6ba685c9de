"""Which runs are those of `experiment=best`, of its rivals with the same extras, of each lever alone.

A run belongs there by its settings: those of `experiment=best` but for what the tables compare.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from ctxkv_lightning.config import Config, flat
from ctxkv_lightning.door import check_command_line

Run = dict[str, Any]
"""The content of a metrics.json."""

APART = ("seed", "cache_dir", "resume", "trainer.enable_progress_bar")
"""Keys by which runs of one kind differ."""

LAYERS = ("with its first layer alone", "with layers that all read contexts")
NO_CONTEXTS = "with no context but the current one for attention"

UNTAUGHT: dict[str, Any] = {"pretrain.lm_epochs": 0}
"""Contexts of an encoder that OACD alone has trained."""

TAUGHT_BRIEFLY: dict[str, Any] = {"pretrain.lm_epochs": 4, "pretrain.lm_weight_dropout": 0.0}
"""Contexts of one that was taught to predict for half as long, by all of its weights."""

LEVERS: dict[str, dict[str, Any]] = {
    "without the pointer": {"recipe.pointer_heads": 0, "recipe.pointer_values": False},
    "without counting": {"recipe.ngram": False},
    "without the pointer and without counting": {
        "recipe.pointer_heads": 0,
        "recipe.pointer_values": False,
        "recipe.ngram": False,
    },
    "without reading what is pointed at": {"recipe.pointer_values": False},
    "without reading the current context beside attention": {"recipe.read_current": False},
    "with head and shares learnt jointly, in all epochs": {"recipe.apart": False},
    "without a trained embedding": {"recipe.train_embedding": False},
    "without a projection before the head, and its bias": {"recipe.projection": False},
    "with norms after the layers (and no dropout in the feed-forward layer)": {"recipe.norm": "post"},
    LAYERS[0]: {"model.layers": 1},
    LAYERS[1]: {"model.local_window": None},
    NO_CONTEXTS: {"interval": 1, "max_contexts": 1},
    "without dropout of contexts": {"recipe.context_dropout": 0.0},
    "with the published dropout alone": {
        "recipe.embedding_dropout": 0.0,
        "recipe.output_dropout": 0.0,
        "model.dropout": 0.1,
    },
    "with one interval of 20": {"interval": 20},
    "with the grid (fewer contexts for attention)": {"selection": "grid"},
    "with an encoder that OACD trained for one iteration before it was taught": {"pretrain.max_iterations": 1},
    "with an encoder that was not taught to predict": UNTAUGHT,
    "with an encoder taught for half as long, and by all of its weights": TAUGHT_BRIEFLY,
    "with the published steps of 8,880 tokens (the warm-up takes the first epoch)": {"train.batch_tokens": 8880},
    "with a constant learning rate (and everything decaying)": {"train.schedule": "constant", "train.warmup_steps": 0},
}
"""What is done to the recipe, in words, and the keys that do it (`make results-best`)."""


def window(tokens: int, pointed_at: int) -> dict[str, Any]:
    """A sliding window over so many tokens in each layer, and a pointer over so many contexts."""
    return {"model.name": "sliding_window", "model.window_tokens": tokens, "recipe.pointer_window": pointed_at}


def nothing_else(pointed_at: int) -> dict[str, Any]:
    """A recurrence, which keeps the pointer's contexts alone."""
    return {"model.name": "recurrence", "recipe.pointer_window": pointed_at}


RIVALS: dict[str, dict[str, Any]] = {
    "transformer": {"model.name": "transformer"},
    "sliding_window": {"model.name": "sliding_window"},
    "sliding_window, half for its pointer": window(25, 310),
    "sliding_window, most for its pointer": window(9, 500),
    "recurrence": nothing_else(602),
}
"""Other models with the same extras, and the keys that choose them.

A sliding window and its pointer keep, together, as many bytes as the recipe; a recurrence, which keeps no contexts but
the pointer's, has room for more of those.
"""

Splits = dict[str, tuple[dict[str, Any], ...]]
"""By model, the keys of each way in which its memory was divided."""

WHOLE = "all"
MEMORIES: dict[str, Splits] = {
    WHOLE: {
        "context_kv": ({},),
        "sliding_window": tuple(RIVALS[f"sliding_window, {part} for its pointer"] for part in ("half", "most")),
        "recurrence": (RIVALS["recurrence"],),
    },
    "a quarter": {
        "context_kv": ({"interval": [1, 1, 1, 1, 2, 2, 3, 4], "model.local_window": 4, "recipe.pointer_window": 123},),
        "sliding_window": (window(5, 102), window(3, 126)),
        "recurrence": (nothing_else(149),),
    },
}
"""How much of the recipe's bytes may be kept, and what each model was tried with that keeps no more."""

Key = tuple[tuple[str, Any], ...]
Published = Mapping[int, Sequence[Run]]
"""Runs of the published model on the default text, by samples."""


def groups(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """The runs of the recipe, by what they change in it: sorted (key, value) pairs, none for the recipe itself."""
    base, plain = settings(), flat(asdict(Config()))
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if not has_recipe(run) or run["config"]["data"]["source"] != base["data.source"]:
            continue
        own = {**plain, **flat(run["config"])}  # a key that came later was as it comes
        if not own["pretrain.lm_epochs"]:
            own["pretrain.lm_weight_dropout"] = base["pretrain.lm_weight_dropout"]  # which nothing reads
        changed = tuple(
            sorted((key, str(own.get(key))) for key in base if key not in APART and own.get(key) != base[key])
        )
        kept = found.setdefault(changed, [])
        if own["seed"] not in [other["config"]["seed"] for other in kept]:
            kept.append(run)
    return found


@cache
def settings() -> dict[str, Any]:
    """Every setting of the recipe, by its dotted key."""
    return flat(asdict(check_command_line(["experiment=best"])[0]))


def has_recipe(run: Run) -> bool:
    """Whether a run is one of `experiment=best`, whatever was changed in it."""
    config: dict[str, Any] = run["config"]
    return "recipe" in config and config["embedding"]["dim"] == settings()["embedding.dim"]


def of(found: dict[Key, list[Run]], **changed: Any) -> list[Run]:
    """The runs that change exactly this (dots as double underscores)."""
    wanted = tuple(sorted((key.replace("__", "."), str(value)) for key, value in changed.items()))
    return found.get(wanted, [])


def mean(runs: Sequence[Run], name: str = "val_ppl") -> float:
    """Mean of a result over seeds."""
    return statistics.mean(run["result"][name] for run in runs)


def spread(runs: Sequence[Run], name: str = "val_ppl") -> str:
    """Mean ± sample standard deviation over seeds; the value alone where there is one."""
    values = [run["result"][name] for run in runs]
    return f"{mean(runs, name):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 where there is one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two standard deviations of the difference of the means lie between them."""
    difference = abs(statistics.mean(one) - statistics.mean(other))
    return difference > 2 * math.hypot(deviation(one), deviation(other))


def told_apart(runs: Sequence[Run], others: Sequence[Run], name: str = "test_ppl") -> str:
    """That these seeds do not tell a result of theirs apart, in words; nothing where they do or are not several."""
    values = [[run["result"][name] for run in each] for each in (runs, others)]
    several = min(map(len, values)) > 1
    return "; not told apart by these seeds" if several and not apart(*values) else ""


def first_seed(found: dict[Key, list[Run]], **changed: Any) -> list[Run]:
    """The run of seed 42 that changes exactly this, if there is one."""
    return [run for run in of(found, **changed) if run["config"]["seed"] == 42]


def best_split(found: dict[Key, list[Run]], splits: Sequence[dict[str, Any]]) -> list[Run]:
    """All seeds of the split of memory whose run of seed 42 does best on the validation set."""
    tried = [(mean(chosen), i) for i, changed in enumerate(splits) if (chosen := first_seed(found, **changed))]
    return of(found, **splits[min(tried)[1]]) if tried else []


def lever_rows(found: dict[Key, list[Run]]) -> list[tuple[float, str, list[Run]]]:
    """Validation PPL, what was done, and the run of seed 42; most harmful first."""
    rows = []
    for name, changed in LEVERS.items():
        if chosen := first_seed(found, **changed):
            rows.append((mean(chosen), name, chosen))
    return sorted(rows, key=lambda row: -row[0])
