"""Which runs are those of the published model and of its rivals, and what each is called in the tables."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.recipe_runs import Run
from ctxkv_lightning.config import RecipeConfig

OURS, GRID, HEADS = "context_kv, strided", "context_kv, grid", "context_kv, an interval per head"
PATIENT = "context_kv, strided, until its patience ends"
"""The published selection with the published limit of 40 epochs; all others have at most `EPOCHS`."""

LEARNT = ", encoder also trained as a language model"
"""What is added to the name of a model whose encoder was: contexts of another kind, kept and read like the others."""

DIRECT = ", current context read beside attention"
"""What is added to the name of a model that has the one part of the recipe that is shown without the others."""

TOLD = LEARNT + DIRECT

TOKENS = ("sliding_window", "transformer")
"""Models that attend to tokens."""

EPOCHS, LM_EPOCHS = 8, 4
"""Of Phase 2, and of an encoder that is taught."""


def kind(run: Run) -> str:
    """What a run is called in the tables."""
    added = LEARNT if run["config"]["pretrain"].get("lm_epochs") else ""
    return selection(run) + added + (DIRECT if run["config"].get("recipe", {}).get("read_current") else "")


def selection(run: Run) -> str:
    """The model of a run, and, of ours, which contexts it reads and for how long it is trained."""
    config = run["config"]
    if config["model"]["name"] != "context_kv":
        return str(config["model"]["name"])
    if isinstance(config["interval"], list):
        return HEADS
    if config["selection"] == "grid":
        return GRID
    return PATIENT if config["train"]["max_epochs"] > EPOCHS else OURS


class Row:
    """Runs that differ only in their seed."""

    def __init__(self, name: str, runs: Sequence[Run]) -> None:
        self.name, self.runs = name, runs
        results = [run["result"] for run in runs]
        self.val = [result["val_ppl"] for result in results]
        self.test = [result["test_ppl"] for result in results]
        self.accuracy = statistics.mean(result["val_accuracy"] for result in results)
        first = runs[0]
        self.bytes = first["decode_state"]["bytes"]["10000"]
        self.trained = first["parameters"]["trainable"]
        self.epochs = [run["train"]["best_epoch"] for run in runs]
        self.gap = statistics.mean(result["train_val_gap"] for result in results)
        self.train = statistics.mean(result["val_ppl"] - result["train_val_gap"] for result in results)

    def cells(self) -> list[str]:
        return [
            self.name,
            spread(self.val),
            spread(self.test),
            f"{self.accuracy:.1%}",
            f"{self.gap:.0f}",
            "/".join(map(str, self.epochs)),
            f"{self.bytes:,}",
            f"{self.trained:,}",
            str(len(self.runs)),
        ]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def published(runs: Sequence[Run]) -> list[Run]:
    """The runs of the default sizes and text without a recipe, or with no more of it than the direct read."""
    plain = asdict(RecipeConfig())
    return [
        run
        for run in runs
        if run["config"]["embedding"]["dim"] == 768
        and run["config"]["data"]["source"] == "pydocs"
        and {**plain, **run["config"].get("recipe", {}), "read_current": False} == plain
        and run["config"]["pretrain"].get("lm_epochs", 0) in (0, LM_EPOCHS)
        and not run["config"]["pretrain"].get("lm_weight_dropout")
        and run["config"]["train"].get("schedule", "constant") == "constant"
    ]


def rows_of(runs: Sequence[Run], samples: int) -> list[Row]:
    """The models at the default window, best first by validation PPL."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = run["config"]
        default = config["max_contexts"] == 32 and (isinstance(config["interval"], list) or config["interval"] == 20)
        long = config["train"]["max_epochs"] > EPOCHS and kind(run) != PATIENT
        if config["samples"] == samples and default and not long:
            seeds = [other["config"]["seed"] for other in groups.get(kind(run), [])]
            if config["seed"] not in seeds:
                groups.setdefault(kind(run), []).append(run)
    return sorted((Row(name, group) for name, group in groups.items()), key=lambda row: statistics.mean(row.val))


def crossed(runs: Sequence[Run]) -> dict[tuple[int, int], list[Run]]:
    """Strided runs at 100 samples and the first seed, by (interval, max_contexts); the last of each is the sweep's."""
    found: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        config = run["config"]
        if kind(run) == OURS and config["samples"] == 100 and config["seed"] == 42:
            found.setdefault((config["interval"], config["max_contexts"]), []).append(run)
    return found
