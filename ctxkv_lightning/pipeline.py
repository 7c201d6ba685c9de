"""The experiment, stage by stage: text, embedding, Phase 1, contexts, Phase 2, footing, report.

The only place that builds objects from the configuration. Each stage leaves a store, so that another run which
begins alike starts where the two part.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from rich.console import Console

from ctxkv_lightning.config import Config
from ctxkv_lightning.context.pretrain import CONVERGENCE, OACDPretrainModule, save_encoder
from ctxkv_lightning.datamodule import SPLITS, WINDOW, ContextDataModule
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import MONITOR, ContextKVLMModule
from ctxkv_lightning.metrics import (
    describe_attention,
    describe_contexts,
    describe_decode_state,
    describe_pretrain,
    describe_window,
)
from ctxkv_lightning.report.page import summary_table, write_report
from ctxkv_lightning.run.callbacks import History, Stages, announcing, log, logging_to
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.machine import (
    compile_pays,
    describe_machine,
    describe_versions,
    keep_freed_memory,
    resolve_precision,
)
from ctxkv_lightning.run.trainer import make_trainer
from ctxkv_lightning.store import Store, create_array, get_or_build
from ctxkv_lightning.text import embedding, ngram, tokenizer
from ctxkv_lightning.text.corpus import Corpus, Document, read_files, read_pydocs, split

ENCODERS: dict[str, tuple[tuple[int, int], ...]] = {
    "context_kv": ((0, 1),),
    "recurrence": ((0, 1),),
    "cascade": ((0, 2), (1, 2)),
    "transformer": (),
    "sliding_window": (),
}
"""The part of the training text, as (number, of how many), that each encoder of a model is trained on."""


class Text(NamedTuple):
    """What the text stage hands on."""

    documents: dict[str, tuple[Document, ...]]  # by split
    tokens: Store
    vocab_size: int


class Trained(NamedTuple):
    """What Phase 2 hands on."""

    module: ContextKVLMModule
    history: History
    stopped_early: bool
    scores: dict[str, float]  # of the best checkpoint, reloaded


def run_experiment(config: Config, folder: Path) -> float:
    """Runs the whole experiment into `folder`; the validation PPL of its best checkpoint.

    Raises UserError for a mistake in the input; the folder is claimed once the text has proved readable.
    """
    keep_freed_memory()
    stages = Stages()
    with announcing():
        with stages("text"):
            text = prepare_text(config)
        run = RunFolder.claim(folder)
        with logging_to(run.log):
            run.write_config(yaml.safe_dump(asdict(config), sort_keys=False))
            log.info(f"run folder {run.path}")
            metrics = run_stages(config, run, text, stages)
            run.write_metrics(metrics)
            with stages("report"):
                report = write_report(run)
            log.info(f"report {report}")
        Console().print(summary_table(metrics, report))
    return metrics["result"]["val_ppl"]


def run_stages(config: Config, run: RunFolder, text: Text, stages: Stages) -> dict[str, Any]:
    """Everything between the tokens and the report; the contents of metrics.json."""
    with stages("embedding"):
        table = build_embedding(config, text)
        data = build_data(config, text, table)
    with stages("pretrain"):
        encoders = [pretrain(config, run, data, half, halves) for half, halves in ENCODERS[config.model.name]]
    with stages("contexts"):
        data.use_encoders([str(encoder.path) for encoder in encoders])
        data.prepare_data()
        contexts = data.context_stores()
        for store in contexts:
            log.info(f"contexts exact to {store.facts['seam_error']:.1e} at every seam {_reused(store)}")
    with stages("train"):
        trained = train(config, run, data, text.vocab_size)
    with stages("footing"):
        footing = build_footing(config, text)
    return collect_metrics(config, text, data, encoders, contexts, trained, footing, stages)


def prepare_text(config: Config) -> Text:
    """Documents to token streams."""
    documents = read_pydocs() if config.data.source == "pydocs" else read_files(config.data.files, config.data.errors)
    corpus = split(documents, config.data.heldout_bytes)
    chosen = {"train": corpus.first(config.samples), "validation": corpus.validation, "test": corpus.test}
    encoding = build_encoding(config, corpus)
    digests = {name: _digest(part) for name, part in chosen.items()}
    key = {"documents": digests, "encoding": tokenizer.fingerprint(encoding)}

    def build(folder: Path) -> None:
        for name, part in chosen.items():
            ids = tokenizer.encode_documents(encoding, [document.text for document in part])
            create_array(folder, name, ids.shape, np.int32)[:] = ids

    tokens = get_or_build(config.cache_dir, "tokens", key, build)
    sizes = {name: len(tokens.array(name)) for name in SPLITS}
    for name, size in sizes.items():
        if size < 2:
            raise UserError(f"the {name} text has {size} tokens and needs at least 2: add text to data.files")
    if max(config.intervals) >= sizes["train"]:
        raise UserError(f"interval={config.interval} must be below the {sizes['train']:,} training tokens")
    log.info(
        f"text {len(chosen['train']):,} documents, {sizes['train']:,} training tokens, vocabulary "
        f"{encoding.n_vocab:,} {_reused(tokens)}"
    )
    return Text(chosen, tokens, encoding.n_vocab)


def build_encoding(config: Config, corpus: Corpus) -> Any:
    """The tokenizer; a learnt one sees every training document, so that all `samples` count the same tokens."""
    if config.tokenizer.source == "tiktoken":
        return tokenizer.load_encoding(config.tokenizer.name)
    key = {"documents": _digest(corpus.train), "vocab_size": config.tokenizer.vocab_size}

    def build(folder: Path) -> None:
        learnt = tokenizer.learn_bpe((document.text for document in corpus.train), config.tokenizer.vocab_size)
        tokenizer.save_ranks(learnt, folder / "ranks.tiktoken")

    return tokenizer.load_ranks(get_or_build(config.cache_dir, "bpe", key, build).path / "ranks.tiktoken")


def build_embedding(config: Config, text: Text) -> Store:
    """The frozen table E (V, D)."""
    options = asdict(config.embedding)
    key = {"tokens": text.tokens.content, "vocab_size": text.vocab_size, "seed": config.seed, **options}

    def build(folder: Path) -> None:
        match config.embedding.source:
            case "svd":
                ids = text.tokens.array("train").astype(np.int64)
                table = embedding.svd_table(ids, text.vocab_size, options["dim"], options["window"], config.seed)
            case "random":
                table = embedding.random_table(text.vocab_size, options["dim"], config.seed)
        create_array(folder, "table", tuple(table.shape), np.float32)[:] = table.numpy()

    return get_or_build(config.cache_dir, "embedding", key, build)


def build_data(config: Config, text: Text, table: Store) -> ContextDataModule:
    """The data module of both phases, still without an encoder."""
    history, alignment = reach(config)
    return ContextDataModule(
        tokens=str(text.tokens.path),
        embedding=str(table.path),
        memory="contexts" if ENCODERS[config.model.name] else "embeddings",
        cache_dir=config.cache_dir,
        history=history,
        alignment=alignment,
        batch_tokens=config.train.batch_tokens,
        pretrain_batch_tokens=config.pretrain.batch_tokens,
        embeddings=config.embeddings,  # type: ignore[arg-type]
        tolerance=config.contexts.tolerance,
        contexts_dtype=config.contexts.dtype,  # type: ignore[arg-type]
        seed=config.seed,
    )


def reach(config: Config) -> tuple[int, int]:
    """Positions of history that the model reads before a window, and what windows are aligned to."""
    match config.model.name:
        case "context_kv":
            on_grid = config.selection == "grid"
            return (config.max_contexts - 1) * max(config.intervals), math.lcm(*config.intervals) if on_grid else 1
        case "sliding_window":
            return config.window_tokens - 1, 1
        case "transformer":
            return WINDOW, 1
        case _:
            return 0, 1


def pretrain(config: Config, run: RunFolder, data: ContextDataModule, part: int = 0, parts: int = 1) -> Store:
    """Phase 1 on one of `parts` equal parts of the training text: the trained encoder's store, its summary as facts."""
    options = asdict(config.pretrain)
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
            *(
                options[name]
                for name in ("lr", "noise", "centroid_weight", "move_threshold", "target_rate", "plateau_rate")
            ),
        )
        target = EarlyStopping(
            CONVERGENCE,
            mode="max",
            patience=options["max_iterations"],
            stopping_threshold=options["target_rate"],
            check_on_train_epoch_end=True,
        )
        trainer = make_trainer(
            asdict(config.trainer),
            run,
            "pretrain" if parts == 1 else f"pretrain-{part + 1}",
            steps=1,
            precision="32-true",
            max_epochs=options["max_iterations"],
            accumulate_grad_batches=len(data.train_dataloader()),
            gradient_clip_val=options["clip_norm"],
            limit_val_batches=0,
            enable_checkpointing=False,
            callbacks=[target],
        )
        trainer.fit(module, datamodule=data)
        save_encoder(module.encoder, folder)
        return module.summary()

    store = get_or_build(config.cache_dir, "encoder", key, build)
    facts = store.facts
    log.info(
        f"Phase 1 {facts['iterations']} iterations, {facts['convergence_rate']:.1%} converged, "
        f"effective rank {facts['effective_rank']:.1%} {_reused(store)}"
    )
    return store


def train(config: Config, run: RunFolder, data: ContextDataModule, vocab_size: int) -> Trained:
    """Phase 2, then the best checkpoint reloaded: validated, and tested once."""
    L.seed_everything(config.seed, verbose=False)
    module = build_module(config, vocab_size)
    columns = {"train_ppl": "train/ppl", "val_ppl": MONITOR, "val_accuracy": "val/accuracy"}
    history = History(columns, data.train_tokens - 1)
    patience = EarlyStopping(MONITOR, mode="min", patience=config.train.patience, check_finite=True)
    best = ModelCheckpoint(
        run.checkpoints, filename="best", monitor=MONITOR, mode="min", save_last=True, enable_version_counter=False
    )
    data.setup("fit")
    steps = len(data.train_dataloader())
    trainer = make_trainer(
        asdict(config.trainer),
        run,
        "train",
        steps=steps,
        precision=resolve_precision(config.trainer.precision, config.trainer.accelerator),
        max_epochs=config.train.max_epochs,
        callbacks=[history, patience, best],
    )
    if compile_pays(config.train.compile, config.trainer.accelerator, steps * config.train.max_epochs):
        module.model.compile()
    trainer.fit(module, datamodule=data)
    trainer.logger = None  # the phase's metrics.csv ends with its last epoch
    scores: dict[str, float] = {}
    for evaluate in (trainer.validate, trainer.test):
        scores |= evaluate(module, datamodule=data, ckpt_path=best.best_model_path, weights_only=True, verbose=False)[0]
    return Trained(module, history, patience.stopped_epoch > 0, scores)


def build_module(config: Config, vocab_size: int) -> ContextKVLMModule:
    """Phase 2's module, untrained."""
    return ContextKVLMModule(
        vocab_size=vocab_size,
        embedding_dim=config.embedding.dim,
        context_dim=config.context_dim,
        heads=config.heads,
        interval=config.interval,
        max_contexts=config.max_contexts,
        ffn_dim=config.model.ffn_dim,
        dropout=config.model.dropout,
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
        model=config.model.name,  # type: ignore[arg-type]
        selection=config.selection,  # type: ignore[arg-type]
        window_tokens=config.window_tokens,
    )


def build_footing(config: Config, text: Text) -> dict[str, float]:
    """The perplexities of the counting models on the same tokens."""

    def build(folder: Path) -> dict[str, float]:
        train_ids, validation_ids, test_ids = (text.tokens.array(name).astype(np.int64) for name in SPLITS)
        return ngram.footing(train_ids, validation_ids, test_ids, text.vocab_size)

    key = {"tokens": text.tokens.content, "vocab_size": text.vocab_size}
    return get_or_build(config.cache_dir, "footing", key, build).facts


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
    epochs = trained.history.epochs
    best = min(epochs, key=lambda row: row["val_ppl"])
    val_ppl, precision = trained.scores[MONITOR], trained.module.trainer.precision
    return {
        "config": asdict(config),
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


def _digest(documents: tuple[Document, ...]) -> str:
    return hashlib.sha256(json.dumps([document.text for document in documents]).encode()).hexdigest()


def _reused(store: Store) -> str:
    return "(reused)" if store.reused else ""
