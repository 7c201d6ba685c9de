"""The Hydra door: compose, check, hand over to the pipeline.

Every trial of the command line is composed and checked before Hydra starts, so that a mistake, wherever it
stands, is one sentence and leaves nothing behind.
"""

import os
import secrets
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctxkv_lightning.config import Config, check_choice, check_key, expected, from_composed, plain_options
from ctxkv_lightning.errors import EXIT_CODE, UserError

CONF = Path(__file__).parent / "conf"
_standing: set[Path] = set()  # the run folder's ancestors that were there before the run: never removed
_failed_sweeps: set[Path] = set()

ConfigStore.instance().store(name="schema", node=Config)
for group, option in plain_options():  # those that need more than a name are files below conf/
    ConfigStore.instance().store(group=group, name=next(iter(option.values())), node=option)
OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True)


def check_command_line(arguments: list[str]) -> list[Config]:
    """The configurations of all trials that these arguments ask for; a UserError names what is wrong with them."""
    options = _options(arguments)
    if options.help or options.hydra_help or options.shell_completion:
        return []
    with _as_user_errors(), hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        trials = _trials(options.overrides, options.multirun)
        configs, found = [], []
        for trial in trials:
            try:
                configs.append(_compose(trial))
            except UserError as error:
                found.append(f"{' '.join(trial)}: {error}" if len(trials) > 1 else str(error))
    if found:
        raise UserError("\n       ".join(dict.fromkeys(found)))
    return configs


def _options(arguments: list[str]) -> Namespace:
    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: 'python train.py --hydra-help' lists the flags.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    for name in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(options, name):  # what was checked must be what runs, and a rerun would load a pickle
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is not offered: hydra.searchpath=[file:///folder] adds your configuration files.")
    asked = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(options, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} exclude each other: choose one.")
    if options.resolve and not (options.cfg or options.help):
        raise UserError("--resolve shows nothing by itself: add --cfg job.")
    return options


def _trials(texts: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each trial; each override is checked by itself, and so is what they say to Hydra."""
    overrides = _parse(texts)
    for override in overrides:
        _check_override(override, [text for text in texts if text.startswith("hydra.searchpath=")])
    plain = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    asked = hydra.compose("config", plain, return_hydra_config=True)
    HydraConfig.instance().set_config(asked)  # folders may be named with ${hydra:...}
    multirun = multirun or asked.hydra.mode == RunMode.MULTIRUN
    _check_hydra(asked.hydra, multirun)
    if not multirun:
        if len(plain) < len(overrides):
            several = next(override.input_line for override in overrides if override.is_sweep_override())
            raise UserError(f"'{several}' has several values: add -m to run them all.")
        return [plain]
    if not asked.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return [plain]  # other sweepers choose as they go: each trial is checked when it starts
    swept = _parse([f"{key}={value}" for key, value in (asked.hydra.sweeper.params or {}).items()])
    for override in swept:
        _check_override(override, [])
    trials = BasicSweeper.split_arguments([*swept, *overrides], None)[0]
    if not trials:
        raise UserError(f"'{' '.join(texts)}' asks for no trial at all: give every key a value.")
    return trials


def _parse(texts: list[str]) -> list[Override]:
    try:
        return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(texts)
    except OverrideParseException as error:
        why = str(error).splitlines()[0]
        raise UserError(f"'{error.override}' cannot be read ({why}): write key=value, odd values in quotes.") from None


def _compose(overrides: list[str]) -> Config:
    with _as_user_errors():
        return from_composed(hydra.compose("config", overrides))


def _check_override(override: Override, searchpath: list[str]) -> None:
    """Refuses what stock Hydra lets through: keys that nothing reads, deletions, interpolations."""
    text = override.input_line or ""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if override.is_delete():
        raise UserError(f"'{text}' would delete a key that is needed: give it a value instead.")
    if "${" in text:
        raise UserError(f"'{text}' has an interpolation, which the command line does not take: write the value itself.")
    if override.package is not None:
        raise UserError(f"'{text}' moves a group to where nothing reads it: leave out '@{override.package}'.")
    choices = GlobalHydra.instance().config_loader().get_group_options(key, overrides=searchpath)
    if choices and not isinstance(override.value(), dict):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        for value in values:
            check_choice(key, value, choices)
    else:
        check_key(key)
    if override.is_add() and not override.is_force_add():
        raise UserError(f"'{text}' adds a key that is there already: leave out the '+'.")


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns what Hydra and OmegaConf complain about into a UserError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error.__context__
        cause = cause if isinstance(cause, OmegaConfBaseException) else error
        key = (getattr(cause, "full_key", None) or "").split("[")[0]
        where = str(error).splitlines()[0].split(":")[0] + ": " if str(error).startswith("In '") else ""
        if key and not key.startswith("hydra"):
            try:
                check_key(key)
            except UserError as unknown:
                raise UserError(f"{where}{unknown}") from None
            raise UserError(f"{where}{key}: {_first_line(cause)}: give {expected(key)}.") from None
        raise UserError(f"{where}{_first_line(cause)}: 'python train.py --cfg job' shows the configuration.") from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".:") if str(error) else type(error).__name__


def _check_hydra(asked: DictConfig, multirun: bool) -> None:
    """Refuses foreign callbacks, which a configuration file could smuggle in, and a run folder that could not be made.

    Remembers which folders stand already.
    """
    for name, callback in asked.callbacks.items():
        if not str(callback.get("_target_")).startswith(("hydra.experimental.callbacks.", "ctxkv_lightning.")):
            raise UserError(f"hydra.callbacks.{name} would run foreign code: leave it out.")
    named = asked.sweep.dir if multirun else asked.run.dir
    folder = _absolute(named)
    _standing.update(path for path in [folder, *folder.parents] if path.exists())
    existing = next(path for path in [folder, *folder.parents] if path in _standing)
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        why = f"the run folder {named} cannot be made in {existing} ({error.strerror})"
        raise UserError(f"{why}: run elsewhere or set hydra.run.dir.") from None


def _absolute(folder: str) -> Path:
    return Path(os.path.abspath(folder))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def task(composed: DictConfig) -> float:
    """One run; its validation PPL."""
    folder = _absolute(HydraConfig.get().runtime.output_dir)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        from ctxkv_lightning.pipeline import run_experiment  # loads torch: not before the command line is right

        return run_experiment(from_composed(composed), folder)
    except UserError as error:
        if multirun:
            _failed_sweeps.add(_absolute(HydraConfig.get().sweep.dir))
            print(f"error in trial {' '.join(HydraConfig.get().overrides.task)}: {error}", file=sys.stderr)
            raise UserError("a trial failed, as said above.") from None
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None  # an exception would have Hydra add a line of its own
    except Exception:
        if multirun:  # Hydra raises the first of a sweep at its end and drops the others
            traceback.print_exc()
        raise
    finally:
        _remove_empty([folder] if multirun else [folder, *folder.parents])


def _remove_empty(folders: list[Path]) -> None:
    """Removes these folders, innermost first, up to the first that has something in it or stood before the run."""
    with suppress(OSError):
        for folder in folders:
            if folder in _standing:
                return
            folder.rmdir()


def _remove_barren_sweeps() -> None:
    """Removes the folders of failed sweeps that hold nothing but Hydra's own note of the sweep."""
    for folder in _failed_sweeps:
        if [path.name for path in folder.iterdir()] == ["multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            _remove_empty([folder, *folder.parents])


def main() -> None:
    """Runs the command line; a UserError becomes one line on stderr and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands exceptions on to us instead of printing half of them
    try:
        check_command_line(sys.argv[1:])
        task()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _remove_barren_sweeps()


if __name__ == "__main__":
    main()
