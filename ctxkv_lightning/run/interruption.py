"""What is saved while a phase goes on, and how a signal ends it: at a step, with a checkpoint."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ctxkv_lightning.run.checkpoint import worth_saving

log = logging.getLogger("ctxkv_lightning")

EVERY_SECONDS = 600.0
"""Between two checkpoints inside an epoch: what a machine that dies may cost."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

REQUEUED = getattr(signal, "SIGUSR2", None)
"""By which submitit tells a job that its time is over; its handler has the job run again."""


class Interrupted(BaseException):
    """The run was asked to stop and has saved; `code` is the exit code: 130 after Ctrl-C, 143 otherwise.

    `by` is the signal, where its handler raised this, which Python may ignore: see `ctrl_c.heard`.
    """

    def __init__(self, code: int, by: int | None = None) -> None:
        super().__init__(code)
        self.code, self.by = code, by


@contextmanager
def stopping() -> Iterator[None]:
    """While nothing is trained, SIGTERM and SIGUSR1 raise `Interrupted` at once.

    Lightning would end in silence with exit code 0; under SLURM it would write a checkpoint of its own into the run,
    which it would prefer to the one that is asked for, and requeue the job.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if isinstance(sys.exc_info()[1], Interrupted):  # it is stopping already, and may be writing what waits
            return
        log.info("stopped by a signal; what was trained is saved")
        raise Interrupted(143, by=number)

    before = {number: signal.signal(number, stop) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Safeguard(Checkpoint):
    """Saves `checkpoint` every `every_seconds`, and on SIGTERM, SIGUSR1 or Ctrl-C, after which it raises `Interrupted`.

    It acts between two steps, and saves at the end of the last epoch and of each other, but for those that are over
    sooner than a checkpoint is worth; or only between two epochs, where an epoch is not to be broken. A second Ctrl-C
    quits at once. All processes of a run stop at the same place, whichever was told. After submitit's SIGUSR2 it has
    saved when submitit's own handler is called.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        between: Literal["steps", "epochs"] = "steps",
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self.checkpoint, self.between, self.every_seconds = Path(checkpoint), between, every_seconds
        self._received: int | None = None
        self._saved = 0.0
        self._took: float | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, from Lightning too, whose handlers save in the middle of a step."""
        self._received, self._saved = None, time.monotonic()
        taken = [*SIGNALS, *([REQUEUED] if REQUEUED is not None and callable(signal.getsignal(REQUEUED)) else [])]
        self._before = {number: signal.signal(number, self._receive) for number in taken}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if self.between == "steps" and not trainer.is_last_batch:
            self._act(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = trainer.should_stop or trainer.max_epochs == trainer.current_epoch + 1
        ends = ends or trainer.max_steps == trainer.global_step
        worth = ends or worth_saving(self._saved, self._took, pl_module.state_dict())
        self._act(trainer, due=self.between == "steps" and self._agreed(trainer, worth))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreed(trainer, self._received is not None):  # while the last checkpoint was being saved
            self._stop(trainer)
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _act(self, trainer: Trainer, due: bool = False) -> None:
        asked = self._agreed(trainer, self._received is not None)
        if asked or due or self._agreed(trainer, time.monotonic() - self._saved > self.every_seconds):
            started = time.monotonic()
            trainer.save_checkpoint(self.checkpoint)
            self._saved = time.monotonic()
            self._took = self._saved - started
        if asked:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> NoReturn:
        log.info(f"stopped by a signal after step {trainer.global_step}, saved in {self.checkpoint}")
        if REQUEUED is not None and self._received == REQUEUED:
            handler = self._before[REQUEUED]
            self._give_back()
            handler(REQUEUED, None)
        raise Interrupted(130 if self._received == signal.SIGINT else 143)

    def _agreed(self, trainer: Trainer, wanted: bool) -> bool:
        return wanted if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(wanted, all=False)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        before = self._received
        if before is None or number == signal.SIGINT or before not in (signal.SIGINT, REQUEUED):
            self._received = number  # a launcher that has the job run again may send SIGTERM too
        if number != signal.SIGINT:
            return
        if before == number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        where = "step" if self.between == "steps" else "iteration"
        with suppress(RuntimeError, OSError, ValueError):  # in the midst of a print; nobody is left to read it
            print(f"\nsaving at the end of this {where}; Ctrl-C again quits without saving", flush=True)
