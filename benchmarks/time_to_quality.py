"""Seconds from reading the text to the published method's best validation PPL: for it, for ours, and for the recipe.

The first two share text, table and Phase 1; then the published method trains until its patience ends (`--full`) or the
budget does, and ours trains until its validation PPL is below the best that the other reached. `experiment=best` does
all of it anew, since its table is another, and so are its contexts; its encoder is not taught to predict, which that
PPL does not need.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.experiment import QUICK, Prepared, default, our_run, published_run, temporary_experiment
from benchmarks.harness import parse, parser, save
from benchmarks.published import SWEEPS
from ctxkv_lightning.config import RecipeConfig
from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.run.machine import resolve_precision

QUICK_RECIPE = replace(QUICK, recipe=RecipeConfig(norm="pre", pointer_heads=1, pointer_window=30, ngram=True))


def compare(prepared: Prepared, sweeps: int, budget: float, max_epochs: int) -> dict[str, Any]:
    """Trains the published method, then ours to its best; the two times and their ratio (None where it was not met)."""
    published = published_run(prepared, sweeps, budget, max_epochs)
    # Solving contexts is ours alone. Nothing stands in its place: Phase 1 leaves the published method its training
    # contexts, and the three sweeps it spent on the validation text are too short to matter.
    shared = sum(prepared.seconds.values()) - prepared.seconds["contexts"]
    seconds = shared + sum(row["seconds"] for row in published["epochs"][: published["best_epoch"]])
    complete = published["stopped_by"] == "patience"
    return {
        "target_val_ppl": published["best_val_ppl"],
        "target_is": "the best of a full run" if complete else f"the best so far, stopped by {published['stopped_by']}",
        "published": {**published, "seconds_to_target": seconds},
        "ours": reach(prepared, published["best_val_ppl"], seconds),
    }


def reach(prepared: Prepared, target: float, their_seconds: float) -> dict[str, Any]:
    """Trains until an epoch ends at the target PPL or below it; how much sooner than `their_seconds` that was."""
    config = prepared.config
    precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    # EarlyStopping asks for less than its threshold: equal is enough here.
    ours = our_run(prepared, precision, config.train.max_epochs, math.nextafter(target, math.inf))
    best = min(row["val_ppl"] for row in ours["epochs"])
    seconds = sum(prepared.seconds.values()) + ours["seconds"]
    return {
        **ours,
        "prepare_seconds": prepared.seconds,
        "reached": best <= target,
        "best_val_ppl": best,
        "seconds_to_target": seconds,
        "ratio": their_seconds / seconds if best <= target else None,
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One line for each method."""
    table = [["method", "epochs", "seconds/epoch", "val PPL", "seconds to target", "sooner"]]
    for name in ("published", "ours", "recipe"):
        run = result[name]
        epoch = sum(row["seconds"] for row in run["epochs"]) / len(run["epochs"])
        sooner = "" if name == "published" else f"{run['ratio']:.2f} ×" if run["reached"] else "not reached"
        figures = [str(len(run["epochs"])), f"{epoch:.1f}", f"{run['best_val_ppl']:.1f}"]
        table.append([name, *figures, f"{run['seconds_to_target']:.1f}", sooner])
    return [*table, [f"target: {result['target_is']}", "", "", f"{result['target_val_ppl']:.1f}", "", ""]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares on the default data."""
    made = parser(__doc__)
    made.add_argument("--full", action="store_true", help="train the published method until its patience ends")
    made.add_argument("--budget", type=float, default=420, help="seconds for the published method, without --full")
    made.add_argument("--sweeps", type=int, default=SWEEPS, help="fixed-point sweeps of the published contexts")
    options = parse(made, argv)
    budget = math.inf if options.full else options.budget
    with temporary_experiment(default(options.quick)) as prepared:
        result = compare(prepared, options.sweeps, budget, prepared.config.train.max_epochs)
    recipe = QUICK_RECIPE if options.quick else check_command_line(["experiment=best", "pretrain.lm_epochs=0"])[0]
    with temporary_experiment(recipe) as prepared:
        result["recipe"] = reach(prepared, result["target_val_ppl"], result["published"]["seconds_to_target"])
    save("time_to_quality", result, rows(result), options)
    return result


if __name__ == "__main__":
    main()
