"""Conversations in the order of their data set; the numbers of the records say which validate and which test.

`from_files` reads local .jsonl files, `from_hub` a data set on the hub, of which it keeps as many records as are
needed in a store: from there on, both are one path.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import get_or_build
from ctxkv_lightning.text import hub
from ctxkv_lightning.text.corpus import Corpus, Document
from ctxkv_lightning.text.files import check_file, matching, parse_record, record_lines, record_text

_FILE = "conversations.jsonl"


def from_files(
    patterns: Sequence[str],
    samples: int | None,
    validation: Sequence[int],
    test: Sequence[int],
    errors: str = "strict",
    source: str = "data.files",
) -> Corpus:
    """The conversations in the .jsonl files that match `patterns`, one file after the other; nothing between those
    that train, as published.

    Records [first, end) of `validation` and `test`, counted from 0 over all files, are held out; the first
    `samples` others train, None for all of them. Records that are not needed are not parsed. A UserError, which
    calls the files `source`, where there are fewer records than the ranges need or none is left to train on.
    """
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    held, count = {"validation": range(*validation), "test": range(*test)}, 0
    needed = islice(_lines(patterns, errors), records_needed(samples, validation, test))
    for count, line in enumerate(needed, start=1):
        name = next((name for name, numbers in held.items() if count - 1 in numbers), "train")
        if name != "train" or samples is None or len(parts[name]) < samples:  # others are not even parsed
            parts[name].append(parse_record(*line, errors))
    if not parts["train"] or any(len(parts[name]) < len(numbers) for name, numbers in held.items()):
        raise _too_few(count, validation, test, source)
    return Corpus(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), train_separator="")


def _lines(patterns: Sequence[str], errors: str) -> Iterator[tuple[Path, int, str]]:
    """The lines of all files, once all files have proved readable."""
    paths = matching(patterns)
    for path in paths:
        if path.suffix.lower() != ".jsonl":
            raise UserError(f"data.files: {path} is not a .jsonl file: choose data=text.")
        check_file(path, errors)
    for path in paths:
        yield from record_lines(path, errors)


def from_hub(
    dataset: str,
    split: str,
    samples: int | None,
    validation: Sequence[int],
    test: Sequence[int],
    errors: str = "strict",
    cache_dir: Path | str = "outputs/cache",
) -> Corpus:
    """As `from_files`, from a data set on the hub; a store in `cache_dir` keeps what has been downloaded."""
    needed = records_needed(samples, validation, test)
    key = {"dataset": dataset, "split": split, "records": needed}

    def build(folder: Path) -> dict[str, Any]:
        return {"records": download(dataset, split, needed, folder / _FILE)}

    store = get_or_build(cache_dir, "conversations", key, build)
    if not store.facts["records"]:
        raise UserError(f"data.dataset={dataset}, data.split={split} has no records: choose another split.")
    return from_files([str(store.path / _FILE)], samples, validation, test, errors, f"data.dataset={dataset}")


def download(dataset: str, split: str, records: int | None, path: Path) -> int:
    """Writes the first `records` records of a data set, None for all, as .jsonl to `path`; how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, record in enumerate(islice(hub.records(dataset, split), records), start=1):
            record_text(record, f"data.dataset={dataset}, record {count - 1}", "replace")
            kept = {key: record[key] for key in ("text", "messages") if record.get(key) is not None}
            file.write(json.dumps(kept) + "\n")
    return count


def records_needed(samples: int | None, validation: Sequence[int], test: Sequence[int]) -> int | None:
    """How many records, from the first, hold both ranges and `samples` records outside them; None for all."""
    if samples is None:
        return None
    end = samples
    for first, stop in sorted([tuple(validation), tuple(test)]):
        end += stop - first if first < end else 0
    return max(end, validation[1], test[1])


def fitting_ranges(count: int) -> tuple[list[int], list[int]] | None:
    """Ranges for validation and test at the end of `count` records, a tenth each and at most 20; None if too few."""
    width = min(20, max(1, count // 10))
    return ([count - 2 * width, count - width], [count - width, count]) if count >= 3 else None


def _too_few(count: int, validation: Sequence[int], test: Sequence[int], source: str) -> UserError:
    ranges = fitting_ranges(count)
    advice = "add records"
    if ranges:
        advice = "set data.validation=[{},{}] data.test=[{},{}], or add records".format(*ranges[0], *ranges[1])
    wanted = f"data.validation={list(validation)} and data.test={list(test)}"
    return UserError(f"{source} has {count:,} records, too few for {wanted} with something left to train on: {advice}.")
