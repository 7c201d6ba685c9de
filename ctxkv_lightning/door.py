"""Checks a command line of train.py: every trial is composed and checked before Hydra starts.

A mistake, wherever it stands, is one sentence and leaves nothing behind. Loads neither torch nor Lightning.
"""

import hashlib
import json
import os
import secrets
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ctxkv_lightning.config import (
    Config,
    RecipeConfig,
    check_choice,
    check_key,
    expected,
    flat,
    from_composed,
    load_config,
    plain_options,
)
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.foreign import check_foreign, check_foreign_folder
from ctxkv_lightning.run.find import RANKS, follows, has_siblings, named_run, run_to_resume, runs
from ctxkv_lightning.run.folder import RunFolder

CONF = Path(__file__).parent.parent / "conf"
OUTPUTS = Path("outputs")
EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""The launchers that are optional, and the extra of this package that brings each."""

ConfigStore.instance().store(name="schema", node=Config)
for group, option in plain_options():  # those that need more than a name are files below conf/
    ConfigStore.instance().store(group=group, name=next(iter(option.values())), node=option)
OmegaConf.register_new_resolver("run_id", lambda: secrets.token_hex(3), use_cache=True)


@dataclass(frozen=True)
class Trial:
    """One run of those that a command line asks for."""

    words: list[str]
    config: Config

    @property
    def identity(self) -> str:
        """A hash of all that makes this experiment what it is: equal ones need to run but once."""
        return identity(self.config)


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for, checked."""

    trials: list[Trial] = field(default_factory=list)
    """None where only help is asked for; one that stands for all where a sweeper chooses as it goes."""
    hydra: DictConfig | None = None
    """What it says to Hydra; None where only help or the configuration is to be shown."""
    multirun: bool = False
    chosen_later: bool = False
    resumed: RunFolder | None = None
    """The interrupted run to go on with, whose configuration is then the trial's."""

    @property
    def named_folder(self) -> str:
        """The folder of the run, or of the sweep, as it was named."""
        if self.resumed is not None:
            return str(self.resumed.path)
        assert self.hydra is not None
        return str(self.hydra.sweep.dir if self.multirun else self.hydra.run.dir)

    @property
    def folder(self) -> Path:
        """The folder of the run or of the sweep."""
        return Path(os.path.abspath(self.named_folder))


def identity(config: Config) -> str:
    """The name of this experiment's folder in a sweep: a hash of its effective configuration."""
    effective = config.effective()
    settings = asdict(effective)
    # What came later is left out where it is not used, or folders of sweeps begun before it would not be found.
    if config.data.source != "mqar":
        del settings["data"]["mqar"]
    for later in ("apart", "read_current"):
        if not settings["recipe"][later]:
            del settings["recipe"][later]
    for later in ("lm_epochs", "lm_weight_dropout"):
        if not settings["pretrain"][later]:
            del settings["pretrain"][later]
    for later, plain in (("layers", 1), ("local_window", None)):
        if settings["model"][later] == plain:
            del settings["model"][later]
    if effective.recipe == RecipeConfig() and effective.train.schedule == "constant":
        del settings["recipe"], settings["train"]["schedule"], settings["train"]["warmup_steps"]
    return _hash(settings)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def check_command_line(arguments: list[str]) -> list[Config]:
    """The configurations of all trials that these arguments ask for; a UserError names what is wrong with them."""
    return [trial.config for trial in read_command_line(arguments).trials]


def read_command_line(arguments: list[str]) -> CommandLine:
    """What these arguments ask for; a UserError names everything that is wrong with it."""
    options = _options(arguments)
    if options.help or options.hydra_help or options.shell_completion:
        return CommandLine()
    with _as_user_errors(), hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        asked, multirun = _compose_hydra(options)
        words = _trials(options.overrides, asked.sweeper, multirun)
        chosen_later = multirun and not _is_basic(asked.sweeper)
        trials = _compose_all(words)
        _refuse_in_sweeps(trials, multirun)
        named = any(override.key_or_group == "hydra.run.dir" for override in _parse(options.overrides))
        resumed = None if multirun else _resumed(trials[0], Path(asked.run.dir) if named else None)
        if resumed is not None:
            trials = [Trial(words[0], _onto(load_config(resumed), trials[0]))]
        names = sorted({trial.identity for trial in trials}) + (sorted(options.overrides) if chosen_later else [])
        OmegaConf.register_new_resolver("sweep_id", lambda: _hash(names), replace=True)
        if options.cfg or options.info:
            return CommandLine(trials)
        _refuse_followers(trials)
        checked = CommandLine(trials, asked, multirun, chosen_later, resumed)
        if resumed is None:
            key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
            check_foreign_folder(checked.folder, key, OUTPUTS, _parse(options.overrides))
        _check_folder(checked)
    return checked


def _refuse_in_sweeps(trials: list[Trial], multirun: bool) -> None:
    """Refuses what only a single run can do."""
    for config in (trial.config for trial in trials if multirun):
        if config.resume is not None:
            raise UserError("resume= goes on with one run; a sweep goes on when its command is repeated without it.")
        if config.trainer.devices * config.trainer.num_nodes > 1:
            raise UserError("trainer.devices and num_nodes must be 1 in a sweep, whose trials run one to a device.")


def _refuse_followers(trials: list[Trial]) -> None:
    """Refuses to be one of several processes of a run that has one: it would train, write nothing, and say nothing."""
    if follows() and any(trial.config.trainer.devices * trial.config.trainer.num_nodes == 1 for trial in trials):
        rank = next(name for name in RANKS if name in os.environ)
        raise UserError(
            f"this process is not the first of those that were started together ({rank}={os.environ[rank]}), but "
            "trainer.devices and num_nodes are 1: give them as many as there are, start one process, or unset "
            f"{rank} for a run of its own."
        )


def _resumed(trial: Trial, folder: Path | None) -> RunFolder | None:
    """The run that `resume` means: none for `auto` where nothing with these settings was interrupted.

    Where a new run's `folder` is named, `auto` looks there alone: of two jobs that are alike, each has its own. One
    that has finished there is measured once more: its job may have been killed before the report.
    """
    name = trial.config.resume
    if name is None:
        return None
    if name != "auto":
        return named_run(name, OUTPUTS)
    if folder is None and trial.config.trainer.devices * trial.config.trainer.num_nodes > 1 and has_siblings():
        raise UserError(
            "resume=auto needs a folder where a cluster starts the processes of a run, which would each look for one: "
            "give hydra.run.dir"
        )
    found = runs(OUTPUTS) if folder is None else [RunFolder(folder)]
    return run_to_resume(found, lambda run: _identity_of(run) == trial.identity, finished=folder is not None)


def _identity_of(run: RunFolder) -> str | None:
    try:
        return identity(load_config(run))
    except UserError:  # a run of another version, or a damaged one, is not the one that is meant
        return None


def _onto(saved: Config, trial: Trial) -> Config:
    """The run's own configuration with what the command line says on top."""
    plain, asked = flat(asdict(_plain_config())), flat(asdict(trial.config))
    named = _named(trial.words)
    merged = OmegaConf.structured(saved)
    for key, value in asked.items():
        if key in named or value != plain[key]:
            OmegaConf.update(merged, key, value)
    config = OmegaConf.to_object(merged)  # the pipeline names what differs, whether or not the two go together
    assert isinstance(config, Config)
    return config


def _named(words: list[str]) -> set[str]:
    """The keys that these words set, be it to their defaults: themselves, or by the options they choose."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    found = loader.compute_defaults_list("config", words, RunMode.RUN)
    repository = loader._parse_overrides_and_create_caching_repo("config", words)[1]
    named = {override.key_or_group for override in _parse(words)}
    for option in found.defaults:
        path = option.config_path or ""
        if path.rpartition("/")[0] in found.overrides.override_choices:
            loaded: Any = repository.load_config(path)
            keys = flat(OmegaConf.to_container(loaded.config, resolve=False))  # type: ignore[arg-type]
            named |= {f"{option.package}.{key}".removeprefix(".") for key in keys}
    return named


def _plain_config() -> Config:
    return from_composed(hydra.compose("config", []))


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


def _compose_hydra(options: Namespace) -> tuple[DictConfig, bool]:
    """What the command line says to Hydra, checked, and whether it asks for a multirun."""
    texts = options.overrides
    overrides = _parse(texts)
    for override in overrides:
        _check_override(override, _searchpath(texts))
    plain = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    composed = hydra.compose("config", plain, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # folders may be named with ${hydra:...}
    asked = composed.hydra
    multirun = options.multirun or asked.mode == RunMode.MULTIRUN
    check_foreign(asked, overrides)
    if multirun and asked.sweep.subdir != ".":
        raise UserError("hydra.sweep.subdir is not offered: each trial's folder is named by a hash of its options.")
    return asked, multirun


def _trials(texts: list[str], sweeper: DictConfig, multirun: bool) -> list[list[str]]:
    """The overrides of each trial."""
    overrides = _parse(texts)
    plain = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    if not multirun:
        if len(plain) < len(overrides):
            several = next(override.input_line for override in overrides if override.is_sweep_override())
            raise UserError(f"'{several}' has several values: add -m to run them all.")
        return [plain]
    if not _is_basic(sweeper):
        return [plain]  # other sweepers choose as they go: each trial is checked when it starts
    swept = _parse([f"{key}={value}" for key, value in (sweeper.params or {}).items()])
    for override in swept:
        _check_override(override, _searchpath(texts))
    _refuse_sweeps_of_sweeps([*swept, *overrides], _searchpath(texts))
    trials = BasicSweeper.split_arguments([*swept, *overrides], None)[0]
    if not trials:
        raise UserError(f"'{' '.join(texts)}' asks for no trial at all: give every key a value.")
    return trials


def _searchpath(texts: list[str]) -> list[str]:
    return [text for text in texts if text.startswith("hydra.searchpath=")]


def _is_basic(sweeper: DictConfig) -> bool:
    return sweeper._target_.endswith(".BasicSweeper")


def _refuse_sweeps_of_sweeps(overrides: list[Override], searchpath: list[str]) -> None:
    """Refuses several experiments of which one is a sweep: Hydra would run that one once, without its values."""
    for override in overrides:
        if override.key_or_group == "experiment" and override.is_sweep_override():
            for name in override.sweep_string_iterator():
                words = [*searchpath, f"experiment={name}"]
                if hydra.compose("config", words, return_hydra_config=True).hydra.sweeper.params:
                    raise UserError(f"experiment={name} is a sweep already: run it by itself.")


def _parse(texts: list[str]) -> list[Override]:
    try:
        return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(texts)
    except OverrideParseException as error:
        why = str(error).splitlines()[0]
        raise UserError(f"'{error.override}' cannot be read ({why}): write key=value, odd values in quotes.") from None


def _compose_all(words: list[list[str]]) -> list[Trial]:
    """The trials of these overrides; a UserError with a line for each that is wrong."""
    trials, found = [], []
    for trial in words:
        try:
            with _as_user_errors():
                composed = hydra.compose("config", trial, return_hydra_config=True)
                check_foreign(composed.hydra, _parse(trial))  # a launcher gives each trial its own
                with open_dict(composed):
                    del composed["hydra"]
                trials.append(Trial(trial, from_composed(composed)))
        except UserError as error:
            found.append(f"{' '.join(trial)}: {error}" if len(words) > 1 else str(error))
    if found:
        raise UserError("\n       ".join(dict.fromkeys(found)))
    return trials


def _check_override(override: Override, searchpath: list[str]) -> None:
    """Refuses what stock Hydra lets through: keys that nothing reads, deletions, interpolations."""
    text = override.input_line or ""
    key = override.key_or_group
    if key == "hydra/launcher" and not override.is_sweep_override():
        _check_launcher(str(override.value()))
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


def _check_launcher(name: str) -> None:
    installed = GlobalHydra.instance().config_loader().get_group_options("hydra/launcher")
    if name in EXTRAS and name not in installed:
        extra = f"pip install 'ctxkv-lightning[{EXTRAS[name]}]'"
        raise UserError(f"hydra/launcher={name} needs a plugin that is not installed: {extra} brings it.")
    check_choice("hydra/launcher", name, installed)


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns what Hydra and OmegaConf complain about into a UserError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
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


def _check_folder(asked: CommandLine) -> None:
    """Refuses a run folder, or a sweep's, that could not be made."""
    existing = next(path for path in (asked.folder, *asked.folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        key = "hydra.sweep.dir" if asked.multirun else "hydra.run.dir"
        why = f"the run folder {asked.named_folder} cannot be made in {existing} ({error.strerror})"
        raise UserError(f"{why}: run elsewhere or set {key}.") from None
