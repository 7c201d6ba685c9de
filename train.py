"""The Hydra door: check the command line, run what it asks for, tell how it ended."""

import os
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ctxkv_lightning.config import Config, from_composed
from ctxkv_lightning.door import CommandLine, identity, read_command_line
from ctxkv_lightning.errors import EXIT_CODE, UserError, lack_of_memory
from ctxkv_lightning.run.ctrl_c import heard
from ctxkv_lightning.run.find import follows

INTERRUPTED, TERMINATED = 130, 143
MAIN = os.getpid()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def task(composed: DictConfig) -> float:
    """One run; its validation PPL.

    Some launchers pickle this function, with a copy of every global it reads, into other processes: it keeps nothing
    in one.
    """
    asked = HydraConfig.get()
    config, folder = from_composed(composed), Path(asked.runtime.output_dir)
    if asked.mode == RunMode.MULTIRUN:
        from ctxkv_lightning.run.lease import end_with
        from ctxkv_lightning.run.sweep import run_trial

        trial, words = folder / identity(config), list(asked.overrides.task)
        together = asked.runtime.choices["hydra/launcher"] == "joblib"  # its workers share one terminal
        if together:
            end_with(MAIN)
        return run_trial(
            trial,
            words,
            asdict(config),
            lambda path, resume: run(config, path, "forgiving" if resume else "no"),
            quiet=together,
        )
    try:
        return run(config, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None  # an exception would have Hydra add a line of its own


def run(config: Config, folder: Path, resume: Literal["no", "strict", "forgiving"] = "no") -> float:
    """Hands over to the pipeline, and loads it: torch has to wait until the command line is right."""
    from ctxkv_lightning.pipeline import run_experiment

    try:
        return run_experiment(config, folder, resume)
    except (MemoryError, RuntimeError) as error:
        if (told := lack_of_memory(error)) is not None:
            raise told from error
        raise


def main() -> None:
    """Runs the command line and exits; a UserError becomes one line on stderr and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands exceptions on to us instead of printing half of them
    try:
        asked = read_command_line(sys.argv[1:])
        if asked.hydra is None:
            task()  # shows help or the configuration
        elif asked.multirun:
            sys.exit(run_sweep(asked))
        elif asked.resumed is not None:
            resume(asked)
        else:
            if asked.trials[0].config.resume == "auto" and not follows():
                print("resume=auto: no interrupted run with these settings, starting a new one", flush=True)
            run_alone(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (Exception, SystemExit):
        raise
    except BaseException as stop:
        sys.exit(stopped(stop))


def resume(asked: CommandLine) -> None:
    """Goes on with an interrupted run, in its own folder, without Hydra, which has nothing left to decide."""
    assert asked.resumed is not None
    config = asked.trials[0].config
    # Lightning starts the other processes of a run with these words: `auto` and `last` might mean another one by then.
    _add(_override("resume", os.path.abspath(asked.resumed.path)))
    run(config, asked.resumed.path, "forgiving" if config.resume == "auto" else "strict")


def run_alone(asked: CommandLine) -> None:
    """One run; if it leaves nothing in its folder, the folder goes, and so do parents that were made for it."""
    made = [path for path in (asked.folder, *asked.folder.parents) if not path.exists()]
    _add(_override("hydra.run.dir", asked.named_folder))  # the folder that was checked
    try:
        task()
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def run_sweep(asked: CommandLine) -> int:
    """All trials, then their table and the page that compares them; the exit code."""
    # Written out, since other processes have no resolver for it.
    _add(_override("hydra.sweep.dir", asked.named_folder))
    _share_processors(asked)
    print(f"sweep {asked.named_folder}: {_count(asked)}", flush=True)
    try:
        task()
    except UserError:
        raise
    except Exception:  # a launcher's: those of trials are in their status
        traceback.print_exc()
    except BaseException as stop:
        print("interrupted: the same command goes on from here.", file=sys.stderr)
        return stopped(stop)
    return tell(asked)


def stopped(stop: BaseException) -> int:
    """The exit code after a signal: 143 where the run says so, else Ctrl-C's, which Lightning may turn into an exit."""
    return TERMINATED if getattr(stop, "code", None) == TERMINATED else INTERRUPTED


def tell(asked: CommandLine) -> int:
    """Prints what became of the trials, writes the page that compares them; the exit code."""
    from rich.console import Console

    from ctxkv_lightning.run import sweep

    named: dict[Path, list[str]] = {}
    for trial in asked.trials:
        named.setdefault(asked.folder / trial.identity, trial.words)
    if asked.chosen_later:
        found = {path.parent: sweep.read_status(path.parent) for path in asked.folder.glob("[!.]*/status.json")}
        named = {folder: status["overrides"] for folder, status in found.items() if status}
    outcomes = [sweep.look(folder, words) for folder, words in named.items()]
    Console().print(sweep.table(f"sweep {asked.named_folder}", outcomes))
    if any(outcome.state == "finished" for outcome in outcomes):
        from ctxkv_lightning.report.comparison import write_comparison

        page = write_comparison([outcome.folder for outcome in outcomes if outcome.folder.exists()], asked.folder)
        print(f"comparison {page}")
    return sweep.exit_code(outcomes)


def _count(asked: CommandLine) -> str:
    if asked.chosen_later:
        return "trials chosen as it goes"
    trials = _distinct(asked)
    repeated = len(asked.trials) - trials
    told = "1 trial" if trials == 1 else f"{trials} trials"
    return told + (f" ({repeated} more combinations repeat one of them)" if repeated else "")


def _distinct(asked: CommandLine) -> int:
    return len({trial.identity for trial in asked.trials})


def _override(key: str, value: str) -> str:
    return f"{key}='" + value.replace("'", r"\'") + "'"


def _add(word: str) -> None:
    """Adds to the overrides of the command line: behind the last of them, for behind a flag none would be taken."""
    overrides = [i for i, each in enumerate(sys.argv) if i and (each[0] == "~" or ("=" in each and each[0] != "-"))]
    sys.argv.insert(max(overrides, default=len(sys.argv) - 1) + 1, word)


def _share_processors(asked: CommandLine) -> None:
    """Keeps trials that run side by side on this machine from having more threads than it has processors.

    joblib divides the processors by n_jobs, which is their number unless told otherwise: a thread for each of few
    trials on many processors. submitit_local starts all trials at once and divides nothing.
    """
    assert asked.hydra is not None
    trials, processors = _distinct(asked), os.cpu_count() or 1
    match asked.hydra.runtime.choices["hydra/launcher"]:
        case "joblib" if asked.hydra.launcher.n_jobs == -1 and not asked.chosen_later:
            _add(f"hydra.launcher.n_jobs={min(trials, processors)}")
        case "submitit_local":
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // trials)))


if __name__ == "__main__":
    with heard():
        main()
