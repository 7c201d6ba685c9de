"""The experiment, stage by stage: text, embedding, Phase 1, contexts, Phase 2, footing, report.

Each stage leaves a store, so that another run which begins alike starts where the two part.
"""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from ctxkv_lightning.build import (
    Text,
    build_data,
    build_embedding,
    build_footing,
    build_module,
    encoder_parts,
    prepare_text,
    reused,
)
from ctxkv_lightning.config import Config
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.initial import borrowed_encoder, check_fit, check_source, kept_encoders, load_weights
from ctxkv_lightning.lm.module import MONITOR, ContextKVLMModule
from ctxkv_lightning.metrics import (
    describe_attention,
    describe_contexts,
    describe_decode_state,
    describe_ngram,
    describe_pretrain,
    describe_window,
)
from ctxkv_lightning.phase_one import pretrain
from ctxkv_lightning.report.page import summary_table, write_report
from ctxkv_lightning.resume import check_changes, check_checkpoints, check_epochs, check_identity, check_table
from ctxkv_lightning.run.callbacks import History, Stages, announcing, log, logging_to
from ctxkv_lightning.run.checkpoint import BestCheckpoint, Patience, RandomState
from ctxkv_lightning.run.folder import RunFolder, alone_in
from ctxkv_lightning.run.interruption import Safeguard, stopping
from ctxkv_lightning.run.machine import (
    compile_mode,
    compile_pays,
    describe_machine,
    describe_versions,
    keep_freed_memory,
    resolve_precision,
    solver_device,
)
from ctxkv_lightning.run.saved import newest_intact, sha256_of, steps_done
from ctxkv_lightning.run.trainer import check_hardware, make_trainer
from ctxkv_lightning.store import Store
from ctxkv_lightning.text.encoding import save_encoding

BEST = "best.ckpt"


class Trained(NamedTuple):
    """What Phase 2 hands on."""

    module: ContextKVLMModule
    epochs: list[dict[str, float]]
    stopped_early: bool
    scores: dict[str, float]  # of the best checkpoint, reloaded


def run_experiment(config: Config, folder: Path, resume: Literal["no", "strict", "forgiving"] = "no") -> float:
    """Runs the whole experiment into `folder`; the validation PPL of its best checkpoint.

    A new folder is claimed once hardware and text have proved to be there, and the weights of `init_from` to fit.
    With `resume`, the interrupted run in `folder` goes on: from its newest checkpoint, or, if that is damaged and
    `resume` is forgiving, from the newest intact one.
    Raises UserError for a mistake in the input, for a changed text, and for a configuration
    that differs in more than `HARMLESS` keys from the one the run began with.
    """
    keep_freed_memory()
    stages = Stages()
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        # Another process of this run, started by Lightning: the first one tells and writes.
        with stages("text"):
            text = prepare_text(config)
        return run_stages(config, RunFolder(folder), text, stages)["result"]["val_ppl"]
    with announcing(), ExitStack() as held:
        check_hardware(asdict(config.trainer))
        run = RunFolder(folder)
        if resume != "no":
            held.enter_context(alone_in(run))
            check_changes(config, run)
            check_checkpoints(run, resume)
            check_epochs(config, run)
        if config.init_from is not None and (resume == "no" or newest_intact(run.checkpoints)[0] is None):
            check_source(config)
        with stages("text"):
            text = prepare_text(config)
            if config.init_from is not None and resume == "no":
                check_fit(config, text)
        if resume == "no":
            run = RunFolder.claim(folder, again=config.resume == "auto")
            held.enter_context(alone_in(run))
        with logging_to(run.log):
            check_identity(run, text)
            if resume != "no":
                with stages("embedding"):
                    check_table(run, torch.from_numpy(build_embedding(config, text).array("table")))
            run.write_config(yaml.safe_dump(asdict(replace(config, resume=None)), sort_keys=False))
            save_encoding(text.encoding, run.tokenizer)
            log.info(f"run folder {run.path}" + ("" if resume == "no" else " (resumed)"))
            metrics = run_stages(config, run, text, stages)
            run.write_metrics({**metrics, "weights": sha256_of(run.checkpoints / BEST)})
            with stages("report"):
                report = write_report(run)
            log.info(f"report {report}")
        Console().print(summary_table(metrics))
    return metrics["result"]["val_ppl"]


def run_stages(config: Config, run: RunFolder, text: Text, stages: Stages) -> dict[str, Any]:
    """Everything between the tokens and the report; the contents of metrics.json."""
    with stages("embedding"):
        table = build_embedding(config, text)
        data = build_data(config, text, table)
        data.solve_on(solver_device(config.trainer.accelerator))
    with stages("pretrain"):
        parts = encoder_parts(config)
        encoders = kept_encoders(run, config.cache_dir, [part for part, _ in parts])
        if encoders:
            log.info(f"Phase 1 as {run.path} has it")
        elif config.init_from is None:
            encoders = [pretrain(config, run, data, stages, part, of) for part, of in parts]
        else:
            encoders = [borrowed_encoder(config.init_from, config.cache_dir, part) for part, _ in parts]
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            run.write_phase_one([encoder.facts for encoder in encoders])
    with stages("contexts"):
        data.use_encoders([str(encoder.path) for encoder in encoders])
        contexts = data.context_stores()
        data.prepare_data()
        for store in contexts:
            log.info(f"contexts exact to {store.facts['seam_error']:.1e} at every seam{reused(store)}")
    with stages("train"):
        trained = train(config, run, data, text.vocab_size, stages)
    with stages("footing"):
        footing = build_footing(config, text)
    return collect_metrics(config, text, data, encoders, contexts, trained, footing, stages)


def train(config: Config, run: RunFolder, data: ContextDataModule, vocab_size: int, stages: Stages) -> Trained:
    """Phase 2, then the best checkpoint reloaded: validated, and tested once."""
    L.seed_everything(config.seed, verbose=False)
    module, checkpoint = build_module(config, vocab_size), newest_intact(run.checkpoints)[0]
    if config.init_from is not None and checkpoint is None:
        load_weights(module, config.init_from, data.table)
    settings = callback_settings(config, run, data)
    history, patience = History(**settings["history"]), Patience(**settings["early_stopping"])
    best, safeguard = BestCheckpoint(**settings["checkpoint"]), Safeguard(**settings["safeguard"])
    data.setup("fit")
    steps = len(data.train_dataloader())
    hardware = {
        **asdict(config.trainer),
        "precision": resolve_precision(config.trainer.precision, config.trainer.accelerator),
        "max_epochs": config.train.max_epochs,
    }
    trainer = make_trainer(
        hardware,
        run,
        "train",
        steps=steps,
        kept_steps=steps_done(checkpoint),
        may_wait=[BEST],
        callbacks=[history, stages, RandomState(), patience, best, safeguard],
    )
    if trainer.is_global_zero:
        parts = {"model": dict(module.hparams), "data": dict(data.hparams), **settings}
        run.write_lightning(yaml.safe_dump(lightning_settings(config, trainer, hardware, parts), sort_keys=False))
    if compile_pays(config.train.compile, config.trainer.accelerator, steps * config.train.max_epochs):
        mode = compile_mode(config.trainer.accelerator)
        # On a CPU each shape by itself: the compiler of torch 2.13 fails on attention in fp32 when one may change.
        module.model.compile(mode=mode, dynamic=None if mode else False)
    with stopping():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        trainer.logger = None  # the phase's metrics.csv ends with its last epoch
        epochs, stopped = history.epochs, history.stopped  # before the best checkpoint brings back those of its time
        path = Path(str(best.dirpath)) / BEST  # the first process's: others may have been given folders of their own
        scores = trainer.validate(module, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)[0]
        # The weights are still those, but under SLURM Lightning would look for a checkpoint of its own requeueing.
        again = path if SLURMEnvironment.detect() else None
        tested = trainer.test(module, datamodule=data, ckpt_path=again, weights_only=True, verbose=False)[0]
        scores = {**scores, **tested}
    return Trained(module, epochs, stopped, scores)


def callback_settings(config: Config, run: RunFolder, data: ContextDataModule) -> dict[str, dict[str, Any]]:
    """The arguments of Phase 2's callbacks, plain, by their section in `lightning.yaml`."""
    return {
        "history": {
            "columns": {"train_ppl": "train/ppl", "val_ppl": MONITOR, "val_accuracy": "val/accuracy"},
            "tokens": data.train_tokens - 1,
        },
        "early_stopping": {
            "monitor": MONITOR,
            "mode": "min",
            "patience": config.train.patience,
            "check_finite": True,
        },
        "checkpoint": {
            "dirpath": str(run.checkpoints),
            "filename": BEST.removesuffix(".ckpt"),
            "monitor": MONITOR,
            "mode": "min",
            "enable_version_counter": False,
            "save_on_train_epoch_end": True,  # when the epoch is over, its row of the history included
        },
        "safeguard": {"checkpoint": str(run.last_checkpoint)},
    }


def lightning_settings(
    config: Config, trainer: L.Trainer, hardware: dict[str, Any], parts: dict[str, Any]
) -> dict[str, Any]:
    """The content of `lightning.yaml`: what LightningCLI needs to build this phase again."""
    trainer_settings = {
        **hardware,
        "enable_progress_bar": bool(hardware["enable_progress_bar"]),
        "log_every_n_steps": trainer.log_every_n_steps,  # type: ignore[attr-defined]
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "default_root_dir": trainer.default_root_dir,
    }
    logger = {"folder": trainer.default_root_dir, "phase": "train"}
    return {"seed_everything": config.seed, "trainer": trainer_settings, **parts, "csv": logger}


def collect_metrics(
    config: Config,
    text: Text,
    data: ContextDataModule,
    encoders: list[Store],
    contexts: list[Store],
    trained: Trained,
    footing: dict[str, float],
    stages: Stages,
) -> dict[str, Any]:
    """The contents of metrics.json (DESIGN §4)."""
    epochs = trained.epochs
    best = min(epochs, key=lambda row: row["val_ppl"])
    val_ppl, precision = trained.scores[MONITOR], trained.module.trainer.precision
    return {
        "config": asdict(replace(config, resume=None)),
        "versions": describe_versions(),
        "machine": describe_machine(str(trained.module.trainer.strategy.root_device), str(precision)),
        "data": {
            "train_tokens": data.train_tokens,
            "val_tokens": len(text.tokens.array("validation")),
            "test_tokens": len(text.tokens.array("test")),
            "train_documents": len(text.documents["train"]),
            "val_documents": len(text.documents["validation"]),
            "test_documents": len(text.documents["test"]),
            "vocab_size": text.vocab_size,
            "sha256": text.tokens.content,
        },
        "parameters": trained.module.model.parameter_counts(),
        "ngram": describe_ngram(trained.module.model),
        "window": describe_window(trained.module.model, data.train_tokens),
        "pretrain": describe_pretrain(encoders),
        "contexts": describe_contexts(contexts, data),
        "train": {"epochs": epochs, "best_epoch": best["epoch"], "stopped_early": trained.stopped_early},
        "result": {
            "val_ppl": val_ppl,
            "val_accuracy": trained.scores["val/accuracy"],
            "test_ppl": trained.scores["test/ppl"],
            "test_accuracy": trained.scores["test/accuracy"],
            "train_val_gap": val_ppl - best["train_ppl"],
        },
        "footing": footing,
        "memory": stages.memory,
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "attention": describe_attention(trained.module, data),
        "decode_state": describe_decode_state(trained.module.model),
    }
