"""LightningCLI over the same modules: `fit`, `validate` and `test` of a run's `lightning.yaml`.

The file is written by every run (`pipeline.lightning_settings`) and holds plain values; which classes they configure
stands here, so that a file from elsewhere names none. What a checkpoint would overrule without a word is refused.
"""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.run.callbacks import History, announcing
from ctxkv_lightning.run.checkpoint import BestCheckpoint, RandomState, VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.interruption import Safeguard
from ctxkv_lightning.run.saved import read, steps_done
from ctxkv_lightning.run.trainer import FlushLogs, KeptCSVLogger, quiet_lightning

CONFIG = ("--config", "-c")
FORBIDDEN = re.compile(r"(class_path|_instantiator|_target_|!!python)")
"""What would have a configuration file choose the code that runs."""


class ContextCLI(LightningCLI):
    """LightningCLI with the callbacks of Phase 2, resuming as `train.py resume=` does."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives the callbacks their sections in the file."""
        for name, callback in (
            ("history", History),
            ("early_stopping", EarlyStopping),
            ("checkpoint", BestCheckpoint),
            ("safeguard", Safeguard),
        ):
            parser.add_lightning_class_args(callback, name)
        parser.add_class_arguments(KeptCSVLogger, "csv")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's, with what every Trainer of ours has."""
        plugins, callbacks = [VerifiedCheckpointIO()], [RandomState(), FlushLogs()]
        return super().instantiate_trainer(plugins=plugins, callbacks=callbacks, logger=False, **kwargs)

    def before_fit(self) -> None:
        """Keeps the logged rows of the steps that the checkpoint has behind it."""
        options, path = self.config[self.subcommand], self.config[self.subcommand].ckpt_path
        kept = steps_done(Path(path)) if path else 0
        self.trainer.logger = KeptCSVLogger(options.csv.folder, options.csv.phase, kept)


def run_lightning(subcommand: str, arguments: Sequence[str]) -> None:
    """Runs `fit`, `validate` or `test`. Raises UserError for a bad file, checkpoint or value."""
    check_files(arguments)
    check_overruled(arguments)
    quiet_lightning()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning 2.6's own calls
    # Where LightningCLI reads, and where other processes are started from.
    sys.argv[1:] = [subcommand, *at_home(arguments)]
    try:
        with announcing():
            ContextCLI(
                ContextKVLMModule,
                ContextDataModule,
                save_config_callback=None,
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False},
            )
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{reason}: 'python -m ctxkv_lightning {subcommand} --help' lists the options") from None


def check_files(arguments: Sequence[str]) -> None:
    """Raises UserError for a configuration file that cannot be read or that names code."""
    for value in values_of(arguments, *CONFIG):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {value} cannot be read ({error})") from None
        found = FORBIDDEN.search(text)
        if found:
            raise UserError(f"{value} names code to run ({found.group()}), which is not taken from a file: remove it")


def at_home(arguments: Sequence[str]) -> list[str]:
    """The arguments; behind each `lightning.yaml` of a run that was moved, the folder that the run is in now."""
    found: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        found.append(argument)
        for value in values_of([before, argument] if before in CONFIG else [argument], *CONFIG):
            found += _moved(RunFolder(Path(value).resolve().parent), Path(value))
    return found


def _moved(run: RunFolder, file: Path) -> list[str]:
    """The options that name the folder of `run`, if `file` is its own and names another."""
    if file.name != run.lightning.name or not run.checkpoints.is_dir():
        return []
    with suppress(yaml.YAMLError, KeyError, TypeError):  # LightningCLI says what is wrong with the file
        stated = yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]["default_root_dir"]
        if Path(stated).resolve() != run.path:
            return [
                f"--trainer.default_root_dir={run.path}",
                f"--checkpoint.dirpath={run.checkpoints}",
                f"--safeguard.checkpoint={run.last_checkpoint}",
                f"--csv.folder={run.path}",
            ]
    return []


def check_overruled(arguments: Sequence[str]) -> None:
    """Raises UserError for a `--model.` value that differs from the checkpoint's, which would win without a word."""
    paths = values_of(arguments, "--ckpt_path")
    if not paths:
        return
    saved = read(Path(paths[-1])).get("hyper_parameters", {})
    for argument in (argument for argument in arguments if argument.startswith("--model.")):
        name = argument.removeprefix("--model.").split("=")[0]
        asked = yaml.safe_load(values_of(arguments, f"--model.{name}")[-1])
        if name not in saved or saved[name] != asked:
            raise UserError(
                f"--model.{name}={asked} has no effect, for {paths[-1]} was trained with {saved.get(name)}: leave it "
                "out, or start a new run"
            )


def values_of(arguments: Sequence[str], *names: str) -> list[str]:
    """The values given to an option, as `--name value` or `--name=value`."""
    values = []
    for number, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name in names:
            values += [value] if has_value else list(arguments[number + 1 : number + 2])
    return values
