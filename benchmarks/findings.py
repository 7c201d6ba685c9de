"""RESULTS.md: the tables of `make results`, and what they say, sentence by sentence, from the runs' metrics.json alone.

No sentence states more than its numbers: which side wins, and whether seeds agree, is decided here, run by run.
"""

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import recipe, remembered
from benchmarks.recipe_sentences import IN_REACH
from benchmarks.recorded import Entry, kept_entries
from ctxkv_lightning.config import RecipeConfig
from ctxkv_lightning.report.comparison import write_comparison

Run = dict[str, Any]
"""The content of a metrics.json."""

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
    return plain, [folder for folder in folders if folder not in plain and folder.name.startswith("best")]


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


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 where there is one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


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


def crossed(runs: Sequence[Run]) -> dict[tuple[int, int], Run]:
    """Strided runs at 100 samples and the first seed, by (interval, max_contexts); of two alike, the later one."""
    found = {}
    for run in runs:
        config = run["config"]
        if kind(run) == OURS and config["samples"] == 100 and config["seed"] == 42:
            found[config["interval"], config["max_contexts"]] = run
    return found


def crossed_table(runs: Sequence[Run]) -> str:
    """Validation PPL, a row for each max_contexts and a column for each interval."""
    found = crossed(runs)
    intervals, contexts = (sorted({place[axis] for place in found}) for axis in (0, 1))
    lines = [["max_contexts", *(f"interval={interval}" for interval in intervals)], ["---:"] * (1 + len(intervals))]
    for each in contexts:
        row = [found.get((interval, each)) for interval in intervals]
        lines.append([str(each), *("" if run is None else f"{run['result']['val_ppl']:.1f}" for run in row)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        f"deviations of their difference lie between them.{taught(runs)} Not yet run: " + missing(runs) + ".",
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
    if not on_gpu:
        return "on a CPU"
    gpus = " or ".join(sorted(set(on_gpu)))
    return f"{len(runs) - len(on_gpu)} of the {len(runs)} runs on a CPU, {len(on_gpu)} on an {gpus}"


def sentences(runs: Sequence[Run], rows: Sequence[Row], more: Sequence[Row] = ()) -> list[str]:
    """A sentence for each question, of the rows at 100 samples and at 500; those whose runs are missing are out."""
    by_name = {row.name: row for row in rows}
    ours, said = by_name.get(OURS), []
    if ours is None:
        return ["The published recipe itself has not been run."]
    first = ours.runs[0]
    said.append(_footing(ours, first["footing"]))
    for name, why in (
        ("sliding_window", "the keys and values of the last tokens"),
        ("transformer", f"attention over all tokens, PPL measured with {IN_REACH} in reach"),
        ("recurrence", "the current context alone, no attention"),
        ("cascade", "two contexts of two encoders, no attention"),
        (GRID, "contexts at multiples of the interval"),
        (HEADS, "near and far in one layer"),
        (OURS + LEARNT, "contexts of an encoder that was also taught to predict, before they were stored"),
        ("recurrence" + LEARNT, "the current context alone, of such an encoder"),
        (OURS + DIRECT, "the current context is also read as `recurrence` reads it"),
        (OURS + TOLD, "the current context of such an encoder is also read as `recurrence` reads it"),
        ("sliding_window" + TOLD, "the last tokens, and the very same context"),
        ("transformer" + TOLD, "all tokens, and the very same context"),
    ):
        if name in by_name:
            said.append(_against(ours, by_name[name], why))
    if OURS + TOLD in by_name:
        said.append(_taught_against_rivals(by_name))
        said += [
            _told_the_same(by_name[OURS + TOLD], by_name[name + TOLD]) for name in TOKENS if name + TOLD in by_name
        ]
    if len(crossed(runs)) > 1:
        said.append(_sweep(crossed(runs)))
    said.append(_overfitting(rows))
    if any(row.name == OURS for row in more):
        said.append(_with_more_text(more))
    return said


def _footing(ours: Row, footing: dict[str, float]) -> str:
    mean = statistics.mean(ours.val)
    unigram, trigram, cache = (footing[f"{name}_ppl"] for name in ("unigram", "kneser_ney", "kneser_ney_cache"))
    return (
        f"The published recipe reaches a validation PPL of {spread(ours.val)}: {mean / unigram:.2f} × word "
        f"frequencies ({unigram:.1f}), but {mean / trigram:.2f} × a Kneser-Ney trigram ({trigram:.1f}) and "
        f"{mean / cache:.1f} × the trigram with a cache ({cache:.1f}) that counted the same tokens."
    )


def _against(ours: Row, other: Row, why: str) -> str:
    ratio = statistics.mean(other.val) / statistics.mean(ours.val)
    verdict = "loses to the published selection" if ratio > 1 else "beats the published selection"
    if not apart(ours.val, other.val):
        verdict = "is not told apart from the published selection by these seeds"
    elif min(len(ours.val), len(other.val)) < 2:
        verdict += " (one seed)"
    kept = (
        f"{other.bytes:,} bytes kept and {other.trained:,} parameters trained, "
        f"against {ours.bytes:,} and {ours.trained:,}"
    )
    return (
        f"`{other.name}` ({why}; {kept}) {verdict}: validation PPL {spread(other.val)} against {spread(ours.val)}, "
        f"{ratio:.3f} ×."
    )


def _taught_against_rivals(rows: dict[str, Row]) -> str:
    """Test PPL of contexts that were taught and are read directly, beside rivals and beside each of the two alone."""
    ours = rows[OURS + TOLD]
    test = statistics.mean(ours.test)
    others = [rows[name] for name in (*TOKENS, "recurrence" + LEARNT) if name in rows]
    told = "; ".join(
        f"{test / statistics.mean(row.test):.3f} × that of `{row.name}` ({spread(row.test)}, {row.bytes:,} bytes)"
        for row in others
    )
    parts = {OURS + LEARNT: "the teaching alone", OURS + DIRECT: "the direct read alone", OURS: "neither"}
    alone = ", ".join(f"with {what} {spread(rows[name].test)}" for name, what in parts.items() if name in rows)
    return (
        f"Contexts that are both taught and read directly bring a test PPL of {spread(ours.test)} ({ours.bytes:,} "
        f"bytes kept); {alone}. That is {told}."
    )


def _told_the_same(ours: Row, other: Row) -> str:
    """Attention to contexts against attention to tokens, where both read the current context of the same encoder.

    Of the seeds that both have, for each has an encoder of its own.
    """
    own = same_seeds(ours, other)
    ratio = statistics.mean(own) / statistics.mean(other.test)
    what = "attention to contexts does better" if ratio < 1 else "attention to contexts does worse"
    if len(own) < 2:
        what = "one seed says no more"
    elif not apart(own, other.test):
        what = "attention to contexts and to tokens are not told apart by these seeds"
    seeds = f"{len(other.test)} seeds" if len(other.test) > 1 else "one seed"
    return (
        f"Given the same context of the same encoder to read, `{other.name.removesuffix(TOLD)}` is at a test PPL of "
        f"{spread(other.test)} ({other.bytes:,} bytes kept; {seeds}), against which ours is at "
        f"{ratio:.3f} ×: {what}."
    )


def same_seeds(ours: Row, other: Row) -> list[float]:
    """Test PPL of ours with the seeds that the other one has."""
    seeds = {run["config"]["seed"] for run in other.runs}
    return [run["result"]["test_ppl"] for run in ours.runs if run["config"]["seed"] in seeds]


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two standard deviations of the difference of the means lie between them."""
    difference = abs(statistics.mean(one) - statistics.mean(other))
    return difference > 2 * math.hypot(deviation(one), deviation(other))


def _sweep(found: dict[tuple[int, int], Run]) -> str:
    ppl = {place: run["result"]["val_ppl"] for place, run in found.items()}
    best, worst = (choose(ppl, key=lambda place: ppl[place]) for choose in (min, max))
    words = [f"`interval={interval} max_contexts={contexts}`" for interval, contexts in (best, worst)]
    return (
        f"Over interval and max_contexts, validation PPL is best at {words[0]} ({ppl[best]:.1f}), worst at {words[1]} "
        f"({ppl[worst]:.1f}; one seed): {ppl[worst] / ppl[best] - 1:.1%} apart."
    )


def _with_more_text(rows: Sequence[Row]) -> str:
    (ours,) = [row for row in rows if row.name == OURS]
    mean = statistics.mean(ours.val)
    better = [row for row in rows if statistics.mean(row.val) < mean and row.name != PATIENT]
    named = ", ".join(f"`{row.name}` {spread(row.val)}" for row in better)
    trigram = ours.runs[0]["footing"]["kneser_ney_ppl"]
    return (
        f"With 500 samples the published selection is at a validation PPL of {spread(ours.val)}, {mean / trigram:.2f} "
        f"× the trigram ({trigram:.1f}); "
        + (f"better than it are {named}." if better else "nothing here is better than it.")
    )


def _overfitting(rows: Sequence[Row]) -> str:
    widest, narrowest = (choose(rows, key=lambda row: row.gap) for choose in (max, min))
    return (
        f"All models fit their training text far better than the validation text: the gap is from {narrowest.gap:.0f} "
        f"PPL (`{narrowest.name}`) to {widest.gap:.0f} (`{widest.name}`), so what is short at this size is text."
    )


if __name__ == "__main__":
    print(main())
