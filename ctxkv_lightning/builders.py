"""Folders that are being built: their names say by which process, so that those of the dead can be told apart."""

import hashlib
import os
import re
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ABANDONED_SECONDS = 7 * 86400
"""How long a builder that cannot be asked, being on another machine, may leave its folder alone before it counts as
dead. Training an encoder writes nothing until it is over."""

_NAME = re.compile(r"\.(?P<store>[0-9a-f]{32})\.tmp-(?P<host>.+)-(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Builder:
    """The process that builds, or has left, a folder."""

    store: str
    host: str
    place: str
    pid: int

    @classmethod
    def of(cls, folder: Path) -> "Builder | None":
        """By the folder's name; None for any other folder."""
        found = _NAME.fullmatch(folder.name)
        return cls(**{**found.groupdict(), "pid": int(found["pid"])}) if found else None  # type: ignore[arg-type]

    @property
    def alive(self) -> bool | None:
        """Whether somebody here has its number; None for processes of other machines."""
        if self.place != place():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # it is there, and not ours to ask
        return True


def aside(path: Path) -> Path:
    """A name beside `path` for what this process is building, or deleting."""
    token = uuid.uuid4().hex[:8]
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{place()}-{os.getpid()}-{token}")


def place() -> str:
    """Where process numbers mean what they mean here: the machine, and the container's own counting of processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def abandoned(folder: Path, seconds: float = ABANDONED_SECONDS) -> bool:
    """Whether `folder` was being built by a process that is dead, or has been left alone for so long."""
    builder = Builder.of(folder)
    return builder is not None and (builder.alive is False or silence(folder) > seconds)


def silence(folder: Path) -> float:
    """Seconds since anything in the folder was written."""
    times = [0.0]
    with suppress(OSError):
        times += [path.stat().st_mtime for path in (folder, *folder.iterdir())]
    return time.time() - max(times)
