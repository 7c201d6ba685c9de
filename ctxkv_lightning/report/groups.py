"""What differs between runs: groups that differ only in their seed, axes along which a setting was swept."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ctxkv_lightning.report.runs import Run, reads, voices_of

SEED, MODEL, SAMPLES = "seed", "model.name", "samples"
MOST_LINES = 8
MOST_TEXTS = 4
"""Amounts of training text that get figures of their own."""

MISSING: Any = object()
"""Stands for the value of a key that a run does not have, which is not a `null`."""

Settings = tuple[tuple[str, Any], ...]


class Measured(NamedTuple):
    """Mean over seeds, sample standard deviation (None for one seed), number of seeds."""

    mean: float
    spread: float | None
    seeds: int


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `settings` are the differing keys, the seed left out."""

    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def model(self) -> str:
        """The name of its model, see `Run.model`."""
        return self.runs[0].model

    def over_seeds(self, value: Callable[[Run], float]) -> list[float]:
        """The value of each seed; where a seed ran more than once, the mean of those, so that each counts once."""
        by_seed: dict[Any, list[float]] = {}
        for run in self.runs:
            by_seed.setdefault(run.settings.get(SEED), []).append(value(run))
        return [statistics.fmean(values) for values in by_seed.values()]

    def measured(self, value: Callable[[Run], float]) -> Measured:
        """Mean and spread of the value over seeds."""
        values = self.over_seeds(value)
        return Measured(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def val_ppl(self) -> Measured:
        """Validation PPL over seeds."""
        return self.measured(lambda run: run.val_ppl)


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys with several values among the runs that have them: the model first, the seed last."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    several = [key for key in keys if several_of(runs, key)]
    return sorted(several, key=lambda key: (key == SEED) - (key == MODEL))


def several_of(found: Iterable[Run | Group], key: str) -> bool:
    """Whether a key has several values among those that have it."""
    return len({each.settings[key] for each in found if key in each.settings}) > 1


def grouped(runs: Sequence[Run], keys: Iterable[str]) -> list[Group]:
    """Runs by their values of `keys` without the seed; best mean validation PPL first."""
    keys = [key for key in keys if key != SEED]
    found: dict[Settings, list[Run]] = {}
    for run in runs:
        found.setdefault(_values(run.settings, keys), []).append(run)
    groups = [Group({k: v for k, v in values if v is not MISSING}, tuple(runs)) for values, runs in found.items()]
    return sorted(groups, key=lambda group: group.val_ppl.mean)


class Text(NamedTuple):
    """Groups that were trained on the same number of documents, which is `samples`, None where it is that of all."""

    samples: Any
    groups: list[Group]


def texts_of(groups: Sequence[Group]) -> list[Text]:
    """The groups by the text that they were trained on, where it has several; the most documents first.

    A model that has read more is no rival of one that has read less, whatever else they differ in.
    """
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault(group.settings.get(SAMPLES), []).append(group)
    texts = [Text(samples, each) for samples, each in found.items() if len(each) > 1]
    if len(found) == 1:
        return [Text(None, each) for _, each in texts]
    return sorted(texts, key=lambda text: -text.samples if isinstance(text.samples, int) else 0)[:MOST_TEXTS]


def _values(settings: dict[str, Any], keys: Iterable[str]) -> Settings:
    return tuple((key, settings.get(key, MISSING)) for key in keys)


@dataclass(frozen=True)
class Axis:
    """A swept key, its values in the order in which they are drawn, and the keys that always changed along with it."""

    key: str
    companions: tuple[str, ...]
    values: tuple[Any, ...]
    scale: str
    """`linear` or `log` for numbers, `category` for all else and for numbers that neither scale shows."""


def axes_of(groups: Sequence[Group], keys: Iterable[str]) -> list[Axis]:
    """An axis for each key but the seed; keys that split the groups in the same way share one.

    So do those that the model alone decides: along an axis of their own, models would be compared.
    """
    companions: dict[tuple[int, ...], list[str]] = {}
    keys = [key for key in keys if key != SEED]
    for key in sorted(keys, key=lambda key: key != MODEL):  # first, for others to join it
        decided = key != MODEL and MODEL in keys and _decided_by_model(groups, key)
        companions.setdefault(_partition(groups, MODEL if decided else key), []).append(key)
    return [_axis(groups, key, tuple(others)) for key, *others in companions.values()]


def _decided_by_model(groups: Sequence[Group], key: str) -> bool:
    """Whether all models have this key, each one value of it."""
    values: dict[str, set[Any]] = {}
    for group in groups:
        values.setdefault(group.settings[MODEL], set()).add(group.settings.get(key, MISSING))
    return all(len(each) == 1 and MISSING not in each for each in values.values())


def _partition(groups: Sequence[Group], key: str) -> tuple[int, ...]:
    values = [group.settings.get(key, MISSING) for group in groups]
    first: dict[Any, int] = {}
    return tuple(-1 if value is MISSING else first.setdefault(value, i) for i, value in enumerate(values))


def _axis(groups: Sequence[Group], key: str, companions: tuple[str, ...]) -> Axis:
    best: dict[Any, float] = {}
    for group in groups:
        if key in group.settings:
            value = group.settings[key]
            best[value] = min(best.get(value, math.inf), group.val_ppl.mean)
    numbers = sorted(value for value in best if _is_number(value))
    names = [value for value in best if not _is_number(value)]
    others = sorted(names, key=lambda value: value if isinstance(value, bool) else best[value])  # off, then on
    return Axis(key, companions, (*numbers, *others), "category" if others else _scale(numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(numbers: Sequence[float]) -> str:
    positive = [number for number in numbers if number > 0]
    wide = bool(positive) and positive[-1] > 10 * positive[0]
    if not wide:
        return "linear"
    return "log" if len(positive) == len(numbers) else "category"  # a 0 has no place on a log scale


@dataclass(frozen=True)
class Line:
    """PPL along an axis while all else stands still; `points` in the axis' order."""

    settings: dict[str, Any]
    """What tells this line from the others."""
    points: tuple[tuple[Any, Group], ...]

    @property
    def model(self) -> str | None:
        """The model of all its points, None where they differ."""
        models = {group.model for _, group in self.points}
        return models.pop() if len(models) == 1 else None


class Swept(NamedTuple):
    """What is drawn along an axis."""

    lines: list[Line]
    references: list[Group]
    """The best of each model that does not read the key."""
    left_out: int
    """Combinations with one value only."""
    best_only: bool
    """Whether there is one line, of the best of each value, because the combinations are too many."""
    own: tuple[str, ...] = ()
    """Keys that only some values of the axis have (a model its window): each point is the best among theirs."""


def along(axis: Axis, groups: Sequence[Group], axes: Sequence[Axis]) -> Swept:
    """One line per combination of the other axes where they are at most `MOST_LINES`, else the best of each value."""
    having = [group for group in groups if axis.key in group.settings]
    own = _own(axis, having, axes)
    others = [other.key for other in axes if other.key not in (axis.key, *own)]
    combinations: dict[Settings, dict[Any, Group]] = {}
    for group in having:  # best first
        combinations.setdefault(_values(group.settings, others), {}).setdefault(group.settings[axis.key], group)
    whole = {key: points for key, points in combinations.items() if len(points) > 1}
    if not 1 <= len(whole) <= MOST_LINES:
        best: dict[Any, Group] = {}
        for group in having:
            best.setdefault(group.settings[axis.key], group)
        best_only = len(whole) > 0 or len(combinations) > 1
        return Swept([Line({}, _ordered(axis, best))], _references(axis, groups, best.values()), 0, best_only, own)
    keys = telling([dict(settings) for settings in whole])
    lines = [
        Line({key: value for key, value in settings if key in keys and value is not MISSING}, _ordered(axis, points))
        for settings, points in whole.items()
    ]
    drawn = [group for line in lines for _, group in line.points]
    return Swept(lines, _references(axis, groups, drawn), len(combinations) - len(whole), False, own)


def _own(axis: Axis, groups: Sequence[Group], axes: Sequence[Axis]) -> tuple[str, ...]:
    def lacking(key: str) -> bool:
        return any(key in group.settings for group in groups) and any(
            all(key not in group.settings for group in groups if group.settings[axis.key] == value)
            for value in axis.values
        )

    return tuple(other.key for other in axes if other.key != axis.key and lacking(other.key))


def telling(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys that tell these settings apart: those with several values among the ones that have them."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: {each[key] for each in settings if each.get(key, MISSING) is not MISSING} for key in keys}
    return [key for key in keys if len(values[key]) > 1]


def _ordered(axis: Axis, points: dict[Any, Group]) -> tuple[tuple[Any, Group], ...]:
    return tuple((value, points[value]) for value in axis.values if value in points)


def _references(axis: Axis, groups: Sequence[Group], drawn: Iterable[Group]) -> list[Group]:
    """The best of each model without the key, with no other value of what it shares with the `drawn` than theirs."""
    best: dict[str, Group] = {}
    values: dict[str, set[Any]] = {}
    for key, value in (item for group in drawn for item in group.settings.items() if item[0] != MODEL):
        values.setdefault(key, set()).add(value)
    for group in groups:
        known = group.runs[0].settings
        alike = all(key not in values or value in values[key] for key, value in group.settings.items())
        if alike and axis.key not in group.settings and not reads(known["model.name"], axis.key, voices_of(known)):
            best.setdefault(group.model, group)
    return list(best.values())
