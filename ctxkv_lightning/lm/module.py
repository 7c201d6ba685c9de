"""Phase 2: attention and feed-forward layers learn on stored contexts, everything else frozen."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from ctxkv_lightning.datamodule import Windows
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.attention import Selection
from ctxkv_lightning.lm.head import frozen_cross_entropy, score
from ctxkv_lightning.lm.perplexity import Perplexity
from ctxkv_lightning.lm.rivals import ModelName, build_model

log = logging.getLogger(__name__)

MONITOR = "val/ppl"
"""What early stopping and the best checkpoint go by; logged by `ContextKVLMModule`."""


LOOK_EVERY = 16
"""Steps between two looks at whether the loss is still finite, where looking stalls the device."""


class ContextKVLMModule(L.LightningModule):
    """Trains a `ContextKVLM`, or a rival of it, with AdamW on the windows of a `ContextDataModule`.

    Logs `train/loss` by step and, by epoch, `train/ppl`, `val/ppl`, `val/accuracy`; tests log `test/ppl` and
    `test/accuracy`. Raises UserError before the update when the loss is not finite, and before
    anything is saved when the validation PPL is not. Embedding and encoder are taken from the data module.
    """

    broken: Tensor

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 768,
        context_dim: int = 256,
        heads: int = 8,
        interval: int | list[int] = 20,
        max_contexts: int = 32,
        ffn_dim: int = 3072,
        dropout: float = 0.1,
        lr: float = 0.001,
        weight_decay: float = 0.01,
        model: ModelName = "context_kv",
        selection: Selection = "strided",
        window_tokens: int = 103,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(
            model, vocab_size, embedding_dim, context_dim, heads, interval, max_contexts, ffn_dim, dropout, selection,
            window_tokens,
        )  # fmt: skip
        self.train_ppl, self.val_ppl, self.test_ppl = Perplexity(), Perplexity(), Perplexity()
        self.train_ppl.persistent(True)  # an epoch that is interrupted is summed up over all its steps
        self.val_accuracy, self.test_accuracy = MeanMetric(), MeanMetric()
        self.register_buffer("broken", torch.zeros((), dtype=torch.bool), persistent=False)

    def setup(self, stage: str) -> None:
        """Copies the frozen parts from the data module, once per fit; a checkpoint has them already."""
        if stage == "fit":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.model.load_frozen(data.table, data.encoders())

    def training_step(self, batch: Windows, batch_index: int) -> Tensor:
        nll = frozen_cross_entropy(self._hidden(batch), self.model.embedding.weight, batch.targets)
        # Ranks get different numbers of tokens, and their gradients are averaged.
        loss = nll.sum() / (batch.total / self.trainer.world_size)
        self._refuse_broken_updates(loss.detach(), batch_index)
        self.train_ppl.update(nll.detach())
        self.log("train/ppl", self.train_ppl, on_step=False, on_epoch=True, logger=False)
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False, sync_dist=True)
        self.log("ppl", loss.detach().exp(), on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Windows, batch_index: int) -> None:
        nll, hits = self._score(batch)
        self.val_ppl.update(nll)
        self.val_accuracy.update(hits)
        self.log(MONITOR, self.val_ppl, on_epoch=True, prog_bar=True)
        self.log("val/accuracy", self.val_accuracy, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        perplexity = self.val_ppl.compute()
        if not torch.isfinite(perplexity):
            raise UserError(
                f"the validation PPL of epoch {self.current_epoch + 1} is {perplexity.item()}: "
                f"lower train.lr (now {self.hparams['lr']:g}); the checkpoints saved so far are good"
            )

    def on_train_epoch_start(self) -> None:
        """Not called where an epoch goes on half-way: then the metric goes on too, from the checkpoint."""
        self.train_ppl.reset()

    def on_train_epoch_end(self) -> None:
        logged = self.trainer.callback_metrics
        if self.trainer.logger is not None:  # now, so that a checkpoint saved after this hook finds it logged
            row = {"epoch": self.current_epoch, "train/ppl": float(logged["train/ppl"])}
            self.trainer.logger.log_metrics(row, step=self.global_step - 1)
        log.info(
            f"  epoch {self.current_epoch + 1:2d}  train PPL {logged['train/ppl']:8.1f}  "
            f"val PPL {logged[MONITOR]:8.1f}  val accuracy {logged['val/accuracy']:5.1%}"
        )

    def test_step(self, batch: Windows, batch_index: int) -> None:
        nll, hits = self._score(batch)
        self.test_ppl.update(nll)
        self.test_accuracy.update(hits)
        self.log("test/ppl", self.test_ppl, on_epoch=True)
        self.log("test/accuracy", self.test_accuracy, on_epoch=True)

    def _refuse_broken_updates(self, loss: Tensor, batch_index: int) -> None:
        """From the first loss on that is not finite, lets the optimizer skip its updates; raises when it looks.

        Looking makes the host wait for a GPU, so there it looks now and then; nothing is lost, for the fused
        optimizer reads `found_inf` on the device. (In fp16, Lightning's gradient scaler does the same.)
        """
        self.broken |= self.trainer.strategy.reduce((~loss.isfinite()).float(), reduce_op="max") > 0
        if self.trainer.precision != "16-mixed":
            self.optimizers(use_pl_optimizer=False).found_inf = self.broken.float()  # type: ignore[union-attr]
        if self._looks(batch_index) and self.broken:
            raise UserError(
                f"the loss became {loss.item()} at step {batch_index + 1} of epoch {self.current_epoch + 1}, before "
                f"the update: lower train.lr (now {self.hparams['lr']:g}) or set trainer.precision=32-true"
            )

    def _looks(self, batch_index: int) -> bool:
        return self.device.type == "cpu" or batch_index % LOOK_EVERY == 0 or self.trainer.is_last_batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"], fused=True)

    def _hidden(self, batch: Windows) -> Tensor:
        """Hidden states (n, D) of the positions that count."""
        hidden = self.model(batch.embeddings, batch.memory, batch.first).flatten(0, 1)
        return hidden if batch.counted is None else hidden[batch.counted]

    def _score(self, batch: Windows) -> tuple[Tensor, Tensor]:
        """Losses (n,) in nats and hits (n,) of the positions that count."""
        nll, hits = score(self._hidden(batch), self.model.embedding.weight, batch.targets)
        return nll, hits.float()
