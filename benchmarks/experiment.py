"""The default experiment taken apart: its data prepared once, then Phase 2 by our module or by the published method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from benchmarks.published import PublishedLM, Split, published_contexts, train_published
from ctxkv_lightning import phase_one, pipeline
from ctxkv_lightning.config import (
    Config,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
    TrainConfig,
)
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.lm.module import MONITOR
from ctxkv_lightning.run.callbacks import History, Stages
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.trainer import make_trainer

QUICK = Config(
    interval=5,
    heads=2,
    max_contexts=4,
    context_dim=16,
    samples=3,
    tokenizer=TokenizerConfig(vocab_size=300),
    embedding=EmbeddingConfig(dim=32),
    pretrain=PretrainConfig(max_iterations=2),
    model=ModelConfig(ffn_dim=64),
    train=TrainConfig(batch_tokens=2000, max_epochs=2),
    data=DataConfig(heldout_bytes=4_000),
)


def default(quick: bool) -> Config:
    """The default experiment, or a tiny one."""
    return QUICK if quick else Config()


class Prepared(NamedTuple):
    """Everything before Phase 2, built from nothing, with the seconds that each stage took."""

    config: Config
    run: RunFolder
    data: ContextDataModule
    vocab_size: int
    seconds: dict[str, float]


@contextmanager
def temporary_experiment(config: Config) -> Iterator[Prepared]:
    """An experiment, prepared in a folder that vanishes with the block."""
    with TemporaryDirectory(prefix="ctxkv-benchmark-") as root:
        yield prepare(replace(config, cache_dir=str(Path(root) / "cache")), Path(root) / "run")


def prepare(config: Config, folder: Path) -> Prepared:
    """Text to exact contexts."""
    stages = Stages()
    with stages("text"):
        text = pipeline.prepare_text(config)
    run = RunFolder.claim(folder)
    with stages("embedding"):
        data = pipeline.build_data(config, text, pipeline.build_embedding(config, text))
    with stages("pretrain"):
        encoder = phase_one.pretrain(config, run, data, stages)
    with stages("contexts"):
        data.use_encoders([str(encoder.path)])
        data.prepare_data()
        data.setup("fit")
    return Prepared(config, run, data, text.vocab_size, stages.seconds)


def our_run(
    prepared: Prepared, precision: str, max_epochs: int, target: float | None = None, label: str = ""
) -> dict[str, Any]:
    """Our Phase 2, with Lightning, logger and checkpoints; ends early once the validation PPL is below `target`."""
    config, data = prepared.config, prepared.data
    started = time.perf_counter()
    L.seed_everything(config.seed, verbose=False)
    columns = {"train_ppl": "train/ppl", "val_ppl": MONITOR, "val_accuracy": "val/accuracy"}
    history = History(columns, data.train_tokens - 1)
    stop = EarlyStopping(MONITOR, mode="min", patience=config.train.patience, stopping_threshold=target)
    best = ModelCheckpoint(
        prepared.run.checkpoints / (label or precision), filename="best", monitor=MONITOR, mode="min"
    )
    trainer = make_trainer(
        asdict(config.trainer),
        prepared.run,
        f"train-{label or precision}",
        steps=len(data.train_dataloader()),
        precision=precision,
        max_epochs=max_epochs,
        callbacks=[history, stop, best],
    )
    trainer.fit(pipeline.build_module(config, prepared.vocab_size), datamodule=data)
    return {"epochs": history.epochs, "seconds": time.perf_counter() - started, "precision": precision}


def published_run(prepared: Prepared, sweeps: int, budget: float, max_epochs: int) -> dict[str, Any]:
    """The published Phase 2 on the same data, table, encoder and seed, in fp32."""
    config, streams, encoder = prepared.config, prepared.data.streams, prepared.data.encoders()[0]
    started = time.perf_counter()
    splits = []
    for name in ("train", "validation"):
        plain = Split.of(streams[name])
        splits.append(plain._replace(contexts=published_contexts(encoder, plain.embeddings, sweeps)))
    seconds = time.perf_counter() - started
    errors = [
        float((split.contexts - streams[name].contexts[0]).abs().max())
        for split, name in zip(splits, ("train", "validation"), strict=True)
    ]
    torch.manual_seed(config.seed)
    model = PublishedLM(
        prepared.data.table.clone(),
        config.context_dim,
        config.heads,
        config.interval,
        config.max_contexts,
        config.model.ffn_dim,
        config.model.dropout,
    )
    train, validation = splits
    epochs = list(
        train_published(
            model,
            train,
            validation,
            batch=config.train.batch_tokens,
            patience=config.train.patience,
            max_epochs=max_epochs,
            budget=budget,
            seed=config.seed,
        )
    )
    best = min(epochs, key=lambda row: row["val_ppl"])
    return {
        "epochs": epochs,
        "best_epoch": best["epoch"],
        "best_val_ppl": best["val_ppl"],
        "stopped_by": _stopped_by(epochs, config.train.patience, max_epochs),
        "sweeps": sweeps,
        "context_error": max(errors),
        "context_seconds": seconds,
    }


def _stopped_by(epochs: list[dict[str, float]], patience: int, max_epochs: int) -> str:
    best = min(range(len(epochs)), key=lambda i: epochs[i]["val_ppl"])
    if len(epochs) - 1 - best >= patience:
        return "patience"
    return "max_epochs" if len(epochs) == max_epochs else "budget"
