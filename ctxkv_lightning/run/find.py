"""Finds the run that is to be resumed; loads neither torch nor Lightning."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.lease import locked

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""What tells a process its number among those of one run; the first that is there counts, as it does for Lightning."""

STARTED = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
"""What tells a process that others were started beside it: its number and theirs."""


def follows() -> bool:
    """Whether this is one of several processes of a run, and not the first, which alone tells, locks and writes."""
    return any(number != "0" for number in [os.environ[name] for name in RANKS if name in os.environ][:1])


def has_siblings() -> bool:
    """Whether a cluster, or torchrun, started this process as one of several."""
    return any(name in os.environ and int(os.environ.get(of, "1")) > 1 for name, of in STARTED.items())


def named_run(name: str, outputs: Path) -> RunFolder:
    """The run called by its folder, or `last` for the newest unfinished one. Raises UserError if there is none."""
    if name == "last":
        newest = next((run for run in runs(outputs) if not is_finished(run)), None)
        if newest is None:
            raise UserError(
                f"resume=last finds no interrupted run below {outputs}: name its folder, or start one without resume."
            )
        return newest
    run = RunFolder(Path(name))
    if not run.config.is_file():
        raise UserError(f"resume={name}: there is no run in that folder (it has no {run.config.name}).")
    return run


def run_to_resume(
    among: Iterable[RunFolder], same: Callable[[RunFolder], bool], finished: bool = False
) -> RunFolder | None:
    """The first run among these that is the `same` and that no process is at, if there is one; `finished` ones too.

    A process that follows asks nobody: the first one may be at the run already, or be kept from it by being asked.
    """
    for run in among:
        goes_on = run.config.is_file() and (finished or not is_finished(run))
        if goes_on and same(run) and (follows() or is_free(run)):
            return run
    return None


def runs(outputs: Path) -> Iterator[RunFolder]:
    """Runs below `outputs`, by day or named, newest first; not those of sweeps, which resume when that is repeated."""
    configs = [path for depth in ("*", "*/*") for path in outputs.glob(f"{depth}/config.yaml")]
    configs = [path for path in configs if path.parent.parent.name != "sweeps"]
    for config in sorted(configs, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        yield RunFolder(config.parent)


def is_finished(run: RunFolder) -> bool:
    """Whether it came to its end: that of the epochs it is to have now, where a finished run was given more."""
    if not run.metrics.exists():
        return False
    try:
        began = yaml.safe_load(run.config.read_text(encoding="utf-8"))["train"]
        ended = json.loads(run.metrics.read_text(encoding="utf-8"))["config"]["train"]
        return all(began[name] == ended[name] for name in ("max_epochs", "patience"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return True


def is_free(run: RunFolder) -> bool:
    """Whether no living process of this machine holds the run, and one may be at it: it may be another user's."""
    try:
        with locked(run.lock) as held:
            return held is not False
    except OSError:
        return False
