"""Who may work on a folder, and until when.

A lock that dies with its holder, a heartbeat where locks cannot be trusted, and workers that end with their parent.
"""

import fcntl
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT_SECONDS = 15.0
SILENT_SECONDS = 180.0
"""How long a process on another machine may say nothing before it counts as dead."""
TRIES = 5
"""A tenth of a second apart: who only looks whether somebody works there holds the lock for an instant."""


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Tries to hold the lock file `path` during the block: whether it is held, None if the file system cannot tell.

    The kernel lets go of it when the process dies, however it dies. Some network file systems have no locks, and on
    some everyone gets them, which a second try of one's own shows.
    """
    with path.open("a") as file:
        for wait in (0.1,) * (TRIES - 1) + (0.0,):
            taken = _lock(file.fileno())
            if taken is not False:
                break
            time.sleep(wait)
        yield None if taken and not _keeps_out(path) else taken


def _lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _keeps_out(path: Path) -> bool:
    with path.open("a") as file:
        return _lock(file.fileno()) is False


def alive(host: str, lock: Path, held: bool | None, beats: Path) -> bool:
    """Whether the process of `host` that said it works here still does, given what `locked(lock)` said.

    A lock that could be had proves the death of a process of this machine. It proves nothing about another
    machine, since there are mounts that keep locks to themselves: there the time of `beats` decides.
    """
    if held is False:
        return True
    if held and host == socket.gethostname():
        return False
    return _silence(lock, beats) < SILENT_SECONDS


def _silence(lock: Path, beats: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system, which all machines share."""
    os.utime(lock)
    try:
        return lock.stat().st_mtime - beats.stat().st_mtime
    except FileNotFoundError:
        return math.inf


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Touches `file` every now and then while the block runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent, process `parent`, is gone; nothing happens in any other process.

    joblib's workers would finish what is queued for a sweep that was killed, and may then wait for ever.
    """
    if os.getppid() != parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
