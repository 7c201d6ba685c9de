"""Validation PPL of a bf16 run against the fp32 run: same data, same seed, a few epochs."""

from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import our_run, temporary_experiment
from benchmarks.harness import parse, parser, save


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Difference of bf16 from fp32 in percent of validation PPL: by epoch, and at the best epoch of each."""
    curves = {name: [row["val_ppl"] for row in run["epochs"]] for name, run in runs.items()}
    fp32, bf16 = curves["32-true"], curves["bf16-mixed"]
    by_epoch = [100 * (b / a - 1) for a, b in zip(fp32, bf16, strict=False)]
    return {"runs": runs, "percent_by_epoch": by_epoch, "percent_at_best": 100 * (min(bf16) / min(fp32) - 1)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains twice on the default data."""
    made = parser(__doc__)
    made.add_argument("--epochs", type=int, default=2)
    options = parse(made, argv)
    epochs = 1 if options.quick else options.epochs
    with temporary_experiment(options.quick) as prepared:
        runs = {precision: our_run(prepared, precision, epochs) for precision in ("32-true", "bf16-mixed")}
    result = compare(runs)
    rows = [["epoch", "fp32 val PPL", "bf16 val PPL", "difference, %"]]
    pairs = zip(runs["32-true"]["epochs"], runs["bf16-mixed"]["epochs"], result["percent_by_epoch"], strict=False)
    rows += [[str(a["epoch"]), f"{a['val_ppl']:.2f}", f"{b['val_ppl']:.2f}", f"{p:+.2f}"] for a, b, p in pairs]
    save("precision", result, rows, options)
    return result


if __name__ == "__main__":
    main()
