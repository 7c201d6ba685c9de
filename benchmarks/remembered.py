"""The part of RESULTS.md about what models remember: tables and figures of the evaluations that were recorded."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.recipe import markdown, numbered
from benchmarks.recorded import BEST, EDGES, Entry, Row, excess, groups, kept_entries, moved, percent, texts
from benchmarks.remembered_sentences import task_sentences, text_sentences
from ctxkv_lightning.report.drawing import save_png, styled
from ctxkv_lightning.report.markdown import table as markdown_table
from ctxkv_lightning.report.recall_figure import by_lag, by_state
from ctxkv_lightning.report.recall_tables import mean_recall, tables

ON_TEXT = ("copy", "passkey")

LEFT = 100
"""Tokens of history that a column of the table leaves."""


def section(entries: Sequence[Entry]) -> list[str]:
    """The section as Markdown parts, nothing where nothing was recorded."""
    on_task, on_text = groups(entries), texts(entries)
    parts = []
    if on_task:
        parts += ["### Associative recall, of models trained on it", about_task(entries), task_table(on_task)]
        parts.append(TASK_FIGURES)
    if on_text:
        parts += ["### Copying and passkeys, of models trained on the text", ABOUT_TEXT, text_table(on_text)]
        parts.append(TEXT_FIGURES)
    said = [*task_sentences(on_task), *text_sentences(on_text)]
    return ["## What they remember", INTRODUCTION, *parts, "### What the memory says", numbered(said)] if parts else []


INTRODUCTION = (
    "Made by `make results-recall`: the suites of `evaluate`, drawn offline from seed 42, in fillers of the validation "
    "text; every lag is in [a report](docs/results/recall/report.md), and all of this is made of the kept "
    "[evaluations](docs/results/recall/evaluations.json). Bytes are those of a decoder's state when it is asked. "
    "Unless a name says otherwise, all models but the recipe's have one layer, of attention or of none; the task and "
    "its training are those that suit `context_kv`, and nothing was tuned for its rivals. A context holds the token "
    "before beside the current one; one layer of attention to tokens alone cannot bind a value to the key before it. "
    "Two layers can (Olsson et al., 2022); here they had no more training than the others."
)
TASK_FIGURES = (
    "![Recall against bytes of state](docs/results/recall/task_recall.png)\n"
    "![Recall by lag](docs/results/recall/task_by_lag.png)"
)
TEXT_FIGURES = (
    "![Recall against bytes of state](docs/results/recall/recall.png)\n"
    "![Recall by lag, published models](docs/results/recall/published_by_lag.png)\n"
    "![Recall by lag, the recipe](docs/results/recall/best_by_lag.png)"
)
ABOUT_TEXT = (
    "One run of each (100 samples, seed 42). Recalled: the right answer was the likeliest of 10, in % of the trials at "
    "all lags; moved: having read it made the right one likelier by more than any other, which shows a memory too weak "
    "to win. Chance is 10 % for both. PPL is that of the whole validation text read at once, of which the transformer "
    "attends to more than it was trained to; its ± is a standard error over documents: so far other documents may move "
    "it, which ± over seeds does not say. The last column is what a token of the validation text costs, in nats, when "
    f"only the last {LEFT} tokens before it are left."
)


def about_task(entries: Sequence[Entry]) -> str:
    """What the task is, and what is no memory yet."""
    task = next(entry["task"] for entry in entries if entry["task"] is not None)
    return (
        f"`experiment=mqar`: {task['pairs']} keys with their values, each asked for once within {task['length']} "
        f"symbols; in % of the answers, by tokens since the value was read. Guessing is right in "
        f"{percent(1 / task['values'])} %; who knows which values were said, but not by which key, in "
        f"{percent(1 / task['pairs'])} %. ± is the sample standard deviation over seeds. All documents are read as one "
        f"text, of which the transformer keeps everything. They share {task['keys']} keys, so that who reads further "
        f"back than a document's {task['length']} symbols also meets pairs that no longer hold: that larger windows "
        "find less is not a matter of their size alone."
    )


def task_table(rows: Sequence[Row]) -> str:
    """A row for each model and size, a column for each octave of lags."""
    lags = [(each["first"], each["last"]) for each in rows[0].suites[0]["lags"]]
    head = ["", "bytes kept", *(f"{a}" if a == b else f"{a}–{b}" for a, b in lags), "all", "seeds"]
    cells = [
        [row.name, f"{row.bytes:,}", *(percent(row.at(first)) for first, _ in lags), row.said(), str(len(row.seeds))]
        for row in rows
    ]
    return markdown(head, cells, left=1)


def text_table(evaluations: dict[str, dict[str, Any]]) -> str:
    """A row for each model."""
    head = ["", "bytes kept", "val. PPL", "copy: recalled", "moved", "at 1–10", *(f"at {a}–{c}" for a, _, c in EDGES)]
    head += ["passkey: recalled", "moved", f"nats, {LEFT} left"]
    cells = []
    for name, each in evaluations.items():
        copy, passkey, position = (each["suites"][suite] for suite in ("copy", "passkey", "position"))
        near = [lag["first"] for lag in copy["lags"] if lag["first"] <= 10]
        left = excess(position, LEFT)
        cells.append(
            [
                name,
                f"{copy['state_bytes']:,}",
                f"{position['ppl']['value']:.1f} ± {position['ppl']['error']:.1f}",
                percent(mean_recall(copy)),
                *(percent(moved(copy, lags)[0]) for lags in (None, near, *EDGES)),
                percent(mean_recall(passkey)),
                percent(moved(passkey)[0]),
                f"{left['value']:+.2f} ± {left['error']:.2f}",
            ]
        )
    return markdown(head, cells, left=1)


def draw(folder: Path) -> None:
    """The figures and the tables of all lags, from what was recorded in the folder."""
    entries = kept_entries(folder)
    rows = groups(entries)
    draw_texts(texts(entries), folder)
    if rows:
        on_task = {row.name: pooled(row) for row in rows}
        few = {row.name: on_task[row.name] for row in shown(rows)}
        with styled():
            save_png(by_state(on_task, ["mqar"], {row.name: row.kind for row in rows}), folder / "task_recall.png")
            save_png(by_lag(few, ["mqar"]), folder / "task_by_lag.png")
    (folder / "report.md").write_text(report(entries), encoding="utf-8", newline="\n")


def draw_texts(evaluations: dict[str, dict[str, Any]], folder: Path) -> None:
    """The figures of runs on the text: by bytes all together, by lag the recipe's apart, for they lie on each other."""
    best = {name: each for name, each in evaluations.items() if name.endswith(BEST)}
    published = {name: each for name, each in evaluations.items() if name not in best}
    with styled():
        if evaluations:
            save_png(by_state(evaluations, ON_TEXT), folder / "recall.png")
        for name, each in (("published", published), ("best", best)):
            if each:
                save_png(by_lag(each, ON_TEXT), folder / f"{name}_by_lag.png")


def report(entries: Sequence[Entry]) -> str:
    """The tables of `evaluate`, as Markdown."""
    blocks = ["# What they remember, at every lag", "± is one standard error; of the task, the deviation over seeds."]
    for evaluations in (texts(entries), {row.name: pooled(row) for row in groups(entries)}):
        for title, table in tables(evaluations):
            blocks += [f"## {title}", as_markdown(table)]
    return "\n\n".join(blocks) + "\n"


def shown(rows: Sequence[Row]) -> list[Row]:
    """What has room in one panel: all sizes of ours, and of each rival the best."""
    best = {row.model: row for row in sorted(rows, key=lambda row: row.recall)}
    return [row for row in rows if row.model == "context_kv" or row is best[row.model]]


def pooled(row: Row) -> dict[str, Any]:
    """The evaluation of runs of the task, their recall at each lag a mean over seeds."""
    lags = []
    for each in zip(*(suite["lags"] for suite in row.suites), strict=True):
        recall, gain = (_over_seeds([lag[name] for lag in each]) for name in ("recall", "gain"))
        lags.append({**each[0], "recall": recall, "gain": gain})
    return {"model": row.model, "suites": {"mqar": {**row.suites[0], "lags": lags}}}


def _over_seeds(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [each["value"] for each in estimates]
    error = statistics.stdev(values) if len(values) > 1 else estimates[0]["error"]
    return {"value": statistics.mean(values), "error": error, "count": estimates[0]["count"]}


def as_markdown(table: Table) -> str:
    """A table of the terminal as one of Markdown."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return markdown_table([str(column.header) for column in table.columns], list(zip(*columns, strict=True)))
