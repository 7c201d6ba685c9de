"""Checkpoints that are whole or not there: how they are written.

Lightning writes through the system's temporary folder and swallows a refusal of the disk; a checkpoint of ours is
written beside its final name, flushed, renamed, and read back against the SHA-256 that its manifest states.
How it is read stands in `saved.py`.
"""

import copy
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.saved import SUFFIX, manifest_of, read, stated_of, verify

ASIDE = ".aside-"
"""Begins the name of a checkpoint that is still being written."""


FREE_SECONDS = 0.2
"""What a checkpoint at the end of each epoch may take, however short the epochs are."""

WORTH = 10
"""Seconds of training that a second of saving beyond that is worth."""

PACE = 200e6
"""Bytes of weights that are taken to be written in a second, before a checkpoint of theirs has been."""


def worth_saving(since: float, took: float | None, weights: dict[str, Tensor]) -> bool:
    """Whether the training since then is worth the seconds that the last checkpoint took, or the first will take."""
    seconds = sum(tensor.nbytes for tensor in weights.values()) / PACE if took is None else took
    return time.monotonic() - since >= WORTH * (seconds - FREE_SECONDS)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames; keeps a manifest; reads only what its manifest vouches for.

    Checkpoints named in `may_wait` are kept in memory while less time has gone by since the last one, or since the
    beginning, than writing it is worth, and written then, before any other checkpoint is written or read, or when the
    trainer ends: by an exception too, but not if the process is killed or its GPU fails.
    """

    def __init__(self, may_wait: Sequence[str] = ()) -> None:
        self.may_wait = frozenset(may_wait)
        self._waiting: tuple[Path, dict[str, Any]] | None = None
        self._since = time.monotonic()
        self._took: float | None = None  # by the last one that might have waited

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises UserError when the disk refuses, or gives back other bytes than it was given."""
        path = Path(path)
        if path.suffix != SUFFIX:  # a file from elsewhere may say where: it shall not replace what is no checkpoint
            raise UserError(f"{path} is no name for a checkpoint, which ends in {SUFFIX}: it is not written")
        if self._waiting is not None and self._waiting[0] != path:
            self._write_waiting()
        self._waiting = None
        if path.name not in self.may_wait:
            self._write(checkpoint, path)
        elif worth_saving(self._since, self._took, checkpoint["state_dict"]):
            started = time.monotonic()
            self._write(checkpoint, path)
            self._since = time.monotonic()
            self._took = self._since - started
        else:
            self._waiting = path, apart(checkpoint)

    def teardown(self) -> None:
        """Called by Lightning when fitting ends, by an exception too."""
        self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            (path, checkpoint), self._waiting = self._waiting, None
            self._write(checkpoint, path)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        stopping = sys.exc_info()[1]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, checkpoint)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            if (stop := _stop_behind(error)) not in (None, stopping):
                raise stop from None
            raise UserError(
                f"the checkpoint {path} cannot be written ({_reason(error)}): make room or rights there; what was "
                "saved before is intact"
            ) from error
        verify(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values only, whatever is asked for; raises UserError for what is not as it was saved."""
        self._write_waiting()
        return read(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes file and manifest, of a checkpoint; a resumed one may name any file as its predecessor."""
        path = Path(path)
        self._write_waiting()
        if path.suffix != SUFFIX or ".." in path.parts:
            raise UserError(f"{path} is no checkpoint of this run and is not removed: do not resume from this one")
        for file in (path, manifest_of(path)):
            file.unlink(missing_ok=True)


def apart(content: Any) -> Any:
    """A copy, in the host's memory: a GPU may have no room for a second model."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: apart(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(apart(value) for value in content)
    return copy.deepcopy(content)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, which forgets the best score of a run whose folder has been moved: a worse one would replace it."""

    @property
    def state_key(self) -> str:
        """That of Lightning's, under which checkpoints have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = {
            "dirpath": self.dirpath,
            "best_k_models": {self._here(path): score for path, score in state_dict["best_k_models"].items()},
            **{name: self._here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")},
        }
        super().load_state_dict({**state_dict, **here})

    def _here(self, path: str) -> str:
        return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path


class Patience(EarlyStopping):
    """Lightning's, which takes its patience from the checkpoint and so overrules, silently, one that was changed."""

    @property
    def state_key(self) -> str:
        """That of Lightning's, under which checkpoints have it."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


def clear_aside(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f"{ASIDE}*"):
        path.unlink(missing_ok=True)


class _HashingWriter(io.BufferedWriter):
    """A file that is written from its beginning to its end; the SHA-256 of what went into it is taken beside that."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.digest, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        hashed = self._hasher.submit(self.digest.update, data)
        try:
            return super().write(data)
        finally:
            hashed.result()

    def close(self) -> None:
        self._hasher.shutdown()
        super().close()


def _replace(path: Path, checkpoint: dict[str, Any]) -> None:
    """At every moment the file under the final name, old or new, is whole, and the manifest knows it."""
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    try:
        with _HashingWriter(aside) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        new, old = file.digest.hexdigest(), []
        with suppress(OSError, ValueError, KeyError, TypeError):  # what no manifest vouches for is not worth keeping
            old = stated_of(path)
        _write_manifest(path, [new, *old])
        os.replace(aside, path)
        _sync_folder(path.parent)
        _write_manifest(path, [new])
    finally:
        aside.unlink(missing_ok=True)


def _write_manifest(path: Path, digests: Sequence[str]) -> None:
    manifest = manifest_of(path)
    aside = manifest.with_name(f"{ASIDE}{manifest.name}-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump({"sha256": list(digests)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, manifest)
        _sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _stop_behind(error: BaseException) -> BaseException | None:
    """What a signal raised: while torch wrote, whose writer complains that it did not come to its end; or before."""
    cause: BaseException | None = error
    while cause is not None and isinstance(cause, Exception):
        cause = cause.__context__
    return cause


def _reason(error: BaseException) -> str:
    """What the disk said, which torch's writer buries."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(getattr(cause, "strerror", None) or str(error).splitlines()[0])


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RandomState(Callback):
    """Keeps the random generators in the checkpoint, so that dropout goes on where it stopped.

    They are put back when the first batch after loading starts: setting up draws numbers too.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._loaded is None:
            return
        torch.set_rng_state(_as_bytes(self._loaded["cpu"]))
        for device, state in enumerate(self._loaded["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_as_bytes(state), device)
        self._loaded = None


def _as_bytes(state: Tensor) -> Tensor:
    return state.cpu().to(torch.uint8)
