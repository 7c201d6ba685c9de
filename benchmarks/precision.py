"""Validation PPL of bf16 runs, with contexts stored in fp32 and in bf16, against fp32: same data, seed and epochs."""

from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import default, our_run, temporary_experiment
from benchmarks.harness import parse, parser, save


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Difference of each run from the first in percent of validation PPL: by epoch, and at the best epoch of each."""
    first, *others = runs
    curves = {name: [row["val_ppl"] for row in run["epochs"]] for name, run in runs.items()}
    by_epoch = {name: [100 * (b / a - 1) for a, b in zip(curves[first], curves[name], strict=False)] for name in others}
    at_best = {name: 100 * (min(curves[name]) / min(curves[first]) - 1) for name in others}
    return {"runs": runs, "percent_by_epoch": by_epoch, "percent_at_best": at_best}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains three times on the default data."""
    made = parser(__doc__)
    made.add_argument("--epochs", type=int, default=2)
    options = parse(made, argv)
    epochs = 1 if options.quick else options.epochs
    with temporary_experiment(default(options.quick)) as prepared:
        runs = {name: our_run(prepared, name, epochs) for name in ("32-true", "bf16-mixed")}
        prepared.data.hparams["contexts_dtype"] = "bfloat16"
        prepared.data.use_encoders(prepared.data.encoder_folders)
        prepared.data.prepare_data()
        prepared.data.setup("fit")
        runs["bf16-mixed, bf16 contexts"] = our_run(prepared, "bf16-mixed", epochs, label="bf16-contexts")
    result = compare(runs)
    rows = [["run", "val PPL by epoch", "difference from fp32, %"]]
    for name, run in runs.items():
        differences = result["percent_by_epoch"].get(name, [])
        figures = " ".join(f"{row['val_ppl']:.2f}" for row in run["epochs"])
        rows.append([name, figures, " ".join(f"{percent:+.2f}" for percent in differences)])
    save("precision", result, rows, options)
    return result


if __name__ == "__main__":
    main()
