"""What a run tells while it goes on: log lines, the history of epochs, time and memory by stage.

Knows Lightning's Trainer and the names of logged metrics it is given; knows no model.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

log = logging.getLogger("ctxkv_lightning")


class Announcer(logging.Handler):
    """Prints log lines to whatever stdout is now, so that a live progress bar can move out of their way."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


@contextmanager
def announcing() -> Iterator[None]:
    """Prints this package's log lines while the block runs."""
    handler = Announcer()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Copies this package's log lines into `file`, with the time, while the block runs."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class ProgressBar(RichProgressBar):
    """Lightning's, without the logger's version: a run is known by its folder, and the line has to hold the PPL."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class History(Callback):
    """Keeps one row per training epoch: the logged metrics named in `columns`, seconds and tokens per second.

    An epoch that is resumed half-way took the time until it was saved, too. Rows go into the checkpoint, and with them
    whether training has been told to stop: a run killed between its last checkpoint and its end does not train on.
    """

    def __init__(self, columns: dict[str, str], tokens: int) -> None:
        self.columns = columns
        self.tokens = tokens
        self.epochs: list[dict[str, float]] = []
        self._stopped = False
        self._trainer: Trainer | None = None
        self._started = self._trained = time.perf_counter()
        self._spent = 0.0  # on the epoch under way, before it was resumed

    def state_dict(self) -> dict[str, Any]:
        spent = time.perf_counter() - self._started
        return {"epochs": self.epochs, "stopped": self.stopped, "spent": spent}

    @property
    def stopped(self) -> bool:
        """Whether training has been told to stop before its last epoch."""
        return self._trainer.should_stop if self._trainer is not None else self._stopped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self._stopped = state_dict["epochs"], state_dict["stopped"]
        self._spent = state_dict.get("spent", 0.0)  # which older checkpoints lack

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter() - self._spent  # an epoch that is resumed half-way does not start again
        trainer.should_stop = trainer.should_stop or (self._stopped and not has_patience_again(trainer))
        self._trainer = trainer

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.perf_counter() - self._started
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1}
        row |= {column: float(trainer.callback_metrics[name]) for column, name in self.columns.items()}
        row |= {"seconds": seconds, "tokens_per_second": self.tokens / (self._trained - self._started)}
        self.epochs.append(row)
        self._started = time.perf_counter()  # a checkpoint saved from here on has no epoch under way


def has_patience_again(trainer: Trainer) -> bool:
    """Whether training had been stopped for want of patience and has been given more than it has waited."""
    patience = trainer.early_stopping_callback
    if patience is None or patience.stopping_reason is not EarlyStoppingReason.PATIENCE_EXHAUSTED:
        return False
    return patience.wait_count < patience.patience


class Stages(Callback):
    """Seconds by stage, and memory at each stage's end.

    As a callback it keeps the seconds in the checkpoint, so that those of a resumed run count what was spent before.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: list[dict[str, Any]] = []
        self._name, self._since = "", time.perf_counter()
        self._before: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block as stage `name` and notes the memory in use when it ends."""
        self._name, self._since = name, time.perf_counter()
        yield
        self._count()
        self.memory.append({"stage": name, "cpu_gb": resident_gb(), "gpu_gb": gpu_peak_gb()})

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {"seconds": dict(self.seconds)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds them here, for a checkpoint that is loaded to be validated is no resumed run."""
        for name, seconds in self._before.items():
            self._add(name, seconds)
        self._before = {}

    def _count(self) -> None:
        now = time.perf_counter()
        self._add(self._name, now - self._since)
        self._since = now

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def resident_gb() -> float:
    """Memory of this process that is resident now, in GB (10⁹ bytes)."""
    return psutil.Process().memory_info().rss / 1e9


def gpu_peak_gb() -> float | None:
    """Peak memory that tensors took on the current GPU, in GB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
