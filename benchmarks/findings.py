"""RESULTS.md: the tables of `make results`, and what they say, from the runs' metrics.json alone."""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks import recipe, remembered
from benchmarks.findings_runs import (
    DIRECT,
    EPOCHS,
    GRID,
    HEADS,
    LEARNT,
    LM_EPOCHS,
    OURS,
    PATIENT,
    TOKENS,
    TOLD,
    Row,
    crossed,
    published,
    rows_of,
)
from benchmarks.findings_sentences import sentences
from benchmarks.recipe_runs import Run
from benchmarks.recorded import Entry, kept_entries
from ctxkv_lightning.report.comparison import write_comparison

MEASURED = (
    "The documents of a split are joined by blank lines to one text, through which contexts, windows, pointer and "
    "cache run on; all its tokens but the first are scored. Bytes are what a decoder keeps. That of `context_kv` keeps "
    "contexts and makes keys and values of them at every step; those of `sliding_window` and `transformer` keep keys "
    "and values. Where they have a single layer and a frozen embedding, as the published ones have, they could keep "
    "token ids, four bytes each, and make their keys and values anew as well."
)


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the page and two comparisons, of the published models and of the recipe; returns the page's path."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("runs", type=Path, help="folder of the finished runs")
    made.add_argument("--output", type=Path, default=Path("RESULTS.md"))
    made.add_argument("--pages", type=Path, default=Path("docs/results"), help="folder of the comparison page")
    options = made.parse_args(argv)
    plain, best = folders_of(options.runs)
    write_comparison(plain, options.pages)
    if best:
        write_comparison(best, options.pages / "best")
    keep_metrics(options.runs, options.pages / "runs")
    write_page(options.pages, options.output)
    return options.output


def write_page(pages: Path, output: Path) -> None:
    """The page from what is kept, wherever the runs are."""
    made = page(kept_runs(pages / "runs"), pages, kept_entries(pages / "recall"))
    output.write_text(made, encoding="utf-8")


def folders_of(runs: Path) -> tuple[list[Path], list[Path]]:
    """The sweeps' folders: of the published models; and of models with the recipe, its levers left to their table."""
    folders = [folder for folder in sorted(runs.iterdir()) if folder.is_dir() and kept_runs(folder)]
    plain = [folder for folder in folders if published(kept_runs(folder))]
    return plain, [
        folder for folder in folders if folder not in plain and folder.name.startswith(("best", "equal-bytes"))
    ]


def keep_metrics(runs: Path, kept: Path) -> None:
    """Copies every metrics.json, from which all of this can be made again; of the recall task, evaluations are kept.

    Of the text's own files the names are kept, not where they were.
    """
    shutil.rmtree(kept, ignore_errors=True)
    for file in sorted(runs.rglob("metrics.json")):
        hidden = any(part.startswith(".") for part in file.relative_to(runs).parts)
        metrics = json.loads(file.read_text(encoding="utf-8"))
        data = metrics["config"]["data"]
        if not hidden and data["source"] != "mqar":
            data["files"] = [Path(name).name for name in data.get("files", [])]
            target = kept / file.relative_to(runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def kept_runs(kept: Path) -> list[Run]:
    """The runs whose metrics were copied."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(kept.rglob("metrics.json"))]


def crossed_table(runs: Sequence[Run]) -> str:
    """Validation PPL, a row for each max_contexts and a column for each interval."""
    found = crossed(runs)
    intervals, contexts = (sorted({place[axis] for place in found}) for axis in (0, 1))
    lines = [["max_contexts", *(f"interval={interval}" for interval in intervals)], ["---:"] * (1 + len(intervals))]
    for each in contexts:
        row = [found.get((interval, each)) for interval in intervals]
        lines.append([str(each), *("" if run is None else f"{run[-1]['result']['val_ppl']:.1f}" for run in row)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *twice(found)])


def twice(found: dict[tuple[int, int], list[Run]]) -> list[str]:
    """Of trials that ran more than once, how far machines are apart."""
    return [
        f"`interval={interval} max_contexts={contexts}` ran once more: {_ppl_on(runs[0])}, {_ppl_on(runs[-1])}. The "
        "tables have each where it belongs; the page side by side counts their mean."
        for (interval, contexts), runs in found.items()
        if len(runs) > 1
    ]


def _ppl_on(run: Run) -> str:
    device = "a CPU" if run["machine"]["device"] == "cpu" else "a GPU"
    return f"{run['result']['val_ppl']:.1f} on {device}"


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    head = [
        "",
        "val. PPL",
        "test PPL",
        "val. accuracy",
        "gap",
        "best epoch",
        "bytes kept",
        "trained parameters",
        "seeds",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(runs: Sequence[Run], pages: Path, recorded: Sequence[Entry]) -> str:
    """The whole page, of runs' metrics and of what was recorded of their memory."""
    every, runs = runs, published(runs)
    parts = [
        "# Results",
        "Made by `make results` (benchmarks/findings.py) from the runs' metrics.json, which are in "
        f"[{pages}/runs]({pages}/runs); [side by side]({pages}/report.md). Default text and tokenizer, "
        f"{machines(every)}; ± is the sample standard deviation over seeds, gap is validation minus train PPL at the "
        "best epoch, and bytes kept are a decoder's after 10,000 tokens in fp32. First the published model and its "
        f"rivals: all were trained in the published way for at most {EPOCHS} epochs, tuned for none; the published "
        "selection also for as long as its patience of three epochs lasted. Means count as different when two standard "
        "deviations of their difference lie between them. What was 'asked for' are bounds that the project set itself."
        f"{taught(runs)} Not yet run: " + missing(runs) + ".",
        MEASURED,
    ]
    for samples in (100, 500):
        rows = rows_of(runs, samples)
        if rows:
            parts += [f"## {samples} samples", table(rows)]
    if len(crossed(runs)) > 1:
        parts += ["## Sweep over interval and max_contexts, seed 42", crossed_table(runs)]
    said = sentences(runs, rows_of(runs, 100), rows_of(runs, 500))
    parts += ["## What they say", "\n".join(f"{n}. {text}" for n, text in enumerate(said, start=1))]
    ours, patient = (
        {size: next((row.runs for row in rows_of(runs, size) if row.name == name), []) for size in (100, 500)}
        for name in (OURS, PATIENT)
    )
    parts += recipe.section(every, ours, patient)
    parts += remembered.section(recorded)
    return "\n\n".join(parts) + "\n"


def taught(runs: Sequence[Run]) -> str:
    """What it is that some encoders have learnt, in words; nothing where none has."""
    if not any(run["config"]["pretrain"].get("lm_epochs") for run in runs):
        return ""
    return (
        f" Where a name has '{LEARNT.removeprefix(', ')}', Phase 1 went on for {LM_EPOCHS} epochs by truncated "
        "back-propagation (`pretrain.lm_epochs`); all else is the same. Models that attend to tokens have an encoder, "
        "and keep its last context, where they read the current one."
    )


def missing(runs: Sequence[Run]) -> str:
    """What `make results` has still to run, in words."""
    left = []
    for samples in (100, 500):
        rows = {row.name: len(row.runs) for row in rows_of(runs, samples)}
        names = [OURS, PATIENT, GRID, HEADS, "sliding_window", "transformer", "recurrence", "cascade"]
        told = [f"{name}{TOLD}" for name in (OURS, *TOKENS)]
        names += [OURS + LEARNT, OURS + DIRECT, *told, "recurrence" + LEARNT] if samples == 100 else []
        wanting = [f"{name} ({3 - rows.get(name, 0)})" for name in names if rows.get(name, 0) < 3]
        left += [f"seeds at {samples} samples of {', '.join(wanting)}"] if wanting else []
    if len(crossed(runs)) < 9:
        left.append(f"{9 - len(crossed(runs))} of 9 trials of the sweep over interval and max_contexts")
    return "; ".join(left) or "nothing"


def machines(runs: Sequence[Run]) -> str:
    """What the runs ran on, in words."""
    on_gpu = [run["machine"]["processor"] for run in runs if run["machine"]["device"].startswith("cuda")]
    exact = sum(run["machine"]["precision"] == "32-true" for run in runs)
    precision = f", {exact} in fp32, the others in bf16" if 0 < exact < len(runs) else ""
    if not on_gpu:
        return f"on a CPU{precision}"
    gpus = " or ".join(sorted(set(on_gpu)))
    return f"{len(runs) - len(on_gpu)} of the {len(runs)} runs on a CPU, {len(on_gpu)} on an {gpus}{precision}"


if __name__ == "__main__":
    print(main())
