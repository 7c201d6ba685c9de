"""Objects from the configuration: token streams, embedding table, data module, model, footing.

What takes time leaves a store, so that another run that begins alike starts where the two part.
"""

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctxkv_lightning.config import Config, RecipeConfig
from ctxkv_lightning.datamodule import COUNTED, SPLITS, ContextDataModule, counted_tokens
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.recipe import Recipe
from ctxkv_lightning.run.callbacks import log
from ctxkv_lightning.store import Store, create_array, get_or_build
from ctxkv_lightning.text import conversations, embedding, mqar, ngram, tokenizer
from ctxkv_lightning.text.corpus import SEPARATOR, Corpus, Document, pydocs_state, read_pydocs, split
from ctxkv_lightning.text.files import read_files
from ctxkv_lightning.windows import WINDOW

ENCODERS: dict[str, tuple[tuple[int, int], ...]] = {
    "context_kv": ((0, 1),),
    "recurrence": ((0, 1),),
    "cascade": ((0, 2), (1, 2)),
    "transformer": (),
    "sliding_window": (),
}
"""The part of the training text, as (number, of how many), that each encoder of a model is trained on."""


def encoder_parts(config: Config) -> tuple[tuple[int, int], ...]:
    """As `ENCODERS`; who points at contexts, or reads the current one, has an encoder whatever the model."""
    recipe = Recipe(**(recipe_of(config) or {}))
    return ENCODERS[config.model.name] or (((0, 1),) if recipe.reads_contexts else ())


class Text(NamedTuple):
    """What the text stage hands on."""

    documents: dict[str, tuple[Document, ...]]  # by split
    tokens: Store
    vocab_size: int
    encoding: Any


def prepare_text(config: Config) -> Text:
    """Documents to token streams."""
    corpus = read_corpus(config)
    chosen = {"train": corpus.first(config.samples), "validation": corpus.validation, "test": corpus.test}
    encoding = build_encoding(config, corpus)
    digests = {name: digest_of(part) for name, part in chosen.items()}
    between = {**dict.fromkeys(chosen, SEPARATOR), "train": corpus.train_separator}
    key = {"documents": digests, "between": between, "encoding": tokenizer.fingerprint(encoding)}
    task = config.data.mqar if config.data.source == "mqar" else None
    if task is not None:
        key["counted"] = {"mqar": asdict(task)}

    def build(folder: Path) -> None:
        for name, part in chosen.items():
            ids = tokenizer.encode_documents(encoding, [document.text for document in part], between[name])
            create_array(folder, name, ids.shape, np.int32)[:] = ids
            if task is not None:
                create_array(folder, COUNTED.format(name), ids.shape, np.bool_)[:] = mqar.answers(task, ids)

    tokens = get_or_build(config.cache_dir, "tokens", key, build)
    sizes = {name: len(tokens.array(name)) for name in SPLITS}
    for name, size in sizes.items():
        if size < 2:
            raise UserError(f"the {name} text has {size} tokens and needs at least 2: add text")
    spans = config.model.name == "sliding_window" and config.model.window_tokens is None  # what contexts would take
    _check_windows(config, sizes["train"], ["max_contexts"] if spans else [])
    if spans or "interval" not in config.unread:
        _check_intervals(config, sizes["train"])
    log.info(
        f"text {len(chosen['train']):,} documents, {sizes['train']:,} training tokens, vocabulary "
        f"{encoding.n_vocab:,}{reused(tokens)}"
    )
    return Text(chosen, tokens, encoding.n_vocab, encoding)


def _check_windows(config: Config, tokens: int, too: Sequence[str]) -> None:
    """Raises UserError where a position would read more contexts or tokens than there are; `too` are more keys."""
    for key in ("max_contexts", "model.window_tokens", "model.local_window"):
        value = operator.attrgetter(key)(config)
        if (key in too or key not in config.unread) and value is not None and value > tokens:
            raise UserError(f"{key}={value} must be at most the {tokens:,} training tokens")


def _check_intervals(config: Config, tokens: int) -> None:
    """Raises UserError where so many training tokens are too few for the intervals."""
    if max(config.intervals) >= tokens:
        raise UserError(f"interval={config.interval} must be below the {tokens:,} training tokens")
    period = math.lcm(*config.intervals)
    if config.selection == "grid" and period >= tokens:
        raise UserError(
            f"interval={config.interval} with selection=grid repeats every {period:,} tokens, and there are "
            f"{tokens:,} to train on: choose intervals with a smaller common multiple"
        )


def read_corpus(config: Config) -> Corpus:
    """The documents of all three splits; to train, at least as many as `samples` asks for."""
    data, records = config.data, (config.data.validation, config.data.test, config.data.errors)
    match data.source:
        case "pydocs":
            return split(build_pydocs(config), data.heldout_bytes)
        case "text":
            return split(read_files(data.files, data.errors), data.heldout_bytes)
        case "mqar":
            assert config.samples is not None
            return mqar.read_mqar(data.mqar, config.seed, config.samples)
        case "hub":
            return conversations.from_hub(data.dataset, data.split, config.samples, *records, config.cache_dir)
        case _:
            learnt = config.tokenizer.source == "bpe"  # from all training documents, whatever `samples` is
            return conversations.from_files(data.files, None if learnt else config.samples, *records)


def build_pydocs(config: Config) -> list[Document]:
    """The documentation of this Python, parsed once for each state of it; every time where the cache is read-only."""

    def build(folder: Path) -> None:
        (folder / "documents.json").write_text(json.dumps(read_pydocs()))

    try:
        store = get_or_build(config.cache_dir, "pydocs", pydocs_state(), build)
    except UserError:  # a cache with all else that a run needs is of use without it
        return read_pydocs()
    return [Document(*pair) for pair in json.loads((store.path / "documents.json").read_text())]


def build_encoding(config: Config, corpus: Corpus) -> Any:
    """The tokenizer; a learnt one sees every training document, so that all `samples` count the same tokens."""
    if config.tokenizer.source == "tiktoken":
        return tokenizer.load_encoding(config.tokenizer.name)
    if config.tokenizer.source == "symbols":
        return mqar.symbol_encoding(config.data.mqar)
    key = {"documents": digest_of(corpus.train), "vocab_size": config.tokenizer.vocab_size}

    def build(folder: Path) -> None:
        learnt = tokenizer.learn_bpe((document.text for document in corpus.train), config.tokenizer.vocab_size)
        tokenizer.save_ranks(learnt, folder / "ranks.tiktoken")

    return tokenizer.load_ranks(get_or_build(config.cache_dir, "bpe", key, build).path / "ranks.tiktoken")


def build_embedding(config: Config, text: Text) -> Store:
    """The frozen table E (V, D)."""
    options = asdict(config.embedding)
    key = {"tokens": text.tokens.content, "vocab_size": text.vocab_size, "seed": config.seed, **options}
    if config.embedding.source == "gpt2":
        gpt2 = embedding.gpt2_table(config.embedding.file)
        key = {"gpt2": hashlib.sha256(gpt2.numpy().data).hexdigest()}

    def build(folder: Path) -> None:
        match config.embedding.source:
            case "gpt2":
                table = gpt2
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
    longest = max(len(text.tokens.array(split)) for split in SPLITS)
    return ContextDataModule(
        tokens=str(text.tokens.path),
        embedding=str(table.path),
        memory="contexts" if encoder_parts(config) else "embeddings",
        cache_dir=config.cache_dir,
        history=min(history, -(-longest // alignment) * alignment),  # there is no more of it
        alignment=alignment,
        batch_tokens=config.train.batch_tokens,
        pretrain_batch_tokens=config.pretrain.batch_tokens,
        embeddings=config.embeddings,  # type: ignore[arg-type]
        tolerance=config.contexts.tolerance,
        contexts_dtype=config.contexts.dtype,  # type: ignore[arg-type]
        seed=config.seed,
        processes=config.trainer.devices * config.trainer.num_nodes,
        ngram=config.recipe.ngram,
    )


def reach(config: Config) -> tuple[int, int]:
    """Positions of history that the model reads before a window, and what windows are aligned to."""
    voices = Recipe(**(recipe_of(config) or {})).history
    match config.model.name:
        case "context_kv":
            alignment = math.lcm(*config.intervals) if config.selection == "grid" else 1
            lead = -(-config.local_reach // alignment) * alignment
            return max(voices, (config.max_contexts - 1) * max(config.intervals) + lead), alignment
        case "sliding_window":
            return max(voices, config.model.layers * (config.window_tokens - 1)), 1
        case "transformer":
            return max(voices, WINDOW), 1
        case _:
            return voices, 1


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
        recipe=recipe_of(config),
        schedule=config.train.schedule,  # type: ignore[arg-type]
        warmup_steps=config.train.warmup_steps,
        layers=config.model.layers,
        local_window=config.model.local_window,
    )


def recipe_of(config: Config) -> dict[str, Any] | None:
    """What the recipe's settings are, where they are not the published ones; None where all are."""
    plain, chosen = asdict(RecipeConfig()), asdict(config.recipe)
    return {name: value for name, value in chosen.items() if value != plain[name]} or None


def build_footing(config: Config, text: Text) -> dict[str, float]:
    """The perplexities of the counting models on the same tokens."""

    def build(folder: Path) -> dict[str, float]:
        train_ids, validation_ids, test_ids = (text.tokens.array(name).astype(np.int64) for name in SPLITS)
        counted = {name: counted_tokens(text.tokens, name) for name in SPLITS}
        return ngram.footing(train_ids, validation_ids, test_ids, text.vocab_size, counted=counted)

    key = {"tokens": text.tokens.content, "vocab_size": text.vocab_size}
    return get_or_build(config.cache_dir, "footing", key, build).facts


def digest_of(documents: tuple[Document, ...]) -> str:
    return hashlib.sha256(json.dumps([document.text for document in documents]).encode()).hexdigest()


def reused(store: Store) -> str:
    return " (reused)" if store.reused else ""
