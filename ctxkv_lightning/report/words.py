"""How settings are written on the page: keys as short as they stay clear, values as on the command line."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctxkv_lightning.report.groups import SEED


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two keys end alike; `model.name` is "model"."""
    keys = list(keys)
    ends = [key.rpartition(".")[2] for key in keys]
    return {
        key: "model" if key == "model.name" else end if ends.count(end) == 1 else key
        for key, end in zip(keys, ends, strict=True)
    }


def written(value: Any) -> str:
    """A value for people: numbers with separators, lists with commas."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


def phrase(key: str, value: Any, names: Mapping[str, str]) -> str:
    """One setting: a name alone says what it is, a number needs its key."""
    if isinstance(value, str):
        return value
    return f"{names.get(key, key)} {value if key == SEED else written(value)}"


def phrases(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Settings in one line."""
    return " · ".join(phrase(key, value, names) for key, value in settings.items())


def enumerated(words: Sequence[str]) -> str:
    """Words in a row with commas and a last "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
