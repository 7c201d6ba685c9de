"""Checkpoints that are whole or not there: how they are written, checked, and found again.

Lightning writes through the system's temporary folder and swallows a refusal of the disk; a checkpoint of ours is
written beside its final name, flushed, renamed, and read back against the SHA-256 that its manifest states.
What it holds is tensors, numbers, texts, lists and dictionaries: nothing in it is ever imported.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from ctxkv_lightning.errors import UserError

SUFFIX = ".ckpt"
ASIDE = ".aside-"
"""Begins the name of a checkpoint that is still being written."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames; keeps a manifest; reads only what its manifest vouches for."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises UserError when the disk refuses, or gives back other bytes than it was given."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, checkpoint)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise UserError(
                f"the checkpoint {path} cannot be written ({_reason(error)}): make room or rights there; what was "
                "saved before is intact"
            ) from error
        verify(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values only, whatever is asked for; raises UserError for what is not as it was saved."""
        return read(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes file and manifest, of a checkpoint; a resumed one may name any file as its predecessor."""
        path = Path(path)
        if path.suffix != SUFFIX or ".." in path.parts:
            raise UserError(f"{path} is no checkpoint of this run and is not removed: do not resume from this one")
        for file in (path, manifest_of(path)):
            file.unlink(missing_ok=True)


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint stands."""
    return path.with_name(path.name + ".json")


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of ours, verified. Raises UserError when it is missing, damaged or not plain data."""
    verify(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch's reader raises whatever it stumbles over
        raise UserError(
            f"{path} holds more than tensors and plain values, or is no checkpoint: it is not read"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path} is no checkpoint of a run, it has no global_step: it is not read")
    return checkpoint


def verify(path: Path) -> None:
    """Raises UserError unless the file has the size and SHA-256 that its manifest states."""
    try:
        stated = [str(digest)[:64] for digest in json.loads(manifest_of(path).read_text(encoding="utf-8"))["sha256"]]
        found = _sha256(path)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no checkpoint {path}, or no manifest beside it ({error.filename} is missing)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} or its manifest cannot be read ({error})") from None
    if found not in stated:
        saved = " or ".join(f"{digest[:12]}…" for digest in stated) or "none"
        raise UserError(f"the checkpoint {path} is damaged: its SHA-256 is {found[:12]}…, saved was {saved}")


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is as it was saved, and what is wrong with newer ones."""
    complaints: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            verify(path)
            return path, complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def steps_done(checkpoint: Path | None) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return 0 if checkpoint is None else read(checkpoint)["global_step"]


def clear_aside(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f"{ASIDE}*"):
        path.unlink(missing_ok=True)


def _replace(path: Path, checkpoint: dict[str, Any]) -> None:
    """At every moment the file under the final name, old or new, is whole, and the manifest knows it."""
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        new = _sha256(aside)
        _write_manifest(path, [new, *([_sha256(path)] if path.exists() else [])])
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
