"""What benchmarks/recall.py recorded of the runs, read and grouped."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxkv_lightning.report.recall_tables import mean_recall

Entry = dict[str, Any]
"""What was recorded of a run: name, seed, trained (parameters), reads (contexts or tokens, None for no window), task
(None where it read text), evaluation."""

RECORD = "evaluations.json"

OURS = "context_kv, strided"

BEST = ", best"
"""What the name of a run of `experiment=best` ends with."""

EDGES = ((19, 20, 21), (619, 620, 621))
"""Lags around the nearest and the farthest context of the published window."""


def kept_entries(folder: Path) -> list[Entry]:
    """What was recorded, nothing where nothing was."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


class Row:
    """Runs of the task that differ only in their seed."""

    def __init__(self, name: str, entries: Sequence[Entry]) -> None:
        self.name, self.entries = name, entries
        self.suites = [entry["evaluation"]["suites"]["mqar"] for entry in entries]
        self.model: str = entries[0]["evaluation"]["model"]
        layers = [part for part in name.split(", ") if part.endswith(" layers")]
        self.kind = ", ".join([self.model, *layers])  # what this is a size of
        self.bytes: int = self.suites[0]["state_bytes"]
        self.seeds = [mean_recall(suite) for suite in self.suites]
        self.recall = statistics.mean(self.seeds)
        self.deviation = statistics.stdev(self.seeds) if len(self.seeds) > 1 else 0.0

    def at(self, lag: int) -> float:
        """Recall at the lags that begin with this one, mean over seeds."""
        return statistics.mean(
            each["recall"]["value"] for suite in self.suites for each in suite["lags"] if each["first"] == lag
        )

    def within(self, inside: bool) -> list[float]:
        """Recall at the lags that lie wholly inside the window, or wholly behind it, an answer for each answer."""
        read, found = self.entries[0]["reads"], list[float]()
        for each in (lag for suite in self.suites for lag in suite["lags"] if read is not None):
            if (each["last"] < read) if inside else (each["first"] >= read):
                found += [each["recall"]["value"]] * each["recall"]["count"]
        return found

    def said(self) -> str:
        """Its recall over all lags, in words."""
        return percent(self.recall, self.deviation if len(self.seeds) > 1 else None)


def groups(entries: Sequence[Entry]) -> list[Row]:
    """The runs of the task by name, by bytes."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry["task"] is not None:
            found.setdefault(entry["name"], []).append(entry)
    return sorted((Row(name, each) for name, each in found.items()), key=lambda row: (row.bytes, row.name))


def texts(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """The evaluations of runs on the text by name, fewest bytes first."""
    found = {entry["name"]: entry["evaluation"] for entry in entries if entry["task"] is None}
    return dict(sorted(found.items(), key=lambda item: item[1]["suites"]["copy"]["state_bytes"]))


def percent(value: float, error: float | None = None) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def moved(suite: dict[str, Any], lags: Sequence[int] | None = None) -> tuple[float, float]:
    """Share of the trials at these lags (all) in which the right answer gained most, and the error of chance there.

    A trial's lags share their filler, so for the error a trial counts once, however many lags it was asked at.
    """
    chosen = [each["raised"] for each in suite["lags"] if lags is None or each["first"] in lags]
    chance = suite["chance"]
    error = math.sqrt(chance * (1 - chance) / chosen[0]["count"])
    return statistics.mean(each["value"] for each in chosen), error


def excess(position: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Nats more than after all of the text where only so many tokens are left."""
    return next(each["excess"] for each in position["histories"] if each["tokens"] == tokens)
