"""Lightning's Trainer as every phase uses it."""

import logging
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from ctxkv_lightning.run.callbacks import ProgressBar
from ctxkv_lightning.run.folder import RunFolder


def make_trainer(
    hardware: dict[str, Any], run: RunFolder, phase: str, *, steps: int, callbacks: list[L.Callback], **options: Any
) -> L.Trainer:
    """A Trainer that logs `phase`, of so many steps an epoch, into the run folder; a progress bar where one is seen.

    `hardware` and `options` are the Trainer's own arguments, `options` having the last word;
    `enable_progress_bar` may be None for "in a terminal".
    """
    hardware = dict(hardware)
    visible = hardware.pop("enable_progress_bar")
    visible = sys.stdout.isatty() if visible is None else visible
    _quiet_lightning()
    return L.Trainer(
        **{**hardware, **options},
        default_root_dir=run.path,
        logger=CSVLogger(run.path, name="", version=phase),
        log_every_n_steps=min(10, steps),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=visible,
        # Reading a metric to show it makes the host wait for a GPU, whose steps take milliseconds.
        callbacks=[*callbacks, *([ProgressBar(10 if torch.cuda.is_available() else 1)] if visible else [])],
    )


def _quiet_lightning() -> None:
    """Silences what Lightning says that no user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*`val_dataloader` but have no `validation_step`")  # Phase 1 validates nothing
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning 2.6's own call into torch 2.13
