"""A sweep's folder: one run folder for each trial, who runs it, and what became of it (`status.json`).

A trial is a folder named by its content, the words that asked for it and a function that runs it; nothing here
knows what those words mean. Trials may be run by many processes, on many machines that share a file system.
"""

import gc
import json
import math
import os
import shutil
import socket
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.run.folder import RunFolder, write_whole
from ctxkv_lightning.run.lease import alive, beating, locked

Status = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    folder: Path
    words: Sequence[str]
    state: str
    """finished, failed, interrupted, running (in another process) or missing (nobody has begun it)."""
    val_ppl: float | None = None
    reason: str | None = None
    exit_code: int | None = None


def run_trial(
    folder: Path,
    words: Sequence[str],
    config: Mapping[str, Any],
    run: Callable[[Path, bool], float],
    quiet: bool = False,
) -> float:
    """Runs a trial unless it is finished or another process has it; its validation PPL, NaN if there is none.

    `run(folder, resume)` does the work: in a folder yet to be made, or, to resume, in that of an earlier attempt.
    An error ends the trial, not the caller: it is told, and kept in `status.json` and the trial's `train.log`.
    Ctrl-C and exit pass through. `quiet` drops what the run prints, which its `train.log` has too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_file(folder)) as held:
        status = read_status(folder)
        value = _finished(folder, status)
        if value is not None:
            return _skip(folder, words, value, f"finished with validation PPL {value:.1f} before")
        if _has_owner(folder, status, held):
            return _skip(folder, words, math.nan, _owner(status))
        resume = can_resume(folder, status)
        if not resume:
            make_room(folder)
            try:
                folder.mkdir()
            except FileExistsError:  # where there are no locks, another process may have been faster
                return _skip(folder, words, math.nan, _owner(None))
        return _run(folder, words, config, lambda path: run(path, resume), quiet)


def _skip(folder: Path, words: Sequence[str], value: float, why: str) -> float:
    _say(f"trial {folder.name} skipped, {why}: {' '.join(words)}")
    return value


def can_resume(folder: Path, status: Status | None) -> bool:
    """Whether an attempt had got far enough to go on: to an intact checkpoint, if it failed."""
    run = RunFolder(folder)
    if status is None or not (run.config.exists() and run.identity.exists()):
        return False
    return status["state"] != "failed" or _has_intact_checkpoint(run)


def _has_intact_checkpoint(run: RunFolder) -> bool:
    from ctxkv_lightning.run.saved import newest_intact  # loads torch, which only a trial that will run needs

    return any(newest_intact(folder)[0] is not None for folder in (run.checkpoints, run.path))


def make_room(folder: Path) -> None:
    """Makes room for a fresh attempt where one came to nothing.

    Metrics and checkpoints are never deleted: a folder that has some stays, under a hidden name that no report looks
    into.
    """
    if not folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.before-{uuid.uuid4().hex[:6]}")
    folder.rename(aside)
    if not RunFolder(aside).metrics.exists() and not any(aside.rglob("*.ckpt")):
        shutil.rmtree(aside, ignore_errors=True)


def _run(
    folder: Path, words: Sequence[str], config: Mapping[str, Any], run: Callable[[Path], float], quiet: bool
) -> float:
    status = _begin(folder, words, config)
    _say(f"trial {folder.name} starts: {' '.join(words)}")
    try:
        with beating(_status_file(folder)), ExitStack() as stack:
            if quiet:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            value = run(folder)
    except Exception as error:
        _fail(folder, status, error)
        return math.nan
    except BaseException:  # Ctrl-C, which Lightning turns into SystemExit: the sweep ends with the trial
        _end(folder, status, "interrupted", "stopped from outside", exit_code=None)
        raise
    finally:
        gc.collect()  # models hold themselves in cycles, and the next trial needs the memory
    _end(folder, status, "finished", None, exit_code=0)
    _say(f"trial {folder.name} finished: validation PPL {value:.1f}")
    return value


def _begin(folder: Path, words: Sequence[str], config: Mapping[str, Any]) -> Status:
    status = {
        "state": "running",
        "reason": None,
        "overrides": list(words),
        "config": dict(config),
        "started": _now(),
        "ended": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "exit_code": None,
    }
    _write_status(folder, status)
    return status


def _fail(folder: Path, status: Status, error: Exception) -> None:
    """Tells and keeps why a trial failed; a mistake of the user's needs no traceback."""
    mine = isinstance(error, UserError)
    sentence = " ".join(str(error).split())
    reason = sentence if mine else f"{type(error).__name__}: {sentence}"
    details = reason if mine else "".join(traceback.format_exception(error)).rstrip()
    print(f"error in trial {folder.name} ({' '.join(status['overrides'])}): {details}", file=sys.stderr, flush=True)
    with RunFolder(folder).log.open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} failed: {details}\n")
    _end(folder, status, "failed", reason, exit_code=EXIT_CODE if mine else 1)


def _end(folder: Path, status: Status, state: str, reason: str | None, *, exit_code: int | None) -> None:
    _write_status(folder, {**status, "state": state, "reason": reason, "ended": _now(), "exit_code": exit_code})


def read_status(folder: Path) -> Status | None:
    """The content of a trial's `status.json`; None where there is none that can be read."""
    try:
        status = json.loads(_status_file(folder).read_text(encoding="utf-8"))
        return status if {"state", "host", "pid"} <= status.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def look(folder: Path, words: Sequence[str]) -> Outcome:
    """What has become of the trial in `folder` by now."""
    if not folder.exists():
        return Outcome(folder, words, "missing")
    with locked(_lock_file(folder)) as held:
        status = read_status(folder)
        owned = _has_owner(folder, status, held)
    if status is None:
        return Outcome(folder, words, "running" if owned else "interrupted")
    state, reason, value = status["state"], status.get("reason"), _finished(folder, status)
    if state == "running" and not owned:
        state, reason = "interrupted", f"process {status['pid']} on {status['host']} died"
    elif state == "finished" and value is None:
        state, reason = "interrupted", "its metrics.json cannot be read"
    return Outcome(folder, words, state, value, reason, status.get("exit_code"))


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if every trial is finished or in good hands; 2 if all failures are the user's to mend, else 1."""
    codes = {outcome.exit_code or 1 for outcome in outcomes if outcome.state not in ("finished", "running")}
    return 1 if 1 in codes else max(codes, default=0)


def table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """A row for each trial: its folder's name, the words that set it apart, its state, its validation PPL."""
    shared = set.intersection(*(set(outcome.words) for outcome in outcomes)) if len(outcomes) > 1 else set()
    rows = Table(title=Text(title))
    for name in ("trial", "options", "state"):
        rows.add_column(name, overflow="fold")
    rows.add_column("val PPL", justify="right", no_wrap=True)
    for outcome in outcomes:
        words = " ".join(word for word in outcome.words if word not in shared)
        state = f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
        value = "–" if outcome.val_ppl is None else f"{outcome.val_ppl:.1f}"
        # Text: an option may hold [brackets], which are not markup
        rows.add_row(*(Text(cell) for cell in (outcome.folder.name, words, state, value)))
    return rows


def _finished(folder: Path, status: Status | None) -> float | None:
    """The validation PPL of a finished trial whose metrics can be read, else None."""
    if status is None or status["state"] != "finished":
        return None
    try:
        return float(RunFolder(folder).read_metrics()["result"]["val_ppl"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _has_owner(folder: Path, status: Status | None, held: bool | None) -> bool:
    """Whether another process is at this trial, given what `locked` said."""
    if status is None or status["state"] != "running":
        return held is False
    return alive(status["host"], _lock_file(folder), held, _status_file(folder))


def _owner(status: Status | None) -> str:
    if status is None or status["state"] != "running":
        return "another process is at it"
    return f"process {status['pid']} on {status['host']} is running it"


def _status_file(folder: Path) -> Path:
    return folder / "status.json"


def _lock_file(folder: Path) -> Path:
    # Beside the folder: a folder that is moved aside must not take the lock with it.
    return folder.with_name(f".{folder.name}.lock")


def _write_status(folder: Path, status: Status) -> None:
    write_whole(_status_file(folder), json.dumps(status, indent=2) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(line, flush=True)
