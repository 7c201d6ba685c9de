"""What a configuration file may say to Hydra: nothing that runs code, sets the environment or writes elsewhere.

A file from elsewhere (by `hydra.searchpath`) is chosen by its name and seldom read. What the user has typed on the
command line is the user's own business, and is let through wherever it is not an import in disguise.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ctxkv_lightning.config import flat
from ctxkv_lightning.errors import UserError

CALLBACKS = {"hydra.experimental.callbacks.LogJobReturnCallback"}
LOGGING = {"logging.StreamHandler", "logging.FileHandler", "logging.Formatter", "ext://sys.stdout", "ext://sys.stderr"}
"""All that the configuration of Hydra may name for it to import."""

SAMPLERS = re.compile(r"optuna\.samplers\.\w+Sampler")
"""And what Optuna's sweeper is configured with."""

LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
LAUNCHER = {"submitit_folder": "${hydra.sweep.dir}/.submitit/%j", "name": "${hydra.job.name}"}
"""Hydra's own values, which refer to others."""


def check_foreign(asked: DictConfig, overrides: Sequence[Override]) -> None:
    """Raises UserError for what only a file can have put into `asked`, Hydra's part of a composed configuration."""
    typed: dict[str, Any] = {}
    for override in overrides:
        if override.key_or_group.startswith("hydra.") and not (override.is_sweep_override() or override.is_delete()):
            typed |= flat({override.key_or_group.removeprefix("hydra."): override.value()})
    said = OmegaConf.to_container(asked, resolve=False)
    assert isinstance(said, dict)
    _check_callbacks(said["callbacks"])
    for section in ("job_logging", "hydra_logging"):
        _check_logging(section, said[section], typed)
    for section in ("launcher", "sweeper"):
        _check_instances(section, said[section])
    _check_launcher(said["launcher"], typed)
    for name, value in said["job"]["env_set"].items():
        if typed.get(f"job.env_set.{name}") != value:
            raise _by_a_file(f"hydra.job.env_set.{name}", "would change the environment")
    for key, value in {"output_subdir": said["output_subdir"], "job.name": said["job"]["name"]}.items():
        if value is not None and not _is_plain_name(value) and typed.get(key) != value:
            raise _by_a_file(f"hydra.{key}", f"is no plain name ({value!r})")


def check_foreign_folder(folder: Path, key: str, outputs: Path, overrides: Sequence[Override]) -> None:
    """Raises UserError for a run's or sweep's folder outside `outputs` that a file, and not the user, has named."""
    inside = Path(os.path.abspath(outputs)) in folder.parents and str(folder).isprintable()
    if not inside and key not in {override.key_or_group for override in overrides}:
        raise _by_a_file(key, f"names {str(folder)!r}, which is not below {outputs}")


def _by_a_file(key: str, why: str) -> UserError:
    return UserError(f"{key} {why}, and a configuration file has set it: type it on the command line, if you want it.")


def _check_callbacks(callbacks: Mapping[str, Any]) -> None:
    for name, callback in callbacks.items():
        # Whole names: one that begins with a package of ours goes on to whatever that package has imported.
        if not isinstance(callback, dict) or callback.get("_target_") not in CALLBACKS:
            raise UserError(f"hydra.callbacks.{name} would run foreign code: leave it out.")


def _check_logging(section: str, settings: Any, typed: Mapping[str, Any]) -> None:
    for path, value in _leaves(settings):
        key = path.rpartition(".")[2]
        if key == "()" or ((key == "class" or "://" in str(value)) and value not in LOGGING):
            raise UserError(f"hydra.{section} would run foreign code ({key}: {value}): leave it out.")
        if key == "filename" and value != LOG_FILE and typed.get(f"{section}.{path}") != value:
            raise _by_a_file(f"hydra.{section}.{path}", f"names the file {value!r}")


def _check_instances(section: str, settings: Any) -> None:
    """Launcher and sweeper are plugins that Hydra knows; but whatever they contain it would import and call too."""
    for path, value in _leaves(settings):
        nested, key = path.rpartition(".")[::2]
        if nested and key.startswith("_") and not (key == "_target_" and SAMPLERS.fullmatch(str(value))):
            raise UserError(f"hydra.{section}.{path} would run foreign code ({value}): leave it out.")


def _check_launcher(launcher: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Numbers and words may come from a file; lists, lines and paths could be commands, or where pickles are read."""
    for name, value in launcher.items():
        own = {f"launcher.{path}": leaf for path, leaf in flat({name: value}).items()}
        if isinstance(value, str):
            path = name.endswith("folder") or "/" in value or "\\" in value
            harmless = LAUNCHER.get(name) == value or (value.isprintable() and "${" not in value and not path)
        else:
            harmless = value is None or isinstance(value, (int, float))
        if not harmless and any(typed.get(path) != leaf for path, leaf in own.items()):
            raise _by_a_file(f"hydra.launcher.{name}", "could be a command to run, or a folder to write to")


def _is_plain_name(value: str) -> bool:
    return Path(value).name == value and value.isprintable() and "${" not in value


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested configuration, each with its dotted key; those of a list have the list's."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node
