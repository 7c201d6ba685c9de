"""Content-addressed folders: built aside, manifest last, renamed into place, hashed before they are first used.

A store lives at `root/kind/digest`, where the digest hashes everything that changes its numbers. Readers trust only a
folder whose manifest fits its name and whose files have the sizes and the SHA-256 it states; each machine hashes them
once, and again when a file has changed since. A builder that dies leaves nothing under the final name. A lock merely
spares two builders the same work: whoever renames second throws its own copy away. The module knows nothing of
what is stored.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from filelock import FileLock

from ctxkv_lightning.builders import Builder, abandoned, aside
from ctxkv_lightning.errors import UserError

log = logging.getLogger("ctxkv_lightning")

FORMAT = 3
MANIFEST = "manifest.json"
WAITS = (5, 55, *(60,) * 29)
"""Seconds to wait for another builder; after each it is told for whom, after the last the work is done twice, unless
the builder is of this machine and known to live."""

LONG_TO_HASH = 1 << 30
"""Bytes from which on hashing takes so long that it is told."""

UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip

ADVICE = "'python -m ctxkv_lightning cache prune' removes what is damaged, and it is built again when it is needed"


class OutdatedError(UserError):
    """A store of another version of this program."""


_verified_here: set[str] = set()
"""What this process has hashed: in a cache that cannot be written there are no notes."""


@dataclass(frozen=True)
class Store:
    """A complete store, read-only."""

    path: Path
    manifest: dict[str, Any]
    reused: bool = True
    """False in the process that has just built it."""

    @classmethod
    def open(cls, path: Path | str, hashing: Literal["once", "always", "never"] = "once") -> "Store":
        """The store at `path`; a UserError if it is missing, incomplete, damaged or not what its name says.

        The hashes of its files are compared once on each machine, and again after any change of a file.
        """
        path = Path(path)
        store = cls(path, _read_manifest(path))
        stamps = store._stamps()
        if hashing == "always" or (hashing == "once" and not store._vouched(stamps)):
            store._verify(stamps)
        if hashing == "once":
            with suppress(OSError):
                os.utime(path / MANIFEST)  # when it was last used
        return store

    @property
    def facts(self) -> dict[str, Any]:
        """What the builder reported about its work."""
        return self.manifest["facts"]

    @property
    def content(self) -> str:
        """SHA-256 over the hashes of all files: the same bytes, the same value, whoever built them."""
        return _sha256_of_json({name: entry["sha256"] for name, entry in self.manifest["files"].items()})

    @property
    def verified(self) -> bool:
        """Whether this machine has hashed the files as they are now."""
        return self._vouched(self._stamps())

    def array(self, name: str) -> np.ndarray:
        """Array `name`.npy, memory-mapped; writing to it changes a private copy only."""
        return np.load(self.path / f"{name}.npy", mmap_mode="c", allow_pickle=False)

    def size(self, name: str) -> int:
        """Bytes of array `name`.npy on disk."""
        return self.manifest["files"][f"{name}.npy"]["bytes"]

    def _stamps(self) -> dict[str, list[int]]:
        """By file, what tells that it has not been touched; raises UserError for sizes that are not the stated ones."""
        stamps = {}
        for name, entry in self.manifest["files"].items():
            file, found = self.path / name, None
            with suppress(OSError):
                found = file.stat()
            if Path(name).name != name or found is None or found.st_size != entry["bytes"]:
                raise UserError(f"{file} is missing or not {entry['bytes']:,} bytes long: {ADVICE}")
            stamps[name] = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        return stamps

    def _vouched(self, stamps: dict[str, list[int]]) -> bool:
        note = self._note(stamps)
        return note in _verified_here or _text_of(note_of(self.path)) == note

    def _verify(self, stamps: dict[str, list[int]]) -> None:
        """Hashes all files and notes that it did; raises UserError for the first that is not as it was built."""
        total = sum(entry["bytes"] for entry in self.manifest["files"].values())
        if total >= LONG_TO_HASH:
            log.info(f"hashing {self.path} ({total / 1e9:.1f} GB), once on this machine")
        for name, entry in self.manifest["files"].items():
            found = None
            with suppress(OSError):
                found = _sha256(self.path / name)
            if found != entry["sha256"]:
                _verified_here.discard(self._note(stamps))
                with suppress(OSError):
                    note_of(self.path).unlink()
                raise UserError(
                    f"{self.path / name} is damaged, its SHA-256 is not the one it was built with: {ADVICE}"
                )
        self._vouch(stamps)

    def _note(self, stamps: dict[str, list[int]]) -> str:
        # What a disk returned before the last start of the machine says nothing about what it returns today.
        boot = _text_of(Path("/proc/sys/kernel/random/boot_id"))
        return json.dumps([boot, self.content, stamps])

    def _vouch(self, stamps: dict[str, list[int]]) -> None:
        note = self._note(stamps)
        _verified_here.add(note)
        with suppress(OSError):  # half a note is no note
            note_of(self.path).write_text(note)


def note_of(path: Path) -> Path:
    """Where this machine notes which bytes of the store at `path` it has hashed."""
    return path.with_name(f".{path.name}.verified-{os.uname().nodename}")


def lock_of(path: Path) -> FileLock:
    """The lock of the store at `path`, not yet held."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def create_array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new memory-mapped array `name`.npy to be filled by a builder; OSError where the disk has no room for it."""
    file = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    with file.open("r+b") as stream:
        reserve(stream, file.stat().st_size, folder)
    return array


def reserve(stream: IO[bytes], size: int, folder: Path) -> None:
    """Takes the room for `size` bytes of a sparse file in `folder`; OSError where the disk has not so much.

    Without it, writing to a mapping of the file on a full disk would kill the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
    elif shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def get_or_build(
    root: Path | str, kind: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]
) -> Store:
    """The store of `kind` for `key`, built by `build(folder)` if there is no valid one.

    `build` writes files into the folder it is given and returns facts to be kept in the manifest.
    `key` must be JSON; it stands in the manifest in clear text. A UserError if `root` cannot be written.
    """
    path = Path(root) / kind / _digest(FORMAT, kind, key)
    with suppress(UserError):
        return Store.open(path)
    try:
        _make(path.parent, root)
        with _turn(path):
            try:
                return Store.open(path)
            except UserError as error:
                if path.exists():
                    log.warning(f"{str(error).removesuffix(ADVICE)}it is built again")
            return _build(path, kind, key, build)
    except (OSError, RuntimeError) as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise UserError(f"the cache folder {root} cannot be written ({reason}): make room or set cache_dir") from error


def _make(folder: Path, root: Path | str) -> None:
    """Makes a kind's folder; where one of the file system's own cannot have another in it, it says there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError(f"the cache folder {root} cannot be made ({error.strerror}): set cache_dir") from None


def _refusal(error: BaseException | None) -> str | None:
    """Why the disk refused to write, if the error comes from that; torch's writer hides it in a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Holds the store's lock during the block, if it can be had in time; tells for whom it waits.

    Without a lock, on a file system that has none, or in a folder where none can be made, two builders do the work
    twice, or the second one learns from the folder itself what is wrong with it.
    """
    lock = lock_of(path)
    try:
        for waited, seconds in enumerate(_waits(path), start=1):
            try:
                lock.acquire(timeout=seconds)
                break
            except TimeoutError:
                advice = "; if it hangs, stop it" if waited >= len(WAITS) else ""
                log.info(f"waiting for {path}, which is being built by {_builder(path)}{advice}")
            except (OSError, NotImplementedError):
                break
        else:
            log.warning(f"{path} is built a second time: if the other process hangs, stop it")
        yield
    finally:
        lock.release()


def _waits(path: Path) -> Iterator[float]:
    yield from WAITS
    lives = True
    while lives:  # once more after it is seen no longer: it may be putting its store into place
        lives = any(builder.alive for builder, _ in _builders(path))
        yield WAITS[-1]


def _builder(path: Path) -> str:
    """Who builds the store at `path`, and since when."""
    for builder, folder in _builders(path):
        with suppress(OSError):
            return f"process {builder.pid} on {builder.host} ({time.time() - folder.stat().st_ctime:.0f} s so far)"
    return "another process"


def _builders(path: Path) -> list[tuple[Builder, Path]]:
    """Who builds, or has left, the store at `path`, and where."""
    folders = list(path.parent.glob(f".{path.name}.tmp-*"))
    return [(builder, folder) for folder in folders if (builder := Builder.of(folder)) is not None]


def _build(path: Path, kind: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]) -> Store:
    for left in filter(abandoned, path.parent.iterdir()):
        shutil.rmtree(left, ignore_errors=True)
    folder = aside(path)
    folder.mkdir()
    try:
        facts = build(folder) or {}
        files = {file.name: _seal(file) for file in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "kind": kind, "key": key, "facts": facts, "files": files}
        manifest["sha256"] = _sha256_of_json(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _seal(folder / MANIFEST)
        _sync(folder)
        stamps = Store(folder, manifest)._stamps()
        _move_into_place(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    built = Store(path, _read_manifest(path), reused=False)
    if built._stamps() == stamps:
        built._vouch(stamps)
    return built


def _move_into_place(folder: Path, path: Path) -> None:
    """Renames `folder` to `path`; a valid store already there wins, a damaged one is replaced."""
    judged = _identity(path)
    with suppress(UserError):
        Store.open(path)
        return
    if judged is not None:
        _take_away(path, judged)
    try:
        folder.rename(path)
    except OSError:
        Store.open(path)  # another builder was faster; anything else is an error
    _sync(path.parent)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells the folder at `path` from another that takes its place; None if there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _take_away(path: Path, judged: tuple[int, int]) -> None:
    """Deletes the folder that was `judged`, no other: one that came meanwhile was put there by who mended it."""
    if _identity(path) != judged:
        return
    gone = aside(path)
    with suppress(FileNotFoundError):
        path.rename(gone)
    if _identity(gone) != judged:
        with suppress(OSError):
            gone.rename(path)
    shutil.rmtree(gone, ignore_errors=True)


def remove(path: Path) -> None:
    """Deletes the store at `path`, which is gone at once for all who look for it; nothing if there is none."""
    gone = aside(path)
    with suppress(FileNotFoundError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise OutdatedError(f"the store at {path} was made by another version of this program: {ADVICE}")
        intact = manifest["sha256"] == _sha256_of_json({k: v for k, v in manifest.items() if k != "sha256"})
        name = _digest(FORMAT, manifest["kind"], manifest["key"])
        manifest["facts"], [(int(entry["bytes"]), str(entry["sha256"])) for entry in manifest["files"].values()]
    except FileNotFoundError:
        raise UserError(f"there is no complete store at {path}: {ADVICE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, name = False, path.name
    if not intact:
        raise UserError(f"the manifest of the store at {path} is damaged: {ADVICE}")
    if name != path.name:
        raise UserError(f"the store at {path} is another one, by its manifest {name}: {ADVICE}")
    return manifest


def _digest(version: int, kind: str, key: Mapping[str, Any]) -> str:
    """The name of a store's folder."""
    return _sha256_of_json({"format": version, "kind": kind, "key": key})[:32]


def _seal(file: Path) -> dict[str, Any]:
    """Flushes a file to disk; its size and SHA-256."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return None


def _sha256_of_json(value: Any) -> str:
    """Of the value as it is read back: JSON knows neither tuples nor keys that are numbers."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
