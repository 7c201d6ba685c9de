"""Stored tensors to batches, for both phases.

Phase 1 reads contiguous runs of the training stream. Once there is an encoder, the contexts of all three
streams are solved and stored, and Phase 2 reads *windows*: T positions with the S = (M-1)·I contexts before
them. The contexts do not depend on interval, heads or max_contexts, so runs that differ
only in those share one store. Everything is memory-mapped; nothing here is trained.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.pretrain import load_encoder
from ctxkv_lightning.context.solve import solve_contexts
from ctxkv_lightning.store import Store, create_array, get_or_build

SPLITS = ("train", "validation", "test")
WINDOW = 1110
"""Positions in a window: eight make the published step of 8,880."""
ROWS_AT_A_TIME = 1 << 16
RESIDENT_SHARE = 0.25
"""Part of a device's free memory that one stream may take; the rest is for the model and its step."""


class Run(NamedTuple):
    """A Phase 1 batch: n contiguous positions of the training stream."""

    start: int
    embeddings: Tensor  # (distinct, D), normalised, one row per distinct token
    inverse: Tensor  # (n,), the row of each position


class Windows(NamedTuple):
    """A Phase 2 batch: B windows of T positions with S contexts of history each."""

    tokens: Tensor  # (B, T)
    targets: Tensor  # (n,), the token after each position that counts, row by row
    counted: Tensor | None  # (n,), which of the B·T positions count; None when all do
    embeddings: Tensor  # (B, T, D), normalised
    contexts: Tensor  # (B, S+T, C)
    first: Tensor | None  # (B,), index of a row's first existing context; None when all exist


class Stream(NamedTuple):
    """One split as stored tensors; `rows` says which row of `embeddings` each position has."""

    tokens: Tensor  # (N,)
    embeddings: Tensor  # (V, D) or (N, D)
    rows: Tensor  # (N,)
    contexts: Tensor  # (N, C)


class ContextDataModule(L.LightningDataModule):
    """Batches for Phase 1 (no encoder yet) and Phase 2 (an encoder), from stores given by their folders.

    `tokens` holds the arrays train, validation and test; `embedding` holds `table` (V, D); `encoder` the weights
    of Phase 1. `embeddings="table"` stores the normalised table once, `"tokens"` a row per token: the same
    numbers. `contexts_dtype` is what contexts are stored in; they are solved and read as fp32. `prepare_data`
    builds what is missing, `setup` opens it, on the GPU if it fits.
    """

    def __init__(
        self,
        tokens: str,
        embedding: str,
        encoder: str | None = None,
        cache_dir: str = "outputs/cache",
        interval: int = 20,
        max_contexts: int = 32,
        batch_tokens: int = 8880,
        pretrain_batch_tokens: int = 5000,
        embeddings: Literal["table", "tokens"] = "table",
        tolerance: float = 1e-5,
        contexts_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder_folder = encoder
        self.token_store = Store.open(tokens)
        self.embedding_store = Store.open(embedding)
        self.streams: dict[str, Stream] = {}

    @property
    def train_tokens(self) -> int:
        """N of the training stream."""
        return len(self.token_store.array("train"))

    @property
    def table(self) -> Tensor:
        """The raw embedding table E (V, D), memory-mapped."""
        return torch.from_numpy(self.embedding_store.array("table"))

    def encoder(self) -> ContextEncoder:
        """The frozen encoder of Phase 1; only once there is one."""
        assert self.encoder_folder is not None
        return load_encoder(Store.open(self.encoder_folder))

    def use_encoder(self, folder: str) -> None:
        """Ends the first phase: from here on, batches are windows over this encoder's contexts."""
        self.encoder_folder = folder
        self.streams = {}

    def prepare_data(self) -> None:
        self.normalised_store()
        if self.encoder_folder is not None:
            self.context_store()

    def setup(self, stage: str) -> None:
        if self.encoder_folder is not None and not self.streams:
            self.streams = {split: self._stream(split) for split in SPLITS}

    def train_dataloader(self) -> "RunLoader | WindowLoader":
        if self.encoder_folder is None:
            tokens, table = self._tokens("train"), self._normalised_table()
            return RunLoader(tokens, table, self.hparams["pretrain_batch_tokens"])
        return self._windows("train", shuffle=True)

    def val_dataloader(self) -> "WindowLoader | list[Any]":
        return self._windows("validation") if self.encoder_folder is not None else []

    def test_dataloader(self) -> "WindowLoader":
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

    def context_store(self) -> Store:
        """Arrays train, validation and test (N, C), with the seam error in its facts."""
        assert self.encoder_folder is not None
        encoder_store = Store.open(self.encoder_folder)
        key = {
            "encoder": encoder_store.content,
            "embedding": self.embedding_store.content,
            "tokens": self.token_store.content,
            "tolerance": self.hparams["tolerance"],
            "dtype": self.hparams["contexts_dtype"],
        }

        def build(folder: Path) -> dict[str, Any]:
            started, worst = time.perf_counter(), 0.0
            encoder, normalised = load_encoder(encoder_store), self._normalised_table()
            for split in SPLITS:
                ids = self._tokens(split)
                out = self._as_contexts(create_array(folder, split, (len(ids), encoder.context_dim), self._stored_type))
                _, error = solve_contexts(encoder, normalised, self.hparams["tolerance"], ids=ids, out=out)
                worst = max(worst, error)
            return {"seam_error": worst, "seconds": time.perf_counter() - started}

        return get_or_build(self.hparams["cache_dir"], "contexts", key, build)

    def sizes(self) -> dict[str, int]:
        """Bytes of the stored contexts by split, and of the embeddings in either way of storing them."""
        V, D = self.table.shape
        tokens = sum(len(self.token_store.array(split)) for split in SPLITS)
        contexts = self.context_store()
        return {
            **{f"{'val' if split == 'validation' else split}_context": contexts.size(split) for split in SPLITS},
            "as_table": V * D * 4,
            "as_tokens": tokens * D * 4,
        }

    def _tokens(self, split: str) -> Tensor:
        return torch.from_numpy(self.token_store.array(split)).long()

    def _normalised_table(self) -> Tensor:
        return F.layer_norm(self.table, self.table.shape[1:])

    def _stream(self, split: str) -> Stream:
        normalised, tokens = self.normalised_store(), self._tokens(split)
        if self.hparams["embeddings"] == "tokens":
            embeddings, rows = normalised.array(split), torch.arange(len(tokens))
        else:
            embeddings, rows = normalised.array("table"), tokens
        contexts = self._as_contexts(self.context_store().array(split))
        return self._resident(Stream(tokens, torch.from_numpy(embeddings), rows, contexts))

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
        return Stream(*(tensor.to(device) for tensor in stream))

    def _windows(self, split: str, shuffle: bool = False) -> "WindowLoader":
        history = (self.hparams["max_contexts"] - 1) * self.hparams["interval"]
        return WindowLoader(
            self.streams[split], history, self.hparams["batch_tokens"], self.hparams["seed"] if shuffle else None
        )


def fits(stream: Stream, free_bytes: int) -> bool:
    """Whether a stream may stay on a device with so many free bytes: it takes at most `RESIDENT_SHARE` of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stream) <= RESIDENT_SHARE * free_bytes


class RunLoader:
    """The training stream in contiguous runs of at most `batch_tokens`, in order."""

    def __init__(self, tokens: Tensor, table: Tensor, batch_tokens: int) -> None:
        self.tokens, self.table, self.batch_tokens = tokens, table, batch_tokens

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_tokens)

    def __iter__(self) -> Iterator[Run]:
        for start in range(0, len(self.tokens), self.batch_tokens):
            distinct, inverse = torch.unique(self.tokens[start : start + self.batch_tokens], return_inverse=True)
            yield Run(start, self.table[distinct], inverse)


class WindowLoader:
    """Windows over one stream; every position that has a next token counts exactly once a pass.

    All windows have the same length, as even as the stream allows: the last is moved back to end with the
    stream, and what it shares with the one before it does not count. With a `seed`, the order of the
    windows is drawn anew each pass, as a function of (seed, pass).
    """

    def __init__(self, stream: Stream, history: int, batch_tokens: int, seed: int | None = None) -> None:
        self.stream, self.history, self.seed, self.passes = stream, history, seed, 0
        self.positions = len(stream.tokens) - 1
        self.windows = -(-self.positions // min(WINDOW, batch_tokens))
        self.length = -(-self.positions // self.windows)
        self.batches = -(-self.windows // max(1, batch_tokens // self.length))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Windows]:
        order = torch.arange(self.windows)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
            order = torch.randperm(self.windows, generator=generator)
        self.passes += 1
        for chosen in order.tensor_split(self.batches):
            yield self.batch(chosen)

    def batch(self, chosen: Tensor) -> Windows:
        """The windows of these numbers (B,)."""
        own = chosen * self.length
        starts = own.clamp_max(self.positions - self.length)
        positions = starts[:, None] + torch.arange(self.length)
        counts = (positions >= own[:, None]).flatten()
        counted = None if bool(counts.all()) else counts.nonzero().flatten()
        device = self.stream.tokens.device
        targets = self.stream.tokens[positions.flatten()[counts].to(device) + 1]
        first = (self.history - starts).clamp_min(0)
        reach = starts[:, None] + torch.arange(-self.history, self.length)
        positions, reach = positions.to(device), reach.clamp_min(0).to(device)
        return Windows(
            self.stream.tokens[positions],
            targets,
            None if counted is None else counted.to(device),
            self.stream.embeddings[self.stream.rows[positions]],
            self.stream.contexts[reach].float(),
            first.to(device) if bool(first.any()) else None,
        )
