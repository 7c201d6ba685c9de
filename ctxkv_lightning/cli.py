"""LightningCLI over the same modules: `fit`, `validate` and `test` of a run's `lightning.yaml`.

The file is written by every run (`pipeline.lightning_settings`) and holds plain values; which classes they configure
stands here, so that a file from elsewhere names none. What a checkpoint would overrule without a word is refused.
"""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.run.callbacks import History, Stages, announcing, log
from ctxkv_lightning.run.checkpoint import BestCheckpoint, Patience, RandomState, VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder, alone_in
from ctxkv_lightning.run.interruption import Safeguard, stopping
from ctxkv_lightning.run.saved import SUFFIX, check_measured, epochs_done, read, steps_done
from ctxkv_lightning.run.trainer import FlushLogs, KeptCSVLogger, quiet_lightning
from ctxkv_lightning.use import BEST

CONFIG = ("--config", "-c")
SECTIONS = ("trainer", "model", "data", "history", "early_stopping", "checkpoint", "safeguard", "csv")
"""The parts of the file; each is a mapping, for a text would be the name of another file."""

WHOLE = ("--config", "--ckpt_path", "--seed_everything", *(f"--{section}" for section in SECTIONS))
"""Options whose values are looked at before they are parsed."""

FORBIDDEN = re.compile(r"class_path|_instantiator|_target_|__path__")
"""Keys by which a configuration file would choose the code that runs."""

OBJECTS = ("callbacks", "logger", "plugins", "profiler")
"""What a Trainer takes as objects: a text there is the name of a class to import."""


class ContextCLI(LightningCLI):
    """LightningCLI with the callbacks of Phase 2, resuming as `train.py resume=` does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._stages = Stages()
        with ExitStack() as self._held:
            super().__init__(*arguments, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives the callbacks their sections in the file."""
        for name, callback in (
            ("history", History),
            ("early_stopping", Patience),
            ("checkpoint", BestCheckpoint),
            ("safeguard", Safeguard),
        ):
            parser.add_lightning_class_args(callback, name)
        parser.add_class_arguments(KeptCSVLogger, "csv")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's, with what every Trainer of ours has."""
        plugins, callbacks = [VerifiedCheckpointIO()], [self._stages, RandomState(), FlushLogs()]
        return super().instantiate_trainer(plugins=plugins, callbacks=callbacks, logger=False, **kwargs)

    def before_fit(self) -> None:
        """Takes the run for itself; keeps the logged rows of the steps that the checkpoint has behind it.

        Raises UserError where that has more epochs behind it than are asked for, where another process has the run, and
        where a new training would replace the checkpoints of an old one.
        """
        options, path = self.config[self.subcommand], self.config[self.subcommand].ckpt_path
        if not path and self.trainer.is_global_zero:
            _refuse_to_replace(options)
        done, asked = epochs_done(Path(path)) if path else 0, self.trainer.max_epochs
        if asked is not None and 0 <= asked < done:
            raise UserError(
                f"{path} has {done} epochs behind it, more than trainer.max_epochs={asked}: give at least {done}"
            )
        run = RunFolder(Path(options.csv.folder))
        if self.trainer.is_global_zero and run.path.is_dir():  # nobody is at one that is not there yet
            self._held.enter_context(alone_in(run))
        self._held.enter_context(self._stages("train"))
        kept = steps_done(Path(path)) if path else 0
        self.trainer.logger = KeptCSVLogger(options.csv.folder, options.csv.phase, kept)

    def after_fit(self) -> None:
        """Says so where the numbers of the run are not those of its weights any more."""
        run = RunFolder(Path(self.config[self.subcommand].csv.folder))
        best = run.checkpoints / BEST
        if self.trainer.is_global_zero and run.metrics.exists() and best.exists():
            try:
                check_measured(run.read_metrics(), best, run.path)
            except UserError as told:
                log.info(str(told))


def _refuse_to_replace(options: Any) -> None:
    """Raises UserError where there is a checkpoint that a training from its beginning would write over."""
    best = options.checkpoint
    folder = best.dirpath or Path(options.csv.folder, options.csv.phase, "checkpoints")  # where Lightning has them
    for path in (Path(options.safeguard.checkpoint), Path(folder, f"{best.filename}{SUFFIX}")):
        if path.exists():
            raise UserError(
                f"{path} is of a training that this one, from its beginning, would replace: go on from it with "
                f"--ckpt_path {path}, or name other folders with --checkpoint.dirpath, --safeguard.checkpoint and "
                "--csv.folder"
            )


def run_lightning(subcommand: str, arguments: Sequence[str]) -> None:
    """Runs `fit`, `validate` or `test`. Raises UserError for a bad file, checkpoint or value."""
    check_spelling(arguments)
    check_files(arguments)
    check_overruled(arguments)
    quiet_lightning()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning 2.6's own calls
    # Where LightningCLI reads, and where other processes are started from.
    sys.argv[1:] = [subcommand, *at_home(arguments)]
    try:
        with announcing(), stopping():
            ContextCLI(
                ContextKVLMModule,
                ContextDataModule,
                save_config_callback=None,
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            )
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{reason}: 'python -m ctxkv_lightning {subcommand} --help' lists the options") from None


def check_spelling(arguments: Sequence[str]) -> None:
    """Raises UserError for an abbreviated option: what is looked at before the parser sees it goes by whole names."""
    for name in (argument.partition("=")[0] for argument in arguments):
        whole = [option for option in WHOLE if name[2:] and option.startswith(name) and name != option]
        if name.startswith("-c") and name != "-c":
            whole = ["-c FILE"]
        if whole:
            raise UserError(f"{name} is short for {whole[0]}: write it out")


def check_files(arguments: Sequence[str]) -> None:
    """Raises UserError for a configuration file that cannot be read or that names code."""
    for value in values_of(arguments, *CONFIG):
        try:
            settings = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"--config {value} cannot be read ({' '.join(str(error).split())})") from None
        named = next(_named_code(settings), None)
        if named is not None:
            raise UserError(f"{value} names code to run ({named}), which is not taken from a file: remove it")
    for section in SECTIONS:
        if values_of(arguments, f"--{section}"):
            raise UserError(f"--{section} takes no file: give its options one by one, or a whole file with --config")


def _named_code(settings: Any) -> Iterator[str]:
    """What in the parsed file could be the name of a class, or of another file that has one."""
    if not isinstance(settings, dict):
        yield str(settings)[:40]
        return
    for section, content in settings.items():
        if section not in (*SECTIONS, "seed_everything", "ckpt_path"):
            yield str(section)
        elif section in SECTIONS and not isinstance(content, dict):
            yield f"{section}: {content}"
        elif section == "trainer":
            yield from (key for key in content if not str(key).isidentifier())
            yield from (key for key in OBJECTS if content.get(key) not in (None, False, True))
    yield from (str(key) for key in _keys(settings) if FORBIDDEN.search(str(key)))


def _keys(node: Any) -> Iterator[Any]:
    """The keys of nested mappings, at any depth."""
    for child in node if isinstance(node, list) else node.values() if isinstance(node, dict) else ():
        yield from _keys(child)
    if isinstance(node, dict):
        yield from node


def at_home(arguments: Sequence[str]) -> list[str]:
    """The arguments; behind a run's own `lightning.yaml`, the folder that the run is in now, whatever the file says."""
    found: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        found.append(argument)
        for value in values_of([before, argument] if before in CONFIG else [argument], *CONFIG):
            found += _folder_of(Path(value))
    return found


def _folder_of(file: Path) -> list[str]:
    """The options that name the folder of a run, if `file` is its own."""
    run = RunFolder(file.resolve().parent)
    if file.name != run.lightning.name or not run.checkpoints.is_dir():
        return []
    return [
        f"--trainer.default_root_dir={run.path}",
        f"--checkpoint.dirpath={run.checkpoints}",
        f"--safeguard.checkpoint={run.last_checkpoint}",
        f"--csv.folder={run.path}",
    ]


def check_overruled(arguments: Sequence[str]) -> None:
    """Raises UserError for a `--seed_everything`, or a value of the model, that a checkpoint would win over unseen."""
    files = [_content(file) for file in values_of(arguments, *CONFIG)]
    checkpoint = _checkpoint_of(arguments)
    if checkpoint is None:
        return
    seeds = values_of(arguments, "--seed_everything")
    if seeds and yaml.safe_load(seeds[-1]) not in [file.get("seed_everything") for file in files[-1:]]:
        raise UserError(
            f"--seed_everything={seeds[-1]} has no effect, for random numbers go on as in {checkpoint}: leave it out "
            "or start a new run"
        )
    saved = read(Path(checkpoint)).get("hyper_parameters", {})
    written = {name: value for file in files for name, value in file.get("model", {}).items() if name in saved}
    options = [argument.split("=")[0] for argument in arguments if argument.startswith("--model.")]
    given = {option: values for option in options if (values := values_of(arguments, option))}
    typed = {option[len("--model.") :]: yaml.safe_load(values[-1]) for option, values in given.items()}
    for name, asked in {**written, **typed}.items():
        before = _saved_as(saved, name)
        if not _same(before, asked):
            where = f"--model.{name}={asked}" if name in typed else f"model.{name}: {asked} of the file"
            raise UserError(
                f"{where} has no effect, for {checkpoint} was trained with {before}: give that, or start a new run"
            )


def _content(file: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return settings


def _checkpoint_of(arguments: Sequence[str]) -> str | None:
    """The checkpoint that the last option or file to name one names; raises UserError for what is no path."""
    named = None
    for option, value in options_of(arguments, *CONFIG, "--ckpt_path"):
        if option == "--ckpt_path":
            named = None if yaml.safe_load(value) is None else value
        elif "ckpt_path" in (settings := _content(value)):
            named = settings["ckpt_path"]
            if not isinstance(named, str | None):
                raise UserError(f"ckpt_path: {named} of {value} is no path: name a checkpoint, or leave it out")
    return named


def _saved_as(saved: Any, name: str) -> Any:
    """The saved value of an option, whose dots lead into mappings; None where there is none."""
    for part in name.split("."):
        saved = saved.get(part) if isinstance(saved, dict) else None
    return saved


def _same(saved: Any, asked: Any) -> bool:
    """Whether a value is the saved one; YAML takes 3e-4 for a text."""
    if isinstance(saved, dict) and isinstance(asked, dict):
        return saved.keys() == asked.keys() and all(_same(saved[name], asked[name]) for name in saved)
    if isinstance(saved, float) and isinstance(asked, str):
        with suppress(ValueError):
            return saved == float(asked)
    return bool(saved == asked)


def values_of(arguments: Sequence[str], *names: str) -> list[str]:
    """The values given to an option, as `--name value` or `--name=value`."""
    return [value for _, value in options_of(arguments, *names)]


def options_of(arguments: Sequence[str], *names: str) -> list[tuple[str, str]]:
    """As `values_of`, each with the name of its option."""
    found = []
    for number, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name in names:
            found += [(name, each) for each in ([value] if has_value else arguments[number + 1 : number + 2])]
    return found
