"""Phase 2: attention and feed-forward layers learn on stored contexts, everything else frozen."""

import logging
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.attention import Selection
from ctxkv_lightning.lm.output import Asked
from ctxkv_lightning.lm.perplexity import Perplexity
from ctxkv_lightning.lm.recurrent import linear_rate
from ctxkv_lightning.lm.rivals import ModelName, build_model
from ctxkv_lightning.windows import Windows

log = logging.getLogger(__name__)

MONITOR = "val/ppl"
"""What early stopping and the best checkpoint go by; logged by `ContextKVLMModule`."""


Schedule = Literal["constant", "linear"]

LAST_RATE = 0.02
"""Of a linear schedule, at its end."""

LOOK_EVERY = 16
"""Steps between two looks at whether the loss is still finite, where looking stalls the device."""

SAME = 5e-3
"""How far frozen weights may be from those of the data, as a part of these: rounding to bf16 is less than half."""


def alike(weights: Tensor, stored: Tensor) -> bool:
    """Whether frozen weights are the stored ones, but for rounding."""
    return weights.shape == stored.shape and bool((weights.cpu().float() - stored).norm() <= SAME * stored.norm())


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
        window_tokens: int = 104,
        recipe: dict[str, Any] | None = None,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        layers: int = 1,
        local_window: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(
            model, vocab_size, embedding_dim, context_dim, heads, interval, max_contexts, ffn_dim, dropout, selection,
            window_tokens, recipe, layers, local_window,
        )  # fmt: skip
        self.starts_fresh = True
        self._loaded = False  # a checkpoint, whose frozen parts have not been looked at yet
        self._ppl_of = -1  # the epoch for which Lightning has `train/ppl`
        self._planned: float | None = None  # steps, as the checkpoint has it that training goes on from
        self.train_ppl, self.val_ppl, self.test_ppl = Perplexity(), Perplexity(), Perplexity()
        self.train_ppl.persistent(True)  # an epoch that is interrupted is summed up over all its steps
        # What is averaged is 0 or 1; looking for a NaN would make the host wait for a GPU.
        self.val_accuracy, self.test_accuracy = (MeanMetric(nan_strategy="disable") for _ in range(2))
        self.register_buffer("broken", torch.zeros((), dtype=torch.bool), persistent=False)

    def setup(self, stage: str) -> None:
        """Takes the frozen parts from the data module, and what training starts from unless there are weights."""
        if stage == "fit":
            self._ppl_of = -1
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.model.load_frozen(data.table, data.encoders())
            if self.model.recipe.ngram:
                self.model.load_counts(data.trigram())
            if self.starts_fresh:
                self.model.load_start(data.unigram_counts())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How many steps training is to have, which a linear schedule goes by."""
        checkpoint["planned_steps"] = self.trainer.estimated_stepping_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._planned, self._loaded = checkpoint.get("planned_steps"), True

    def on_train_start(self) -> None:
        """Raises UserError where a linear schedule would go on as another one, or on other contexts."""
        self._check_frozen()
        planned, asked = self._planned, self.trainer.estimated_stepping_batches
        goes_on = self.global_step > 0  # a checkpoint may also have been loaded to be looked at
        if goes_on and self.hparams["schedule"] == "linear" and planned not in (None, asked):
            raise UserError(
                f"the learning rate falls over {planned} steps, and would jump with {asked}: ask for as many epochs "
                "and batches as before, or start a new run"
            )

    def on_validation_start(self) -> None:
        """Raises UserError where a checkpoint would be asked about contexts that mean nothing to it; so do tests."""
        self._check_frozen()

    def on_test_start(self) -> None:
        self._check_frozen()

    def _check_frozen(self) -> None:
        """Once for a checkpoint: its table and encoders may be others than made the stores that are read now."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self._loaded or data is None:
            return
        self._loaded = False
        pairs = [("embedding table", self.model.embedding.weight, data.table)]
        for own, stored in zip(self.model.encoders(), data.encoders(), strict=True):
            pairs += [("encoder", a, b) for a, b in zip(own.parameters(), stored.parameters(), strict=True)]
        for name, mine, its in pairs:
            if not alike(mine, its):
                raise UserError(
                    f"the checkpoint's {name} is not the one that the cache now has contexts of (they were made anew, "
                    "on another machine or by other software): bring back the cache that it was trained with, name it "
                    "by cache_dir=, or start a new run"
                )

    def training_step(self, batch: Windows, batch_index: int) -> Tensor:
        hidden, asked = self._hidden(batch)
        total, nll = self.model.loss(hidden, asked)
        # Ranks get different numbers of tokens, and their gradients are averaged.
        tokens = batch.total / self.trainer.world_size
        loss, said = total / tokens, nll.sum() / tokens
        self._refuse_broken_updates(loss.detach(), batch_index)
        self.train_ppl.update(nll)
        if self._ppl_of != self.current_epoch:  # once: Lightning keeps the metric and sums it up when the epoch ends
            self._ppl_of = self.current_epoch
            self.log("train/ppl", self.train_ppl, on_step=False, on_epoch=True, logger=False)
        if self._tells():
            self.log("train/loss", said, on_step=True, on_epoch=False, sync_dist=True)
            self.log("ppl", said.exp(), on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return loss

    def _tells(self) -> bool:
        """Whether this step is logged: to hand Lightning a value costs the host as much as a good part of the step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.trainer.accumulate_grad_batches > 1 or (every > 0 and (self.global_step + 1) % every == 0)

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

    def configure_optimizers(self) -> Any:
        """AdamW; what is no matrix does not decay where there is a schedule, which is one step long at least."""
        at_first = self.model.learnt_at_first()
        known = {id(p) for p in at_first}
        groups = self._groups([p for p in self.parameters() if p.requires_grad and id(p) not in known])
        first = self._groups(at_first) if at_first else []
        optimizer = torch.optim.AdamW(groups + first, lr=self.hparams["lr"], fused=True)
        if self.hparams["schedule"] == "constant" and not first:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        self.trainer.fit_loop.setup_data()  # or the batches of an epoch are not known yet where `max_steps` is given
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        rates = [lambda step: self._rate(step, steps)] * len(groups)
        rates += [lambda step: self._rate(step, steps) * (step < epoch)] * len(first)  # a rate of 0 stops decay too
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self, trained: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        """All decay, as published; on a schedule neither vectors do nor the embedding, whose rare rows would shrink."""
        decay = self.hparams["weight_decay"]
        if self.hparams["schedule"] == "constant":
            return [{"params": trained, "weight_decay": decay}]
        table = self.model.table
        matrices = [p for p in trained if p.ndim > 1 and p is not table]
        others = [p for p in trained if p.ndim < 2 or p is table]
        return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def _rate(self, step: int, steps: float) -> float:
        """The learning rate of a step, as a part of `lr`: up over the warm-up, then down to `LAST_RATE` in a line."""
        if self.hparams["schedule"] == "constant":
            return 1.0
        return linear_rate(step, steps, self.hparams["warmup_steps"], LAST_RATE)

    def _hidden(self, batch: Windows) -> tuple[Tensor, Asked]:
        """Hidden states (B, T, D), and what the loss reads besides."""
        T, memory = batch.embeddings.shape[1], self.model.dropped(batch.memory)
        hidden = self.model.states(batch.tokens, memory, T, batch.first, batch.embeddings)
        return hidden, Asked(memory, batch.tokens, batch.targets, batch.counted, batch.first, batch.ngram)

    def _score(self, batch: Windows) -> tuple[Tensor, Tensor]:
        """Losses (n,) in nats and hits (n,) of the positions that count."""
        hidden, asked = self._hidden(batch)
        nll, hits = self.model.score(hidden, asked)
        return nll, hits.float()
