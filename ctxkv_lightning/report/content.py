"""What the page that compares runs says: its words, tables and figures, in the order in which they stand."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ctxkv_lightning.report.axis_figure import axis_figure
from ctxkv_lightning.report.drawing import count
from ctxkv_lightning.report.gap_figure import gap_figure
from ctxkv_lightning.report.groups import SAMPLES, Axis, Group, along, axes_of, differing, grouped, several_of, texts_of
from ctxkv_lightning.report.looks import Drawn
from ctxkv_lightning.report.markdown import kilobytes, ppl
from ctxkv_lightning.report.memory_figure import memory_figures
from ctxkv_lightning.report.runs import Found, Run
from ctxkv_lightning.report.saturation import series_of
from ctxkv_lightning.report.saturation_figure import saturation_figure
from ctxkv_lightning.report.tables import Names, Table, fits_table, runs_table, seeds_table, texts_table
from ctxkv_lightning.report.words import enumerated, phrases, short_names


class Section(NamedTuple):
    """A heading and what stands below it."""

    id: str
    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Drawn] = ()


class Tile(NamedTuple):
    """One number that matters, above what it is."""

    value: str
    spread: str
    name: str
    note: str


class Content(NamedTuple):
    """The whole page."""

    title: str
    summary: str
    warning: str
    tiles: list[Tile]
    sections: list[Section]


def content_of(found: Found) -> Content:
    """The page about these runs; its figures are not yet saved."""
    keys = differing(found.runs)
    names = short_names(keys)
    groups = grouped(found.runs, keys)
    sections = [
        Section("runs", "Runs, best first", table=runs_table(found.runs, keys, names)),
        *_seeds(groups, keys, names),
        *_memory(groups, names),
        *_settings(groups, keys, names),
        *_saturation(groups, names),
        _gap(groups, names),
        *_failures(found),
        *_skipped(found),
    ]
    return Content(
        _title(found.runs), _summary(groups, keys, names), _warning(found.runs), _tiles(found, groups, names), sections
    )


def _title(runs: Sequence[Run]) -> str:
    models = sorted({str(run.settings["model.name"]) for run in runs})
    return f"{count(len(runs), 'run')} of {models[0] if len(models) == 1 else f'{len(models)} models'}"


def _label(group: Group, names: Names) -> str:
    """What tells a group from the others; its model where nothing does."""
    return phrases(group.settings, names) or group.model


def _summary(groups: Sequence[Group], keys: Sequence[str], names: Names) -> str:
    best, value, footing = groups[0], groups[0].val_ppl, groups[0].runs[0].footing
    over = f" ± {value.spread:,.1f} over {value.seeds} seeds" if value.spread is not None else ""
    sentences = [
        f"They differ in {enumerated([names[key] for key in keys])}." if keys else "",
        f"Best: {_label(best, names)}, with a validation PPL of {ppl(value.mean)}{over}.",
    ]
    if {"kneser_ney_ppl", "kneser_ney_cache_ppl"} <= footing.keys():
        sentences.append(
            f"On the same tokens a Kneser-Ney trigram has {ppl(footing['kneser_ney_ppl'])}, "
            f"with a cache {ppl(footing['kneser_ney_cache_ppl'])}."
        )
    return " ".join(sentence for sentence in sentences if sentence)


def _warning(runs: Sequence[Run]) -> str:
    scored = sorted({run.scored for run in runs}, key=str)
    if len(scored) == 1:
        return ""
    each = enumerated([f"{tokens:,} tokens of {vocabulary or 0:,} kinds" for tokens, vocabulary in scored])
    return f"These runs were scored on different texts or vocabularies ({each}): compare PPLs only where they agree."


def _tiles(found: Found, groups: Sequence[Group], names: Names) -> list[Tile]:
    value, run = groups[0].val_ppl, groups[0].runs[0]
    tests = [each.test_ppl for each in groups[0].runs if each.test_ppl is not None]
    states = [each.state for each in found.unfinished]
    others = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "all finished"
    label = _label(groups[0], names)
    kept = "–" if run.kept is None else kilobytes(run.kept)
    return [
        Tile(ppl(value.mean), "" if value.spread is None else ppl(value.spread), "best validation PPL", label),
        Tile(ppl(statistics.fmean(tests)) if tests else "–", "", "its test PPL", "read once, at the end"),
        Tile(kept, "", "its decoder keeps", "after 10,000 tokens, fp32"),
        Tile(f"{len(found.runs):,}", "", "runs finished" if len(found.runs) > 1 else "run finished", others),
    ]


def _seeds(groups: Sequence[Group], keys: Sequence[str], names: Names) -> list[Section]:
    if all(group.val_ppl.seeds == 1 for group in groups):
        return []
    text = "Runs that differ in nothing but their seed, as mean ± sample standard deviation over n seeds."
    return [Section("seeds", "Seeds together", text, seeds_table(groups, keys, names))]


def _memory(groups: Sequence[Group], names: Names) -> list[Section]:
    figures = memory_figures(groups, names)
    silent = sum(len(group.runs) for group in groups if group.runs[0].kept is None)
    text = f"Left out: {count(silent, 'run')} whose metrics do not say what a decoder keeps." if silent else ""
    return [Section("memory", "What memory buys", text, figures=figures)] if figures else []


def _settings(groups: Sequence[Group], keys: Sequence[str], names: Names) -> list[Section]:
    over_all, figures = _axes(groups, keys), []
    for axis in over_all:
        if SAMPLES in (axis.key, *axis.companions):
            figures.append(axis_figure(axis, along(axis, groups, over_all), names))
    for text in texts_of(groups):
        axes = _axes(text.groups, keys)
        figures += [axis_figure(axis, along(axis, text.groups, axes), names, text.samples) for axis in axes]
    return [Section("settings", "What each setting does", figures=figures)] if figures else []


def _axes(groups: Sequence[Group], keys: Sequence[str]) -> list[Axis]:
    """The axes along which these differ, where others may differ along more."""
    return axes_of(groups, [key for key in keys if several_of(groups, key)])


def _saturation(groups: Sequence[Group], names: Names) -> list[Section]:
    series = series_of(groups)
    text = (
        "How far more text would help: the least-squares fit PPL = PPL_min + A n^-a to the mean over seeds at each "
        "number of training documents n, every n weighing the same. ± is the standard error, from how far the points "
        "lie off the curve."
    )
    if not series:
        return []
    return [
        Section("saturation", "Saturation", text, fits_table(series, names), [saturation_figure(series, names)]),
    ]


def _gap(groups: Sequence[Group], names: Names) -> Section:
    labels = [_label(group, names) for group in groups]
    return Section("gap", "Train and validation", figures=[gap_figure(groups, labels)])


def _failures(found: Found) -> list[Section]:
    table = texts_table(("Folder", "Asked for", "State", "Reason"), found.unfinished)
    return [Section("failures", "Runs that did not finish", table=table)] if found.unfinished else []


def _skipped(found: Found) -> list[Section]:
    table = texts_table(("Folder", "Why"), found.skipped)
    return [Section("skipped", "Files not used", table=table)] if found.skipped else []
