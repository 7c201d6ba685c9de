"""What trained models remember: asks the runs of `make results-recall` and of the other results, and records it.

Of the runs on the default text, one of each kind is asked: the published models and those of `experiment=best`, at the
default window, with 100 samples and the first seed; of the associative recall task, every run. An evaluation.json that
is newer than its run and asked the same is taken as it is. What is recorded of runs that are not there any more, or
that no longer load, stays.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import findings, findings_runs, recipe_runs
from benchmarks.recorded import BEST, RECORD, Entry, kept_entries
from benchmarks.remembered import draw
from ctxkv_lightning.config import Config, ModelConfig, load_config
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.evaluate import EVALUATION, Asked, common_lags, evaluate_run, suites_of
from ctxkv_lightning.report.drawing import count
from ctxkv_lightning.run.folder import RunFolder, write_whole

SEED, SPLIT = 42, "validation"
"""What texts the suites draw; the test set is read once, by the run itself."""

LAGS = common_lags([Config(), Config(model=ModelConfig(name="sliding_window"))])
"""Lags of the copy suite: the edges of the published window, and of the sliding one in as many bytes."""


class Chosen(NamedTuple):
    """A run to be asked."""

    folder: Path
    name: str
    metrics: recipe_runs.Run


def main(argv: Sequence[str] | None = None) -> Path:
    """Asks, records, draws, and makes RESULTS.md anew from what is kept; returns the path of the record."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("runs", type=Path, help="folder of the finished runs")
    made.add_argument("--output", type=Path, default=Path("RESULTS.md"))
    made.add_argument("--pages", type=Path, default=Path("docs/results"), help="folder of what is kept")
    options = made.parse_args(argv)
    folder = options.pages / "recall"
    record([entry for each in chosen(options.runs) for entry in answered(each)], folder)
    draw(folder)
    findings.write_page(options.pages, options.output)
    return folder / RECORD


def chosen(runs: Path) -> Iterator[Chosen]:
    """The runs to be asked; of those of one kind on the text, the first by path."""
    seen = set()
    for file in sorted(runs.rglob("metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        on_task = metrics["config"]["data"]["source"] == "mqar"
        name = task_name(metrics) if on_task else text_name(metrics)
        key = name, metrics["config"]["seed"], on_task
        if name and key not in seen:
            seen.add(key)
            yield Chosen(file.parent, name, metrics)


def text_name(run: recipe_runs.Run) -> str | None:
    """What a run on the default text is called; None for one that is not asked."""
    if run["config"]["seed"] != SEED or run["config"]["data"]["source"] != "pydocs":
        return None
    published = findings_runs.rows_of(findings_runs.published([run]), 100)
    if published:
        return published[0].name
    best, model = recipe_runs.groups([run]), run["config"]["model"]["name"]
    with_recipe = recipe_runs.of(best) or recipe_runs.of(best, **recipe_runs.RIVALS.get(model, {"model.name": model}))
    return model + BEST if with_recipe else None


def task_name(run: recipe_runs.Run) -> str:
    """What a run on the recall task is called: its model, how much a layer may read, its layers if they are several."""
    model, read, layers = run["config"]["model"]["name"], reads(run), run["config"]["model"].get("layers", 1)
    name = model if read is None else f"{model}, {count(read, 'context' if model == 'context_kv' else 'token')}"
    return name if layers == 1 else f"{name}, {layers} layers"


def reads(run: recipe_runs.Run) -> int | None:
    """Contexts or tokens that a position reads; None for models without a window."""
    match run["config"]["model"]["name"]:
        case "context_kv":
            return int(run["config"]["max_contexts"])
        case "sliding_window":
            return (int(run["window"]["span_tokens"]) - 1) // run["config"]["model"].get("layers", 1) + 1
        case _:
            return None


def answered(run: Chosen) -> list[Entry]:
    """What is recorded of a run; nothing, and a line that says why, where it cannot be asked."""
    try:
        evaluation = evaluation_of(run.folder)
    except UserError as error:
        print(f"{run.folder} ({run.name}) is left out: {error}", file=sys.stderr)
        return []
    config = run.metrics["config"]
    return [
        {
            "name": run.name,
            "seed": config["seed"],
            "trained": run.metrics["parameters"]["trainable"],
            "reads": reads(run.metrics),
            "task": config["data"]["mqar"] if config["data"]["source"] == "mqar" else None,
            "evaluation": evaluation,
        }
    ]


def evaluation_of(folder: Path) -> dict[str, Any]:
    """A run's evaluation, from its folder if that one still holds. Raises UserError for a run that does not load."""
    config = load_config(RunFolder(folder))
    asked = Asked(suites_of(folder, config, None), True, SPLIT, SEED, None, LAGS)
    return finished(folder, asked) or evaluate_run(folder, config, asked)


def finished(folder: Path, asked: Asked) -> dict[str, Any] | None:
    """The evaluation.json of a run, where it is newer than the run and asked the same."""
    path = folder / EVALUATION
    if not path.exists() or path.stat().st_mtime < RunFolder(folder).metrics.stat().st_mtime:
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    suites = {name: found["suites"].get(name) for name in asked.suites}
    same = all(each and (each["split"], each["seed"]) == (asked.split, asked.seed) for each in suites.values())
    lags = [lag["first"] for lag in suites["copy"]["lags"]] if same and "copy" in suites else list(asked.lags)
    return {**found, "suites": suites} if same and lags == list(asked.lags) else None


def record(entries: Sequence[Entry], folder: Path) -> None:
    """Writes the entries beside those that were recorded before, of which they replace their own."""
    found = {
        (entry["name"], entry["seed"], entry["task"] is None): entry for entry in (*kept_entries(folder), *entries)
    }
    ordered = [found[key] for key in sorted(found)]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(ordered, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    print(main())
