"""Phase 1: the encoder learns to disperse its contexts (OACD).

One epoch is one iteration: the contexts of the previous iteration, shifted right by one token and disturbed
by noise, go through the encoder once, all positions in parallel; the gradients of the batches
are averaged (Lightning's accumulation) into one Adam step.
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.oacd import (
    ROWS_AT_A_TIME,
    effective_rank_of,
    has_plateaued,
    oacd_loss,
    singular_values,
    still_positions,
)
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import Store, reserve

log = logging.getLogger(__name__)

CONVERGENCE = "pretrain/convergence_rate"
WEIGHTS = "encoder.pt"
FILE_BACKED = 1 << 30
"""Bytes from which the contexts of an iteration live in a file."""


class OACDPretrainModule(L.LightningModule):
    """Trains a `ContextEncoder` on the batches of `ContextDataModule`'s first phase.

    Logs `pretrain/loss` and `pretrain/convergence_rate` once per epoch, and keeps them in `history`. Stops
    by itself, at the target rate or on a plateau. Raises UserError before the update when the loss is not finite.
    """

    def __init__(
        self,
        context_dim: int = 256,
        embedding_dim: int = 768,
        lr: float = 0.002,
        noise: float = 0.1,
        centroid_weight: float = 0.1,
        move_threshold: float = 0.03,
        target_rate: float = 0.9,
        plateau_rate: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = ContextEncoder(context_dim, embedding_dim)
        self.history: list[dict[str, float]] = []
        self.contexts = self._edge = torch.empty(0)
        self._losses: list[Tensor] = []
        self._still = torch.zeros((), dtype=torch.long)
        self._started = 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Between two iterations, the contexts and the history are all that a checkpoint lacks."""
        checkpoint["contexts"], checkpoint["history"] = self.contexts, self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.contexts, self.history = checkpoint["contexts"], checkpoint["history"]

    def on_train_start(self) -> None:
        """An interrupted phase that had reached its goal does not go on."""
        self.trainer.should_stop = self.trainer.should_stop or bool(self.history and self.stopped_by != "limit")

    def on_fit_start(self) -> None:
        """Draws the random start N(0, 0.01²): the contexts (N, C) that the first iteration reads."""
        if len(self.contexts):
            self.contexts = self.contexts.to(self.device)
            return
        N, C = self.trainer.datamodule.pretrain_tokens, self.hparams["context_dim"]  # type: ignore[attr-defined]
        self.contexts = scratch(N, C, self.device)
        for rows in self.contexts.split(ROWS_AT_A_TIME):
            rows.normal_(std=0.01)

    def on_train_epoch_start(self) -> None:
        self._losses, self._still = [], torch.zeros((), dtype=torch.long, device=self.device)
        self._edge = self.encoder.initial(1)
        self._started = time.perf_counter()

    def training_step(self, batch: Any) -> Tensor:
        previous = self.contexts[batch.start : batch.start + len(batch.inverse)]
        shifted = torch.cat([self._edge, previous[:-1]])
        self._edge = previous[-1:].clone()  # the next batch shifts in what this one overwrites
        disturbed = torch.randn_like(shifted).mul_(self.hparams["noise"]).add_(shifted)
        drive = self.encoder.drive(batch.embeddings)
        contexts = self.encoder.advance(disturbed, torch.nn.functional.embedding(batch.inverse, drive))
        loss = oacd_loss(contexts, self.hparams["centroid_weight"])
        self._losses.append(loss.detach())
        self._still += still_positions(contexts.detach(), previous, self.hparams["move_threshold"])
        previous.copy_(contexts.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Once an iteration: each look makes the host wait for a GPU."""
        loss = torch.stack(self._losses).sum()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of Phase 1 became {loss.item()} in iteration {self.current_epoch + 1}: "
                f"lower pretrain.lr (now {self.hparams['lr']:g})"
            )

    def on_train_epoch_end(self) -> None:
        rate = int(self._still) / len(self.contexts)
        loss = float(torch.stack(self._losses).mean())
        row = {"pretrain/loss": loss, CONVERGENCE: rate}
        self.log_dict(row, prog_bar=True, logger=False)
        if self.trainer.logger is not None:  # now, so that a checkpoint saved after this hook finds it logged
            self.trainer.logger.log_metrics({"epoch": self.current_epoch, **row}, step=self.global_step - 1)
        seconds = time.perf_counter() - self._started
        iteration = {"iteration": self.current_epoch + 1, "loss": loss, "convergence_rate": rate, "seconds": seconds}
        self.history.append(iteration)
        log.info(f"  iteration {iteration['iteration']:2d}  loss {loss:8.4f}  converged {rate:6.1%}  {seconds:.1f} s")
        if self.stopped_by != "limit":
            self.trainer.should_stop = True

    @property
    def stopped_by(self) -> Literal["target", "plateau", "limit"]:
        """Which rule ended Phase 1, or would end it now."""
        rates = [row["convergence_rate"] for row in self.history]
        if rates and rates[-1] >= self.hparams["target_rate"]:
            return "target"
        return "plateau" if has_plateaued(rates, self.hparams["plateau_rate"]) else "limit"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])

    def summary(self) -> dict[str, Any]:
        """What Phase 1 reached, as JSON: iterations, rates, spectrum of the last contexts, history."""
        singular = singular_values(self.contexts.cpu())
        last = self.history[-1]
        return {
            "iterations": last["iteration"],
            "convergence_rate": last["convergence_rate"],
            "effective_rank": effective_rank_of(singular),
            "stopped_by": self.stopped_by,
            "seconds": sum(row["seconds"] for row in self.history),
            "history": self.history,
            "singular_values": singular.tolist(),
        }


def scratch(rows: int, columns: int, device: torch.device) -> Tensor:
    """An uninitialised fp32 tensor; on a CPU and of `FILE_BACKED` bytes or more, one that the system can page out.

    Raises UserError where the system's folder for temporary files has no room for all of it.
    """
    size = rows * columns * 4
    if device.type != "cpu" or size < FILE_BACKED:
        return torch.empty(rows, columns, device=device)
    try:
        folder = Path(tempfile.gettempdir())
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the file's name
            reserve(file, size, folder)
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(rows, columns)))
    except OSError as error:
        place = tempfile.tempdir or "a folder for temporary files"
        raise UserError(
            f"Phase 1 needs a file of {size:,} bytes in {place} ({error.strerror}): make room there, or set "
            "TMPDIR to a folder that has it"
        ) from error


def save_encoder(encoder: ContextEncoder, folder: Path) -> None:
    """Writes the encoder's weights into the folder of a store being built."""
    with (folder / WEIGHTS).open("wb") as file:  # given a path, torch's writer does not say that a disk is full
        torch.save({name: tensor.cpu() for name, tensor in encoder.state_dict().items()}, file)


def load_encoder(store: Store) -> ContextEncoder:
    """The encoder of a store, frozen, in evaluation mode; its sizes are read off its weights."""
    weights = torch.load(store.path / WEIGHTS, weights_only=True)
    context_dim, both = weights["linear.weight"].shape
    encoder = ContextEncoder(context_dim, both - context_dim)
    encoder.load_state_dict(weights)
    return encoder.requires_grad_(False).eval()
