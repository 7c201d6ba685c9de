"""The tables of the page that compares runs, for its HTML and its Markdown alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ctxkv_lightning.report.groups import SEED, Group
from ctxkv_lightning.report.markdown import percent, ppl
from ctxkv_lightning.report.runs import Run, Skipped, Unfinished
from ctxkv_lightning.report.saturation import Series, digits, verdict
from ctxkv_lightning.report.words import phrases, written

Names = Mapping[str, str]
"""The short name of each dotted key."""


class Cell(NamedTuple):
    """What a table shows, and what it is sorted by: a number, a text, or None where there is nothing."""

    text: str
    order: float | str | None
    model: str | None = None
    """The model whose mark stands before the text."""
    best: bool = False


NOTHING = Cell("–", None)


class Column(NamedTuple):
    """A table's column; `note` says what its name does not."""

    name: str
    numeric: bool = True
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of both pages; `ascending` is the column by which its rows are in order."""

    columns: list[Column]
    rows: list[list[Cell]]
    ascending: int | None = None


class Measure(NamedTuple):
    """A number that each run has and that seeds spread."""

    column: Column
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    best: Callable[[list[float]], float] | None = None
    """Which of several runs' values is the best one, where that can be said."""


MEASURES = (
    Measure(Column("Val. PPL", note="validation perplexity"), lambda run: run.val_ppl, ppl, min),
    Measure(Column("Test PPL"), lambda run: run.test_ppl, ppl, min),
    Measure(
        Column("Accuracy", note="on validation: how often the likeliest token came next"),
        lambda run: run.val_accuracy,
        percent,
        max,
    ),
    Measure(Column("Gap", note="validation minus train PPL at the best epoch"), lambda run: run.gap, ppl),
)
KEPT = Column("KB kept", note="by a decoder after 10,000 tokens, fp32; 1 KB is 1,000 bytes")


def runs_table(runs: Sequence[Run], keys: Sequence[str], names: Names) -> Table:
    """A row per run, in the order given, which is that of validation PPL; a column for each of the differing `keys`."""
    columns = [
        *_setting_columns(runs, keys, names),
        *(measure.column for measure in MEASURES),
        KEPT,
        Column("Best epoch"),
        Column("Trained", note="parameters trained"),
        Column("Seconds", note="of the whole run"),
        Column("Folder", numeric=False),
    ]
    rows = [
        [
            *_setting_cells(run.settings, keys, run.model),
            *(_single(measure, run, runs) for measure in MEASURES),
            _kilobytes(run.kept),
            Cell(written(run.best_epoch), run.best_epoch),
            Cell(written(run.trained), run.trained),
            Cell(f"{run.seconds:,.0f}", run.seconds),
            Cell(run.name, run.name),
        ]
        for run in runs
    ]
    return Table(columns, rows, ascending=len(keys))


def _single(measure: Measure, run: Run, runs: Sequence[Run]) -> Cell:
    value = measure.value(run)
    if value is None:
        return NOTHING
    all_of_them = [each for each in map(measure.value, runs) if each is not None]
    best = measure.best is not None and len(runs) > 1 and value == measure.best(all_of_them)
    return Cell(measure.text(value), value, best=best)


def seeds_table(groups: Sequence[Group], keys: Sequence[str], names: Names) -> Table:
    """A row per group of runs that differ only in their seed: mean ± sample standard deviation."""
    swept = [key for key in keys if key != SEED]
    columns = [
        *_setting_columns([run for group in groups for run in group.runs], swept, names),
        Column("Seeds, n"),
        *(measure.column for measure in MEASURES),
        KEPT,
    ]
    rows = [
        [
            *_setting_cells(group.settings, swept, group.model),
            Cell(written(group.val_ppl.seeds), group.val_ppl.seeds),
            *(_over_seeds(measure, group) for measure in MEASURES),
            _kilobytes(group.runs[0].kept),
        ]
        for group in groups
    ]
    return Table(columns, rows, ascending=len(swept) + 1)


def _over_seeds(measure: Measure, group: Group) -> Cell:
    if any(measure.value(run) is None for run in group.runs):
        return NOTHING
    mean, spread, _ = group.measured(lambda run: measure.value(run) or 0.0)
    if spread is None:
        return Cell(measure.text(mean), mean)
    if measure.text is percent:  # one decimal would hide the spread
        return Cell(f"{100 * mean:.2f} ± {100 * spread:.2f} %", mean)
    return Cell(f"{measure.text(mean)} ± {measure.text(spread)}", mean)


def _setting_columns(runs: Sequence[Run], keys: Sequence[str], names: Names) -> list[Column]:
    def numeric(key: str) -> bool:
        values = [run.settings[key] for run in runs if key in run.settings]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    return [Column(names[key], numeric(key), key) for key in keys]


def _setting_cells(settings: Mapping[str, object], keys: Sequence[str], model: str) -> list[Cell]:
    cells = []
    for key in keys:
        if key not in settings:
            cells.append(NOTHING)
            continue
        value = settings[key]
        text = str(value) if key == SEED else written(value)
        order = float(value) if isinstance(value, int | float) else text
        cells.append(Cell(text, order, model if key == "model.name" else None))
    return cells


def _kilobytes(kept: int | None) -> Cell:
    return NOTHING if kept is None else Cell(f"{kept / 1000:,.0f}" if kept >= 10_000 else f"{kept / 1000:,.3g}", kept)


def fits_table(series: Sequence[Series], names: Names) -> Table:
    """A row per saturation fit: its three parameters with their standard errors, and what it rests on."""
    columns = [
        Column("Configuration", numeric=False),
        Column("PPL_min", note="what more text of this kind approaches"),
        Column("A"),
        Column("a"),
        Column("Basis", numeric=False),
    ]
    rows = [[_text(phrases(each.settings, names) or "all"), *_fit(each), _text(verdict(each))] for each in series]
    return Table(columns, rows)


def _fit(series: Series) -> list[Cell]:
    if series.fit is None:
        return [NOTHING] * 3
    values = (series.fit.floor, series.fit.scale, series.fit.exponent)
    return [
        Cell(digits(value, error) + (f" ± {digits(error, error)}" if error is not None else ""), value)
        for value, error in zip(values, series.fit.errors or (None,) * 3, strict=True)
    ]


def texts_table(names: Sequence[str], rows: Sequence[Unfinished] | Sequence[Skipped]) -> Table:
    """A table of nothing but texts."""
    return Table([Column(name, numeric=False) for name in names], [[_text(text) for text in row] for row in rows])


def _text(text: str) -> Cell:
    return Cell(text, text)
