"""Whether an interrupted run may go on: same settings, same text, intact checkpoints."""

import copy
import hashlib
import json
import operator
from collections.abc import Iterable
from dataclasses import asdict, fields

from torch import Tensor

from ctxkv_lightning.build import Text
from ctxkv_lightning.config import Config, TrainerConfig, flat, load_config
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import alike
from ctxkv_lightning.run.callbacks import log
from ctxkv_lightning.run.checkpoint import VerifiedCheckpointIO, clear_aside
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import epochs_done, newest_intact, read, verify

HARMLESS = {
    "resume", "cache_dir", "embeddings", "train.max_epochs", "train.patience", "train.compile",
    *(f"trainer.{spec.name}" for spec in fields(TrainerConfig)),
}  # fmt: skip
"""Keys that may change when a run is resumed: how long (unless a schedule goes by it), where and on what it runs."""


def check_changes(config: Config, run: RunFolder) -> None:
    """Raises UserError where the configuration asked for differs from the run's own in more than `HARMLESS` keys.

    Trials of a sweep that are one experiment, and share a folder, may differ in what nothing reads.
    """
    began, asked = load_config(run), flat(asdict(config))
    harmless = HARMLESS - ({"train.max_epochs"} if began.train.schedule == "linear" else set())
    changed = {key: (old, asked[key]) for key, old in flat(asdict(began)).items() if asked[key] != old}
    for key, (old, new) in changed.items():
        if key in harmless - {"resume"}:
            log.info(f"resumed with {key}: {old} -> {new}")
    refused = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if key not in harmless]
    if refused and began.effective() != _with_values_of(began, config, harmless).effective():
        raise UserError(
            f"{run.path} began with other settings ({'; '.join(refused)}): leave them as they were, or start a new run "
            f"from its weights with init_from={run.path}"
        )


def _with_values_of(began: Config, config: Config, keys: Iterable[str]) -> Config:
    """`config`, but with these keys as the run began with them."""
    mixed = copy.deepcopy(config)
    for key in keys:
        holder, _, name = key.rpartition(".")
        target, source = (operator.attrgetter(holder)(each) if holder else each for each in (mixed, began))
        setattr(target, name, getattr(source, name))
    return mixed


def check_checkpoints(run: RunFolder, resume: str) -> None:
    """Raises UserError if the newest checkpoint is damaged; a forgiving resume says so and passes it over."""
    for folder in (run.path, run.checkpoints):
        clear_aside(folder)
    _check_phase_one(run, resume)
    usable, complaints = newest_intact(run.checkpoints)
    if complaints and (resume == "strict" or usable is None):
        raise UserError(f"{complaints[0]}; resume=auto goes on from the newest that is intact")
    for complaint in complaints:
        log.info(f"{complaint}: going on from {usable} instead")


def check_epochs(config: Config, run: RunFolder) -> None:
    """Raises UserError where the run has trained for more epochs than it is to."""
    done = epochs_done(newest_intact(run.checkpoints)[0])
    if done > config.train.max_epochs:
        raise UserError(
            f"{run.path} has {done} epochs behind it, more than train.max_epochs={config.train.max_epochs}: "
            f"give at least {done}, or start a new run"
        )


def check_table(run: RunFolder, table: Tensor) -> None:
    """Raises UserError where the embedding table (V, D) is not the one that the run's checkpoint has.

    Rounding is allowed: another machine has another one, by a little, where it is made of the text.
    """
    checkpoint = newest_intact(run.checkpoints)[0]
    if checkpoint is None:
        return
    if not alike(read(checkpoint)["state_dict"]["model.embedding.weight"], table):
        raise UserError(
            f"the embedding table of {run.path} is not the one that is made now (on another machine, by other "
            "software, or of another embedding.file): bring back the cache that the run was trained with, name it by "
            "cache_dir=, or start a new run"
        )


def _check_phase_one(run: RunFolder, resume: str) -> None:
    """A forgiving resume begins Phase 1 anew where its checkpoint is damaged: it comes to the same."""
    for checkpoint in run.pretrain_checkpoints:
        try:
            verify(checkpoint)
        except UserError as error:
            if resume == "strict":
                raise UserError(f"{error}; resume=auto begins Phase 1 anew") from None
            log.info(f"{error}: beginning Phase 1 anew")
            VerifiedCheckpointIO().remove_checkpoint(checkpoint)


def check_identity(run: RunFolder, text: Text) -> None:
    """Notes the hashes of text and tokenizer in a new run; raises UserError where a resumed one finds others."""
    key = text.tokens.manifest["key"]
    documents = json.dumps([key["documents"], key["between"]], sort_keys=True)
    found = {"text": hashlib.sha256(documents.encode()).hexdigest(), "tokenizer": key["encoding"]}
    if not run.identity.exists():
        run.write_identity(found)
        return
    for name, began in json.loads(run.identity.read_text(encoding="utf-8")).items():
        if found[name] != began:
            raise UserError(
                f"the {name} has changed since {run.path} began: its SHA-256 was {began}, is {found[name]}; "
                "restore it, or start a new run"
            )
