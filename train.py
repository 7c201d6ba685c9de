"""The Hydra door: compose, check, hand over to the pipeline.

Every trial of the command line is composed and checked before Hydra starts, so that a mistake, wherever it
stands, is one sentence and leaves nothing behind.
"""

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ctxkv_lightning.config import Config, check_choice, check_key, from_composed
from ctxkv_lightning.errors import EXIT_CODE, UserError

CONF = Path(__file__).parent / "conf"

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True)


def check_command_line(arguments: list[str]) -> list[Config]:
    """The configurations of all trials that these arguments ask for; a UserError names what is wrong with them."""
    options = get_args_parser().parse_args(arguments)
    if options.help or options.hydra_help or options.shell_completion:
        return []
    overrides = _parse(options.overrides)
    for override in overrides:
        _check_override(override, options.multirun)
    with _as_user_errors():
        trials = BasicSweeper.split_arguments(overrides, None)[0] if options.multirun else [options.overrides]
    configs, found = [], []
    for trial in trials:
        try:
            configs.append(_compose(trial, options.multirun))
        except UserError as error:
            found.append(f"{' '.join(trial)}: {error}" if len(trials) > 1 else str(error))
    if found:
        raise UserError("\n       ".join(dict.fromkeys(found)))
    return configs


def _parse(texts: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(texts)
    except OverrideParseException as error:
        why = str(error).splitlines()[0]
        raise UserError(f"'{error.override}' cannot be read ({why}): write key=value, odd values in quotes.") from None


def _compose(overrides: list[str], multirun: bool) -> Config:
    with _as_user_errors(), hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        composed = hydra.compose("config", overrides, return_hydra_config=True)
        _check_writable(Path(composed.hydra.sweep.dir if multirun else composed.hydra.run.dir))
        with open_dict(composed):
            del composed["hydra"]
        return from_composed(composed)


def _check_override(override: Override, multirun: bool) -> None:
    """Refuses what stock Hydra lets through: keys that nothing reads, deletions, interpolations."""
    text = override.input_line or ""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if override.is_delete():
        raise UserError(f"'{text}' would delete a key that is needed: give it a value instead.")
    if "${" in text:
        raise UserError(f"'{text}' has an interpolation, which the command line does not take: write the value itself.")
    if override.is_sweep_override() and not multirun:
        raise UserError(f"'{text}' has several values: add -m to run them all.")
    folder = CONF / key
    if folder.is_dir() and not isinstance(override.value(), dict):
        choices = sorted(path.stem for path in folder.glob("*.yaml"))
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        for value in values:
            check_choice(key, value, choices)
        return
    check_key(key)
    if override.is_add() and not override.is_force_add():
        raise UserError(f"'{text}' adds a key that is there already: leave out the '+'.")


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns the first line of what Hydra and OmegaConf complain about into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        what = str(cause).splitlines()[0].rstrip(".")
        key = getattr(cause, "full_key", None)
        raise UserError(f"{key}: {what}." if key else f"{what}.") from None


def _check_writable(folder: Path) -> None:
    """Refuses a run folder that could not be made."""
    existing = next(path for path in folder.absolute().parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        why = f"the run folder {folder} cannot be made in {existing} ({error.strerror})"
        raise UserError(f"{why}: run elsewhere or set hydra.run.dir.") from None


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def task(composed: DictConfig) -> float:
    """One run; its validation PPL."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        from ctxkv_lightning.pipeline import run_experiment  # loads torch: not before the command line is right

        return run_experiment(from_composed(composed), folder)
    except UserError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"error in trial {' '.join(HydraConfig.get().overrides.task)}: {error}", file=sys.stderr)
        raise
    finally:
        _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # the first that is not empty ends it
        for path in [folder, *folder.parents]:
            path.rmdir()


def main() -> None:
    """Runs the command line; a UserError becomes one line on stderr and exit code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hands exceptions on to us instead of printing half of them
    try:
        check_command_line(sys.argv[1:])
        task()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
