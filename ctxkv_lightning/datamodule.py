"""Stored tensors to batches, for both phases.

Phase 1 reads contiguous runs of the training stream, or rows of it side by side. Once there is an encoder, the
contexts of all three streams are solved and stored, and Phase 2 reads *windows*: T positions with the memory of the S
positions before them. The contexts do not depend on interval, heads or max_contexts, so runs that differ only in those
share one store. Everything is memory-mapped; nothing here is trained.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.parts import solve_in_parts
from ctxkv_lightning.context.pretrain import load_encoder
from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.store import Store, create_array, get_or_build
from ctxkv_lightning.text.ngram import EVIDENCE, KneserNeyTrigram, held_out
from ctxkv_lightning.windows import RowLoader, RunLoader, Stream, WindowLoader

SPLITS = ("train", "validation", "test")
COUNTED = "{}_counted"  # the array of a token store that says which tokens of a split are scored, where not all are
NOTHING_READ = {"passes": 0, "done": 0}
"""Where the training stream is read before it is; each part of a phase begins there."""

ROWS_AT_A_TIME = 1 << 16
LONG_STREAM = 1_000_000  # tokens from which starting more processes pays
RESIDENT_SHARE = 0.25
"""Part of a device's free memory that one stream may take; the rest is for the model and its step."""


class ContextDataModule(L.LightningDataModule):
    """Batches for Phase 1 (memory contexts, no encoder yet) and Phase 2, from stores given by their folders.

    `tokens` holds the arrays train, validation and test, and may hold which of their tokens are scored; `embedding`
    holds `table` (V, D); each of `encoders` the weights of a Phase 1. `memory` says what stands for the `history`
    positions before a window and its own: the contexts of all encoders, or the embeddings, which need no Phase 1.
    Windows begin at multiples of `alignment`. `embeddings="table"` stores the normalised table once, `"tokens"` a row
    per token: the same numbers. `contexts_dtype` is what contexts are stored in; they are solved and read as fp32.
    `prepare_data` builds what is missing, the contexts of long streams with so many `processes`; `setup` opens it, on
    the GPU if it fits. With `ngram`, training windows bring what counting the rest of the text says of each position.
    """

    def __init__(
        self,
        tokens: str,
        embedding: str,
        encoders: list[str] | None = None,
        memory: Literal["contexts", "embeddings"] = "contexts",
        cache_dir: str = "outputs/cache",
        history: int = 620,
        alignment: int = 1,
        batch_tokens: int = 8880,
        pretrain_batch_tokens: int = 5000,
        embeddings: Literal["table", "tokens"] = "table",
        tolerance: float = 1e-5,
        contexts_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 42,
        processes: int = 1,
        ngram: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder_folders = encoders or []
        self.pretrain_rows = slice(None)
        self.in_rows = False
        self.solver = torch.device("cpu")
        self.token_store = Store.open(tokens)
        self.embedding_store = Store.open(embedding)
        self._held = self.token_store.array("train"), self.embedding_store.array("table")  # `cache prune` sees it
        self.streams: dict[str, Stream] = {}
        self._training: RowLoader | WindowLoader | None = None
        self._progress = NOTHING_READ

    @property
    def train_tokens(self) -> int:
        """N of the training stream."""
        return len(self.token_store.array("train"))

    @property
    def table(self) -> Tensor:
        """The raw embedding table E (V, D), memory-mapped."""
        return torch.from_numpy(self.embedding_store.array("table"))

    @property
    def pretrain_tokens(self) -> int:
        """Tokens that Phase 1 reads."""
        return len(range(*self.pretrain_rows.indices(self.train_tokens)))

    @property
    def in_phase_one(self) -> bool:
        """Whether batches are runs for Phase 1: contexts are asked for, and no encoder is there to make them."""
        return self.hparams["memory"] == "contexts" and not self.encoder_folders

    def unigram_counts(self) -> Tensor:
        """How often each token stands in the training stream, fp32 (V,)."""
        return torch.bincount(self._tokens("train"), minlength=len(self.table)).float()

    def trigram(self) -> KneserNeyTrigram:
        """The trigram of the whole training stream."""
        return KneserNeyTrigram(self.token_store.array("train"), len(self.table))

    def encoders(self) -> list[ContextEncoder]:
        """The frozen encoders of Phase 1; none before it, or where none is needed."""
        return [load_encoder(Store.open(folder)) for folder in self.encoder_folders]

    @property
    def normalised_table(self) -> Tensor:
        """LayerNorm(E) (V, D), what encoders read."""
        return F.layer_norm(self.table, self.table.shape[1:])

    def pretrain_on(self, rows: slice, in_rows: bool = False) -> None:
        """Phase 1 reads these positions of the training stream only; `in_rows`: side by side, as a language model."""
        self.pretrain_rows, self.in_rows = rows, in_rows
        self._training, self._progress = None, NOTHING_READ

    def pretrain_ids(self) -> Tensor:
        """The tokens (N,) that Phase 1 reads."""
        return self._tokens("train")[self.pretrain_rows]

    def solve_on(self, device: torch.device) -> None:
        """Contexts that are not stored yet are solved on this device."""
        self.solver = device

    def use_encoders(self, folders: Sequence[str]) -> None:
        """Ends the first phase: from here on, batches are windows over the contexts of these encoders."""
        self.encoder_folders = self.hparams["encoders"] = list(folders)
        self.streams = {}
        self._training, self._progress = None, NOTHING_READ

    def prepare_data(self) -> None:
        self.normalised_store()
        self.context_stores()
        if self.hparams["ngram"]:
            self.ngram_store()

    def setup(self, stage: str) -> None:
        if not self.in_phase_one and not self.streams:
            self.streams = {split: self._stream(split) for split in SPLITS}

    def train_dataloader(self) -> RunLoader | RowLoader | WindowLoader:
        if self.in_phase_one and not self.in_rows:
            tokens = self.pretrain_ids()
            stream = self._resident(Stream(tokens, self.normalised_table, tokens, ()))
            return RunLoader(stream.tokens, stream.embeddings, self.hparams["pretrain_batch_tokens"])
        in_rows = self.in_phase_one
        self._training = RowLoader(self.pretrain_ids()) if in_rows else self._windows("train", shuffle=True)
        self._training.load_state_dict(self._progress)
        return self._training

    def state_dict(self) -> dict[str, int]:
        """Where the training stream is read. Lightning would restore a loader's own state in mid-epoch only."""
        return self._training.state_dict() if self._training is not None else self._progress

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._progress = state_dict

    def val_dataloader(self) -> WindowLoader | list[Any]:
        return [] if self.in_phase_one else self._windows("validation")

    def test_dataloader(self) -> WindowLoader:
        return self._windows("test")

    def normalised_store(self) -> Store:
        """LayerNorm(E), as `embeddings` asks: array `table` (V, D), or arrays by split (N, D)."""
        per_token = self.hparams["embeddings"] == "tokens"
        key = {"embedding": self.embedding_store.content, "tokens": self.token_store.content if per_token else None}

        def build(folder: Path) -> None:
            normalised = F.layer_norm(self.table, self.table.shape[1:]).numpy()
            if not per_token:
                create_array(folder, "table", normalised.shape, np.float32)[:] = normalised
                return
            for split in SPLITS:
                ids = self.token_store.array(split)
                rows = create_array(folder, split, (len(ids), normalised.shape[1]), np.float32)
                for start in range(0, len(ids), ROWS_AT_A_TIME):
                    rows[start : start + ROWS_AT_A_TIME] = normalised[ids[start : start + ROWS_AT_A_TIME]]

        return get_or_build(self.hparams["cache_dir"], "embeddings", key, build)

    def context_stores(self) -> list[Store]:
        """Of each encoder: arrays train, validation and test (N, C), with the seam error in the facts."""
        return [self._context_store(Store.open(folder)) for folder in self.encoder_folders]

    def _context_store(self, encoder_store: Store) -> Store:
        key = {
            "encoder": encoder_store.content,
            "embedding": self.embedding_store.content,
            "tokens": self.token_store.content,
            "tolerance": self.hparams["tolerance"],
            "dtype": self.hparams["contexts_dtype"],
        }

        def build(folder: Path) -> dict[str, Any]:
            started, worst, tolerance = time.perf_counter(), 0.0, self.hparams["tolerance"]
            encoder, normalised = load_encoder(encoder_store).to(self.solver), self.normalised_table.to(self.solver)
            for split in SPLITS:
                ids = self._tokens(split).to(self.solver)
                rows = create_array(folder, split, (len(ids), encoder.context_dim), self._stored_type)
                processes = self.hparams["processes"] if len(ids) >= LONG_STREAM and self.solver.type == "cpu" else 1
                if processes > 1:
                    dtype, file = self.hparams["contexts_dtype"], folder / f"{split}.npy"
                    error = solve_in_parts(encoder, normalised, ids, file, dtype, tolerance, processes)
                else:
                    _, error = solve_contexts(encoder, normalised, tolerance, ids=ids, out=self._as_contexts(rows))
                worst = max(worst, error)
            return {"seam_error": worst, "seconds": time.perf_counter() - started}

        return get_or_build(self.hparams["cache_dir"], "contexts", key, build)

    def ngram_store(self) -> Store:
        """What `held_out` says of the training stream: array `train` (N, 3)."""
        V, ids = len(self.table), self.token_store.array("train")

        def build(folder: Path) -> None:
            create_array(folder, "train", (len(ids), EVIDENCE), np.float32)[:] = held_out(ids, V)

        key = {"tokens": self.token_store.content, "vocab_size": V}
        return get_or_build(self.hparams["cache_dir"], "ngram", key, build)

    def sizes(self) -> dict[str, int]:
        """Bytes of the stored contexts and embeddings by split, and of the embeddings in either way of storing them."""
        tokens = {split: len(self.token_store.array(split)) for split in SPLITS}
        V, D = self.table.shape
        widths = [encoder.context_dim for encoder in self.encoders()]
        return stored_bytes(tokens, V, D, sum(widths), 2 if self.hparams["contexts_dtype"] == "bfloat16" else 4)

    def _tokens(self, split: str) -> Tensor:
        return torch.from_numpy(self.token_store.array(split)).long()

    def _stream(self, split: str) -> Stream:
        normalised, tokens = self.normalised_store(), self._tokens(split)
        if self.hparams["embeddings"] == "tokens":
            embeddings, rows = normalised.array(split), torch.arange(len(tokens))
        else:
            embeddings, rows = normalised.array("table"), tokens
        contexts = tuple(self._as_contexts(store.array(split)) for store in self.context_stores())
        counted = counted_tokens(self.token_store, split)
        scored = None if counted is None else torch.from_numpy(counted)
        of_counts = split == "train" and self.hparams["ngram"]
        ngram = torch.from_numpy(self.ngram_store().array("train")) if of_counts else None
        return self._resident(Stream(tokens, torch.from_numpy(embeddings), rows, contexts, scored, ngram))

    @property
    def _stored_type(self) -> type[np.generic]:
        """numpy has no bf16: its bits are stored as 16-bit integers."""
        return np.int16 if self.hparams["contexts_dtype"] == "bfloat16" else np.float32

    def _as_contexts(self, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored).view(getattr(torch, self.hparams["contexts_dtype"]))

    def _resident(self, stream: Stream) -> Stream:
        """The stream on the trainer's GPU if it fits there with room to spare, else where it is: memory-mapped."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if device.type != "cuda" or not fits(stream, torch.cuda.mem_get_info(device)[0]):
            return stream
        return stream.to(device)

    def _windows(self, split: str, shuffle: bool = False) -> WindowLoader:
        options = (self.hparams[name] for name in ("history", "batch_tokens", "alignment"))
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        seed = self.hparams["seed"] if shuffle else None
        return WindowLoader(self.streams[split], *options, seed=seed, rank=rank, ranks=ranks)


def counted_tokens(store: Store, split: str) -> np.ndarray | None:
    """Which tokens (N,) of a split are scored, as its token store says; None for all."""
    name = COUNTED.format(split)
    return store.array(name) if f"{name}.npy" in store.manifest["files"] else None


def fits(stream: Stream, free_bytes: int) -> bool:
    """Whether a stream may stay on a device with so many free bytes: it takes at most `RESIDENT_SHARE` of them."""
    return stream.bytes() <= RESIDENT_SHARE * free_bytes


def stored_bytes(tokens: Mapping[str, int], V: int, D: int, C: int, context_bytes: int = 4) -> dict[str, int]:
    """Bytes of contexts (N, C) and fp32 embeddings (N, D) by split of N `tokens`, and of the embeddings as a table."""
    names = {"train": "train", "validation": "val", "test": "test"}
    return {
        **{f"{names[split]}_context": N * C * context_bytes for split, N in tokens.items()},
        **{f"{names[split]}_embedding": N * D * 4 for split, N in tokens.items()},
        "as_table": V * D * 4,
        "as_tokens": sum(tokens.values()) * D * 4,
    }
