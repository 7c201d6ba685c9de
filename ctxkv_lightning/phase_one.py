"""Phase 1, from the configuration: the encoder disperses its contexts (OACD), then, if asked, learns to predict.

Each part leaves a store, so that runs which ask for the same share it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from ctxkv_lightning.build import reused
from ctxkv_lightning.config import Config
from ctxkv_lightning.context.pretrain import OACDPretrainModule, load_encoder, save_encoder
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.recurrent import RECIPE, RecurrentLMModule
from ctxkv_lightning.run.callbacks import Stages, log
from ctxkv_lightning.run.checkpoint import RandomState, VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.interruption import Safeguard, stopping
from ctxkv_lightning.run.machine import describe_machine, resolve_precision
from ctxkv_lightning.run.saved import steps_done
from ctxkv_lightning.run.trainer import make_trainer
from ctxkv_lightning.store import Store, get_or_build
from ctxkv_lightning.windows import RowLoader


def pretrain(
    config: Config, run: RunFolder, data: ContextDataModule, stages: Stages, part: int = 0, parts: int = 1
) -> Store:
    """Phase 1 on one of `parts` equal parts of the training text: the trained encoder's store, its summary as facts."""
    options = asdict(config.pretrain)
    lm_epochs = options.pop("lm_epochs")
    del options["lm_weight_dropout"]
    # Its own: resumed with an empty cache, a run builds other parts again than the one it was interrupted in.
    phase = "pretrain" if parts == 1 else f"pretrain-{part + 1}"
    start, stop = (data.train_tokens * edge // parts for edge in (part, part + 1))
    data.pretrain_on(slice(start, stop))
    key = {
        "tokens": data.token_store.content,
        "embedding": data.embedding_store.content,
        "context_dim": config.context_dim,
        "seed": config.seed,
        "rows": [start, stop],
        **options,
    }

    def build(folder: Path) -> dict[str, Any]:
        L.seed_everything(config.seed, verbose=False)
        module = OACDPretrainModule(
            config.context_dim,
            data.table.shape[1],
            lr=config.pretrain.lr,
            noise=config.pretrain.noise,
            centroid_weight=config.pretrain.centroid_weight,
            move_threshold=config.pretrain.move_threshold,
            target_rate=config.pretrain.target_rate,
            plateau_rate=config.pretrain.plateau_rate,
        )
        machine = fit(
            module, config, run, data, phase, [stages],
            between="epochs",
            steps=1,
            precision="32-true",
            max_epochs=options["max_iterations"],
            accumulate_grad_batches=len(data.train_dataloader()),
            gradient_clip_val=options["clip_norm"],
        )  # fmt: skip
        save_encoder(module.encoder, folder)
        return {**module.summary(), "machine": machine}

    store = get_or_build(config.cache_dir, "encoder", key, build)
    forget(run, phase)
    facts = store.facts
    log.info(
        f"Phase 1 {facts['iterations']} iterations, {facts['convergence_rate']:.1%} converged, "
        f"effective rank {facts['effective_rank']:.1%}{reused(store)}"
    )
    return pretrain_as_lm(config, run, data, stages, store, f"{phase}-lm") if lm_epochs else store


def pretrain_as_lm(
    config: Config, run: RunFolder, data: ContextDataModule, stages: Stages, oacd: Store, phase: str
) -> Store:
    """Phase 1's second part, on the same text, from the encoder of the first: a store with the facts of both.

    It is trained in the run's own precision. Neither that nor the kind of device is part of the key, so that a run that
    goes on elsewhere keeps its encoder: who shares a cache shares encoders, and the facts say what made them. Raises
    UserError where the text is one token.
    """
    data.pretrain_on(data.pretrain_rows, in_rows=True)
    ids, tolerance, epochs = data.pretrain_ids(), config.contexts.tolerance, config.pretrain.lm_epochs
    if len(ids) < 2:
        raise UserError("pretrain.lm_epochs needs at least 2 tokens for each encoder: add text or set it to 0")
    rows = {"rows": RowLoader.ROWS, "steps": RowLoader.STEPS}
    of = {"oacd": oacd.content, "of": oacd.manifest["key"]}
    recipe = {**RECIPE, "weight_dropout": config.pretrain.lm_weight_dropout}
    named = {name: value for name, value in recipe.items() if value or name != "weight_dropout"}  # which came later
    key = {**of, "lm_epochs": epochs, "recipe": named, "tolerance": tolerance, **rows}

    def build(folder: Path) -> dict[str, Any]:
        L.seed_everything(config.seed, verbose=False)
        table = data.normalised_table
        counts = torch.bincount(ids, minlength=len(table)).float()
        module = RecurrentLMModule(load_encoder(oacd), table, counts, **recipe)
        machine = fit(
            module, config, run, data, phase, [stages],
            between="steps",
            steps=len(data.train_dataloader()),
            precision=resolve_precision(config.trainer.precision, config.trainer.accelerator),
            max_epochs=epochs,
            gradient_clip_val=recipe["clip_norm"],
        )  # fmt: skip
        save_encoder(module.encoder, folder)
        learnt = module.summary(ids, tolerance)
        seconds = oacd.facts["seconds"] + sum(row["seconds"] for row in learnt["lm_history"])
        return {**oacd.facts, **learnt, "seconds": seconds, "machine": machine}

    store = get_or_build(config.cache_dir, "encoder", key, build)
    forget(run, phase)
    facts = store.facts
    log.info(
        f"Phase 1 as a language model, {epochs} epochs: train PPL {facts['lm_history'][-1]['train_ppl']:.1f}, "
        f"effective rank {facts['effective_rank']:.1%}{reused(store)}"
    )
    return store


def fit(
    module: L.LightningModule,
    config: Config,
    run: RunFolder,
    data: ContextDataModule,
    phase: str,
    callbacks: list[L.Callback],
    between: Literal["steps", "epochs"],
    **options: Any,
) -> dict[str, str | int]:
    """Trains an encoder's module, in one process and from where it was interrupted, if it was; see `Safeguard`.

    On what, in which precision: `describe_machine` of it.
    """
    last = run.pretrain_checkpoint(phase)
    checkpoint = last if last.exists() else None
    trainer = make_trainer(
        {**asdict(config.trainer), "devices": 1, "num_nodes": 1, "strategy": "auto"},  # the others wait for the store
        run,
        phase,
        limit_val_batches=0,
        kept_steps=steps_done(checkpoint),
        callbacks=[*callbacks, RandomState(), Safeguard(last, between)],
        **options,
    )
    with stopping():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return describe_machine(str(trainer.strategy.root_device), str(trainer.precision))


def forget(run: RunFolder, phase: str) -> None:
    """Removes the checkpoint of a phase whose encoder is stored, and not before."""
    VerifiedCheckpointIO().remove_checkpoint(run.pretrain_checkpoint(phase))
