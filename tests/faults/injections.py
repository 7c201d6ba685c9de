"""What goes wrong in the field, done on purpose: processes killed, disks full, bytes flipped, rights missing."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctxkv_lightning.run.saved import manifest_of

FORK = multiprocessing.get_context("fork")
"""Children begin with everything imported: a hundred of them take seconds."""

NOBODY = 65534


def killed(work: Callable[[Any], None], seconds: float) -> list[Any]:
    """Runs `work(report)` in a process of its own, SIGKILLs it so long after its first report; what it reported."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(sender.send,))
    child.start()
    sender.close()
    assert receiver.poll(60), "the child has not reported anything"
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode == -9, "the child ended before it was killed"
    reported = []
    with contextlib.suppress(EOFError):
        while receiver.poll():
            reported.append(receiver.recv())
    return reported


def moments(count: int, longest: float, seed: int = 0) -> list[float]:
    """So many random delays up to `longest` seconds."""
    generator = random.Random(seed)
    return [generator.uniform(0, longest) for _ in range(count)]


def outcome(work: Callable[[], Any], user: int | None = None) -> Any:
    """What `work()` returns, or raises, in a process of its own, of another user if root asks for one.

    A child that dies of a signal is an AssertionError: nothing that is tested here may end so.
    """

    def run(sender: Any) -> None:
        if user is not None and os.getuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        try:
            sender.send(work())
        except BaseException as error:
            error.__cause__ = error.__context__ = None  # the pipe may not take it
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            sender.send(error)

    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=run, args=(sender,))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the process died without a word, exit code {child.exitcode}") from None
    finally:
        child.join()


def flip(file: Path, where: float = 0.5) -> None:
    """Flips one bit of the file, at this part of its length."""
    content = bytearray(file.read_bytes())
    content[min(int(len(content) * where), len(content) - 1)] ^= 1
    file.write_bytes(content)


def vouch_for(checkpoint: Path) -> None:
    """Writes a correct manifest for a checkpoint, as somebody would who wants it to be read."""
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    manifest_of(checkpoint).write_text(json.dumps({"sha256": [digest]}))


@contextlib.contextmanager
def tiny_disk(kilobytes: int) -> Iterator[Path]:
    """A disk of this size; the test is skipped where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no tmpfs can be mounted here ({error})")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def common_folder() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's own forbid."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def fill(folder: Path, leave: int) -> None:
    """Takes the room on a disk but for so many bytes, in whole blocks."""
    usage = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        file.write(bytes(max(0, usage.f_bavail * usage.f_frsize - leave)))
