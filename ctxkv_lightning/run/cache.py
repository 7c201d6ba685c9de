"""What lies in a cache: listed, hashed, and thinned out."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from ctxkv_lightning.builders import Builder, abandoned
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import ADVICE, MANIFEST, OutdatedError, Store, lock_of, note_of, remove

Hashing = Literal["once", "always", "never"]
State = Literal["verified", "unverified", "damaged", "outdated", "in work", "left over"]

_DIGEST = re.compile(r"[0-9a-f]{32}")
_STYLED = {
    "verified": "[green]verified[/]",
    "unverified": "not hashed on this machine yet",
    "damaged": "[red]damaged[/]",
    "outdated": "[yellow]of another version[/]",
    "in work": "[yellow]being built[/]",
    "left over": "[yellow]left by a builder that is gone[/]",
}
USELESS = ("damaged", "outdated", "left over")
"""States of what nobody can use any more."""
DAY = 86400.0


@dataclass(frozen=True)
class Entry:
    """A folder of the cache: a store, or what a builder is making or has left."""

    path: Path
    kind: str
    digest: str
    bytes: int
    age: float
    """Seconds since it was last used, or written."""
    state: State
    fault: str = ""


def entries(root: Path, hashing: Hashing = "never") -> list[Entry]:
    """Everything in the cache at `root` that has been built or begun; other folders are none of its business.

    How far stores are checked is up to `hashing`, as in `Store.open`. Raises UserError where there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: nothing is cached there yet, or --cache-dir has to name another one.")
    return [entry for path in sorted(root.glob("*/*")) if (entry := _look(path, hashing)) is not None]


def _look(path: Path, hashing: Hashing) -> Entry | None:
    builder = Builder.of(path)
    named = builder.store if builder else path.name
    if path.is_symlink() or not path.is_dir() or not _DIGEST.fullmatch(named):
        return None
    entry = Entry(path, path.parent.name, named, _size(path), _age(path), "left over")
    if builder:
        return entry if abandoned(path) else replace(entry, state="in work")
    try:
        store = Store.open(path, "never")
        if hashing == "always" or (hashing == "once" and not store.verified):
            Store.open(path, "always")
        return replace(entry, state="verified" if store.verified else "unverified")
    except OutdatedError:
        return replace(entry, state="outdated")
    except UserError as error:
        return replace(entry, state="damaged", fault=str(error).removesuffix(f": {ADVICE}"))


def prune(root: Path, older_than: float | None = None) -> list[Entry]:
    """Removes what is damaged, incomplete or left by builders that are gone; the removed entries.

    With `older_than` also stores that have not been used for so many days. What a process of this machine has mapped,
    and what is locked or being built, stays. Raises UserError where the cache cannot be written.
    """
    return [entry for entry in entries(root, "once") if _may_go(entry, older_than) and _remove(entry, older_than)]


def _may_go(entry: Entry, older_than: float | None) -> bool:
    old = older_than is not None and entry.age > older_than * DAY and entry.state != "in work"
    return old or entry.state in USELESS


def _in_use(entry: Entry) -> bool:
    inside = f"{entry.path.resolve()}{os.sep}"
    return any(file.startswith(inside) for file in mapped_files())


def _remove(entry: Entry, older_than: float | None) -> bool:
    """Removes an entry; False if somebody is at it, or has been since it was looked at: hashing takes long."""
    store = entry.path.with_name(entry.digest)
    lock = lock_of(store)
    try:
        lock.acquire(timeout=0)
        now = _look(entry.path, "once")
        if now is None or now.state != entry.state or not _may_go(now, older_than) or _in_use(now):
            return False
        if entry.state == "left over":
            shutil.rmtree(entry.path)
        else:
            remove(entry.path)
            note_of(store).unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
    except TimeoutError:
        return False
    except OSError as error:
        raise UserError(f"{entry.path} cannot be removed ({error.strerror}): ask whom it belongs to.") from error
    finally:
        lock.release()
    return True


def mapped_files() -> set[str]:
    """Files that processes of this machine have mapped, as far as they may be asked; none where there is no /proc."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text(errors="surrogateescape").splitlines()
            found |= {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return found


def show(action: Literal["list", "verify", "prune"], root: Path, older_than: float | None = None) -> bool:
    """Does what is asked and prints what came of it; False if `verify` found something damaged."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if action == "prune":
        removed = prune(root, older_than)
        freed = sum(entry.bytes for entry in removed)
        if removed:
            console.print(table(removed))
        print(f"freed {freed:,} bytes ({size(freed)}) in {len(removed)} folders of {root}")
        return True
    found = entries(root, "always" if action == "verify" else "never")
    console.print(table(found))
    damaged = [entry for entry in found if entry.state == "damaged"]
    print(*(f"{entry.fault}\n" for entry in damaged), sep="", end="")
    print(f"{len(found)} folders, {size(sum(entry.bytes for entry in found))} in {root}; {len(damaged)} damaged")
    if any(entry.state in USELESS for entry in found):
        print(ADVICE)
    return action == "list" or not damaged


def table(found: Iterable[Entry]) -> Table:
    """The entries, one a line, the largest of each kind first."""
    shown = Table("kind", "key", "size", "last used", "state")
    shown.columns[2].justify = shown.columns[3].justify = "right"
    for entry in sorted(found, key=lambda entry: (entry.kind, -entry.bytes)):
        shown.add_row(entry.kind, entry.digest[:12], size(entry.bytes), age(entry.age), _STYLED[entry.state])
    return shown


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """A time span for people: 3 days."""
    for name, length in (("day", DAY), ("hour", 3600.0), ("minute", 60.0)):
        if (count := int(seconds / length)) > 0:
            return f"{count} {name}{'s' * (count > 1)}"
    return "now"


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def _age(path: Path) -> float:
    """Seconds since the store was last opened, or its builder last wrote."""
    times = [0.0]
    for file in (path, path / MANIFEST):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(0.0, time.time() - max(times))
