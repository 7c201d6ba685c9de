"""Seconds from reading the text to the published method's best validation PPL, for it and for ours.

Both share text, table and Phase 1; then the published method trains until its patience ends (`--full`) or the
budget does, and ours trains until its validation PPL is below the best that the other reached.
"""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import Prepared, our_run, published_run, temporary_experiment
from benchmarks.harness import parse, parser, save
from benchmarks.published import SWEEPS
from ctxkv_lightning.run.machine import resolve_precision


def compare(prepared: Prepared, sweeps: int, budget: float, max_epochs: int) -> dict[str, Any]:
    """Trains both; the two times and their ratio (None where ours did not get there)."""
    published = published_run(prepared, sweeps, budget, max_epochs)
    target = published["best_val_ppl"]
    precision = resolve_precision(prepared.config.trainer.precision, prepared.config.trainer.accelerator)
    # EarlyStopping asks for less than its threshold: equal is enough here.
    ours = our_run(prepared, precision, prepared.config.train.max_epochs, math.nextafter(target, math.inf))
    best = min(row["val_ppl"] for row in ours["epochs"])
    before = sum(prepared.seconds.values())
    # Solving contexts is ours alone. Nothing stands in its place: Phase 1 leaves the published method its training
    # contexts, and the three sweeps it spent on the validation text are too short to matter.
    shared = before - prepared.seconds["contexts"]
    their_seconds = shared + sum(row["seconds"] for row in published["epochs"][: published["best_epoch"]])
    our_seconds = before + ours["seconds"]
    complete = published["stopped_by"] == "patience"
    return {
        "target_val_ppl": target,
        "target_is": "the best of a full run" if complete else f"the best so far, stopped by {published['stopped_by']}",
        "prepare_seconds": prepared.seconds,
        "published": {**published, "seconds_to_target": their_seconds},
        "ours": {**ours, "reached": best <= target, "best_val_ppl": best, "seconds_to_target": our_seconds},
        "ratio": their_seconds / our_seconds if best <= target else None,
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One line for each method."""
    table = [["method", "epochs", "seconds/epoch", "best val PPL", "seconds to target", "sooner"]]
    for name in ("published", "ours"):
        run = result[name]
        epoch = sum(row["seconds"] for row in run["epochs"]) / len(run["epochs"])
        figures = [str(len(run["epochs"])), f"{epoch:.1f}", f"{run['best_val_ppl']:.1f}"]
        table.append([name, *figures, f"{run['seconds_to_target']:.1f}", ""])
    table[-1][-1] = "not reached" if result["ratio"] is None else f"{result['ratio']:.2f} ×"
    return [*table, [f"target: {result['target_is']}", "", "", f"{result['target_val_ppl']:.1f}", "", ""]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares on the default data."""
    made = parser(__doc__)
    made.add_argument("--full", action="store_true", help="train the published method until its patience ends")
    made.add_argument("--budget", type=float, default=420, help="seconds for the published method, without --full")
    made.add_argument("--sweeps", type=int, default=SWEEPS, help="fixed-point sweeps of the published contexts")
    options = parse(made, argv)
    budget = math.inf if options.full else options.budget
    with temporary_experiment(options.quick) as prepared:
        result = compare(prepared, options.sweeps, budget, prepared.config.train.max_epochs)
    save("time_to_quality", result, rows(result), options)
    return result


if __name__ == "__main__":
    main()
