"""Content-addressed folders: built aside, manifest last, renamed into place, verified when opened.

A store lives at `root/kind/digest`, where the digest hashes everything that changes its numbers. Readers trust
only a folder whose manifest is there and whose files have the sizes it states; a builder that
dies leaves nothing under the final name. A lock merely spares two builders the same work: whoever
renames second throws its own copy away. The module knows nothing of what is stored.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ctxkv_lightning.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
LOCK_SECONDS = 1800
UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip


@dataclass(frozen=True)
class Store:
    """A complete store, read-only."""

    path: Path
    manifest: dict[str, Any]
    reused: bool = True
    """False in the process that has just built it."""

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """The store at `path`; a UserError if it is missing, incomplete or damaged."""
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            manifest["facts"], manifest["key"]
        except FileNotFoundError:
            raise UserError(f"there is no complete store at {path}: build it again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"the manifest of the store at {path} is damaged: delete the folder") from None
        for name, size in sizes.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise UserError(f"{path / name} is missing or not {size} bytes long: delete the folder {path}")
        return cls(path, manifest)

    @property
    def facts(self) -> dict[str, Any]:
        """What the builder reported about its work."""
        return self.manifest["facts"]

    @property
    def content(self) -> str:
        """SHA-256 over the hashes of all files: the same bytes, the same value, whoever built them."""
        return _sha256_of_json({name: entry["sha256"] for name, entry in self.manifest["files"].items()})

    def array(self, name: str) -> np.ndarray:
        """Array `name`.npy, memory-mapped; writing to it changes a private copy only."""
        return np.load(self.path / f"{name}.npy", mmap_mode="c", allow_pickle=False)

    def size(self, name: str) -> int:
        """Bytes of array `name`.npy on disk."""
        return self.manifest["files"][f"{name}.npy"]["bytes"]


def create_array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new memory-mapped array `name`.npy to be filled by a builder."""
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


def get_or_build(
    root: Path | str, kind: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]
) -> Store:
    """The store of `kind` for `key`, built by `build(folder)` if there is no valid one.

    `build` writes files into the folder it is given and returns facts to be kept in the manifest.
    `key` must be JSON; it stands in the manifest in clear text. A UserError if `root` cannot be written.
    """
    path = Path(root) / kind / _sha256_of_json({"format": FORMAT, "kind": kind, "key": key})[:32]
    with suppress(UserError):
        return Store.open(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            with suppress(UserError):
                return Store.open(path)
            return _build(path, key, build)
        finally:
            lock.release()
    except OSError as error:
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise UserError(
                f"the cache folder {root} cannot be written ({error.strerror}): make room there or set cache_dir"
            ) from error
        raise


def _lock(path: Path) -> FileLock:
    """The lock of one store, held if it could be had within the time limit."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    # Without a lock, or on a file system that has none (which filelock reports so), two builders do the work twice.
    with suppress(Timeout, NotImplementedError):
        lock.acquire(timeout=LOCK_SECONDS)
    return lock


def _build(path: Path, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]) -> Store:
    aside = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        facts = build(aside) or {}
        files = {file.name: _seal(file) for file in sorted(aside.iterdir())}
        manifest = {"format": FORMAT, "key": key, "facts": facts, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _seal(aside / MANIFEST)
        _move_into_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Store(path, Store.open(path).manifest, reused=False)


def _move_into_place(aside: Path, path: Path) -> None:
    """Renames `aside` to `path`; a valid store already there wins, a damaged one is replaced."""
    with suppress(UserError):
        Store.open(path)
        return
    if path.exists():
        broken = aside.with_name(aside.name + "-broken")
        path.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        aside.rename(path)
    except OSError:
        Store.open(path)  # another builder was faster; anything else is an error
    _sync(path.parent)


def _seal(file: Path) -> dict[str, Any]:
    """Flushes a file to disk; its size and SHA-256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _sha256(stream)
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _sha256(stream: Any) -> Any:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
