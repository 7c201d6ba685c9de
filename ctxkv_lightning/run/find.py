"""Finds the run that is to be resumed; loads neither torch nor Lightning."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.lease import locked


def named_run(name: str, outputs: Path) -> RunFolder:
    """The run called by its folder, or `last` for the newest unfinished one. Raises UserError if there is none."""
    if name == "last":
        newest = next((run for run in runs(outputs) if not run.metrics.exists()), None)
        if newest is None:
            raise UserError(
                f"resume=last finds no interrupted run below {outputs}: name its folder, or start one without resume."
            )
        return newest
    run = RunFolder(Path(name))
    if not run.config.is_file():
        raise UserError(f"resume={name}: there is no run in that folder (it has no {run.config.name}).")
    return run


def unfinished_run(among: Iterable[RunFolder], same: Callable[[RunFolder], bool]) -> RunFolder | None:
    """The first unfinished run among these that is the `same` and that no process is at, if there is one."""
    for run in among:
        if run.config.is_file() and not run.metrics.exists() and same(run) and is_free(run):
            return run
    return None


def runs(outputs: Path) -> Iterator[RunFolder]:
    """Runs below `outputs`, by day or named, newest first; not those of sweeps, which resume when that is repeated."""
    configs = [path for depth in ("*", "*/*") for path in outputs.glob(f"{depth}/config.yaml")]
    configs = [path for path in configs if path.parent.parent.name != "sweeps"]
    for config in sorted(configs, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        yield RunFolder(config.parent)


def is_free(run: RunFolder) -> bool:
    """Whether no living process of this machine holds the run."""
    with locked(run.lock) as held:
        return held is not False
