"""Phase 1, its second part: the encoder learns to predict, as a recurrent language model does.

    p(x_{t+1} | c_t) = softmax(E (W dropout(c_t) + b) / √D + b')

by truncated back-propagation through time (Williams & Peng, 1990): the training stream lies in rows side by side,
which are read a few tokens at a time; contexts are carried on, their gradient is not. E are the normalised embeddings,
frozen; W, b and b' are thrown away in the end. Of the weights W_c on the last context, a share may be left out at
random, the same ones throughout a batch (the weight-dropped recurrence of Merity, Keskar & Socher, 2018). What stays
is the whole encoder: its contexts still depend on nothing but the tokens before them, so they are solved exactly and
stored once, as those of an encoder that OACD alone has trained.
"""

import logging
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.oacd import effective_rank_of, singular_values
from ctxkv_lightning.context.pretrain import scratch
from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.head import mixed_cross_entropy

log = logging.getLogger(__name__)

RECIPE = {
    "lr": 0.002,
    "weight_decay": 0.1,
    "dropout": 0.3,
    "warmup_steps": 20,
    "last_rate": 0.02,
    "clip_norm": 1.0,
    "weight_dropout": 0.0,
}
"""All that decides what is learnt, but for the text and how often it is read. `weight_dropout` is the share of
recurrent weights left out of each batch. The gradient is clipped, for through many steps of a recurrence it may
explode (Pascanu, Mikolov & Bengio, 2013)."""


class RecurrentLMModule(L.LightningModule):
    """Trains a `ContextEncoder` on the `Rows` of a `ContextDataModule`, with AdamW and a linear schedule.

    Logs `pretrain/lm_ppl` once per epoch, and keeps it in `history`. `counts` (V,) are those of the training tokens,
    which b' starts from; `recipe` is what differs from `RECIPE`. Raises UserError where the loss of an epoch is not
    finite.
    """

    table: Tensor

    def __init__(self, encoder: ContextEncoder, table: Tensor, counts: Tensor, **recipe: float) -> None:
        super().__init__()
        self.recipe = {**RECIPE, **recipe}
        self.encoder = encoder.requires_grad_(True).train()
        self.register_buffer("table", table, persistent=False)
        self.projection = nn.Linear(encoder.context_dim, table.shape[1])
        smoothed = counts + 0.1
        self.bias = nn.Parameter((smoothed / smoothed.sum()).log())
        self.history: list[dict[str, float]] = []
        self._state = torch.empty(0)
        self._total, self._count, self._started = torch.zeros(()), 0, 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is carried from step to step: contexts, the sum of the epoch's losses, the time that it took so far."""
        spent = time.perf_counter() - self._started
        checkpoint["carried"] = self.history, self._state, self._total, self._count, spent

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history, self._state, self._total, self._count, spent = checkpoint["carried"]
        self._started = time.perf_counter() - spent

    def on_train_epoch_start(self) -> None:
        """Not called where an epoch goes on half-way: then all of this comes from the checkpoint."""
        self._total, self._count = torch.zeros((), device=self.device), 0
        self._started = time.perf_counter()

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        state = self.encoder.initial(len(batch.tokens)) if batch_index == 0 else self._state
        total, nll, state = self.losses(batch, state.to(self.device))
        self._state = state.detach()
        self._total = self._total.to(self.device) + nll.sum()  # a checkpoint's may be on the CPU
        self._count += nll.numel()
        return total / nll.numel()

    def losses(self, batch: Any, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss in nats, its parts (B·n,) row by row, without a gradient, and the last contexts (B, C).

        `state` (B, C) are the contexts before the batch.
        """
        dropout, contexts = self.recipe["dropout"], []
        weight = F.dropout(self.encoder.recurrent_weight, self.recipe["weight_dropout"], self.training)
        with torch.autocast(self.device.type, enabled=False):  # a recurrence would add up what bf16 rounds off
            drives = self.encoder.drive(F.dropout(self.table[batch.tokens], dropout, self.training))
            for drive in drives.unbind(1):
                state = self.encoder.advance(state, drive, weight)
                contexts.append(state)
        hidden = F.dropout(torch.stack(contexts, dim=1), dropout, self.training).flatten(0, 1)
        wanted = self.projection(hidden) * self.table.shape[1] ** -0.5
        silent = torch.zeros(len(hidden), device=hidden.device)  # no other voice has a share
        total, nll = mixed_cross_entropy(wanted, self.table, self.bias, batch.targets.flatten(), silent, silent)
        return total, nll, state

    def on_train_epoch_end(self) -> None:
        perplexity = float((self._total / self._count).exp())
        if not perplexity < float("inf"):
            raise UserError(
                f"the encoder's perplexity became {perplexity} in epoch {self.current_epoch + 1} of its training as a "
                "language model: set pretrain.lm_epochs to 0, or try another seed"
            )
        if self.trainer.logger is not None:  # now, so that a checkpoint saved after this hook finds it logged
            row = {"epoch": self.current_epoch, "pretrain/lm_ppl": perplexity}
            self.trainer.logger.log_metrics(row, step=self.global_step - 1)
        seconds = time.perf_counter() - self._started
        self.history.append({"epoch": self.current_epoch + 1, "train_ppl": perplexity, "seconds": seconds})
        log.info(f"  encoder epoch {self.current_epoch + 1:2d}  train PPL {perplexity:8.1f}  {seconds:.1f} s")

    def summary(self, tokens: Tensor, tolerance: float) -> dict[str, Any]:
        """What training reached, as JSON: its history, and the spectrum of the exact contexts of `tokens` (N,)."""
        contexts = scratch(len(tokens), self.encoder.context_dim, self.table.device)
        solve_contexts(self.encoder, self.table, tolerance, ids=tokens.to(self.table.device), out=contexts)
        singular = singular_values(contexts.cpu())
        return {
            "effective_rank": effective_rank_of(singular),
            "singular_values": singular.tolist(),
            "lm_history": self.history,
        }

    def configure_optimizers(self) -> Any:
        learnt = [*self.encoder.parameters(), *self.projection.parameters()]
        groups: list[dict[str, Any]] = [{"params": learnt}, {"params": [self.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.recipe["lr"], weight_decay=self.recipe["weight_decay"])
        steps = self.trainer.estimated_stepping_batches
        warmup, last = self.recipe["warmup_steps"], self.recipe["last_rate"]
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_rate(step, steps, warmup, last))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def linear_rate(step: int, steps: float, warmup_steps: float, last: float) -> float:
    """The learning rate of a step, as a part of the highest: up over the warm-up, then down to `last` in a line."""
    rising = min(1.0, (step + 1) / max(1, warmup_steps))
    return rising * max(last, 1 - step / max(1, steps))
