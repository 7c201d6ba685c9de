"""Lightning's Trainer as every phase uses it."""

import csv
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.callbacks import ProgressBar
from ctxkv_lightning.run.checkpoint import VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder


class KeptCSVLogger(CSVLogger):
    """Lightning's, which deletes the rows of an earlier attempt; this one keeps those of the first `kept_steps` steps.

    What a killed run had logged after its last checkpoint is logged again.
    """

    def __init__(self, folder: str, phase: str = "train", kept_steps: int = 0) -> None:
        super().__init__(folder, name="", version=phase)
        rows = _rows(RunFolder(Path(folder)).logs(phase) / "metrics.csv")
        self._kept = [row for row in rows if int(row["step"]) < kept_steps]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        fresh = self._experiment is None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rows that it says it deletes are at hand
            writer = super().experiment
        if fresh:
            writer.metrics += [{key: value for key, value in row.items() if value != ""} for row in self._kept]
        return writer


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if (row.get("step") or "").isdigit()]


class FlushLogs(L.Callback):
    """Writes the log before each checkpoint: rows still in memory would be lost with a killed process."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()


def make_trainer(
    hardware: dict[str, Any],
    run: RunFolder,
    phase: str,
    *,
    steps: int,
    callbacks: list[L.Callback],
    kept_steps: int = 0,
    may_wait: Sequence[str] = (),
    **options: Any,
) -> L.Trainer:
    """A Trainer that logs `phase`, of so many steps an epoch, into the run folder; a progress bar where one is seen.

    `hardware` and `options` are the Trainer's own arguments, `options` having the last word;
    `enable_progress_bar` may be None for "in a terminal". `kept_steps` is where a resumed phase goes on: the rows
    logged before it stay. `may_wait` names checkpoints that are not written after every short epoch.
    """
    hardware = dict(hardware)
    visible = hardware.pop("enable_progress_bar")
    visible = sys.stdout.isatty() if visible is None else visible
    quiet_lightning()
    return L.Trainer(
        **{**hardware, **options},
        default_root_dir=run.path,
        logger=KeptCSVLogger(str(run.path), phase, kept_steps),
        plugins=[VerifiedCheckpointIO(may_wait)],
        log_every_n_steps=min(10, steps),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=visible,
        # Reading a metric to show it makes the host wait for a GPU, whose steps take milliseconds.
        callbacks=[
            *callbacks,
            FlushLogs(),
            *([ProgressBar(10 if torch.cuda.is_available() else 1)] if visible else []),
        ],
    )


def check_hardware(hardware: dict[str, Any]) -> None:
    """Raises UserError where a Trainer cannot have this accelerator, these devices or this strategy, or must not."""
    asked = {name: hardware[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
    quiet_lightning()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Trainer that is used says it
            trainer = L.Trainer(**asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except Exception as error:  # Lightning's connectors raise whatever they stumble over
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        settings = " ".join(f"trainer.{name}={value}" for name, value in asked.items())
        raise UserError(f"{settings} cannot be had here ({reason}): change them, or leave them out") from None
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            f"trainer.strategy={asked['strategy']} trains in processes that take what they have trained with them when "
            "they end: leave it out, or give ddp"
        )


def quiet_lightning() -> None:
    """Silences what Lightning says that no user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*`val_dataloader` but have no `validation_step`")  # Phase 1 validates nothing
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run has one
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning 2.6's own call into torch 2.13
