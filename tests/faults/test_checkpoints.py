"""A checkpoint is whole or not there, whatever happens while it is written or afterwards."""

import itertools
import os
import pickle
import random
import tempfile
from functools import partial

import numpy as np
import pytest
import torch

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.checkpoint import ASIDE, VerifiedCheckpointIO, clear_aside
from ctxkv_lightning.run.saved import manifest_of, newest_intact, read, verify
from tests.faults.injections import NOBODY, common_folder, fill, flip, killed, moments, outcome, tiny_disk, vouch_for

FLOATS = 200_000
io = VerifiedCheckpointIO()


def checkpoint(step, floats=FLOATS):
    # By numpy: torch's thread pool does not survive a fork, and a parallel fill in the child would wait for ever.
    weights = torch.from_numpy(np.full(floats, step, np.float32))
    return {"global_step": step, "weights": weights, "state": {"lr": 0.1, "seen": [step]}}


def save_forever(folder, first, report):
    """As a run does it: the last one over and over, and every third time another file, the best, as well."""
    for step in itertools.count(first):
        if step % 3 == 0:
            io.save_checkpoint(checkpoint(step), folder / "best.ckpt")
        io.save_checkpoint(checkpoint(step), folder / "last.ckpt")
        report(step)


def whole(path):
    found = read(path)
    assert found["weights"].tolist() == [float(found["global_step"])] * FLOATS
    return found["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_process_killed_while_it_saves_leaves_the_newest_one_whole(tmp_path, monkeypatch, elsewhere):
    if elsewhere:
        if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system")
        monkeypatch.setenv("TMPDIR", "/dev/shm")
        monkeypatch.setattr(tempfile, "tempdir", None)
    folder, step, caught = tmp_path / "checkpoints", 0, 0
    folder.mkdir()
    for delay in moments(30, 0.06, seed=elsewhere):
        saved = killed(partial(save_forever, folder, step + 1), delay)
        caught += any(folder.glob(f"{ASIDE}*"))
        clear_aside(folder)
        assert not list(folder.glob(f"{ASIDE}*"))
        for path in folder.glob("*.ckpt"):
            whole(path)
        newest, complaints = newest_intact(folder)
        assert complaints == []
        step = whole(newest)
        assert step in (saved[-1], saved[-1] + 1), "what was reported as saved is there"
    assert caught, "no kill hit a save: the test has shown nothing"
    assert {path.name for path in folder.iterdir()} == {
        name for best in ("last", "best") for name in (f"{best}.ckpt", f"{best}.ckpt.json")
    }


def test_a_full_disk_leaves_what_was_saved_before(tmp_path):
    with tiny_disk(3000) as disk:
        io.save_checkpoint(checkpoint(1), disk / "last.ckpt")
        error = outcome(lambda: io.save_checkpoint(checkpoint(2, 1_000_000), disk / "last.ckpt"))
        assert isinstance(error, UserError)
        assert "last.ckpt cannot be written (No space left on device): make room" in str(error)
        assert whole(disk / "last.ckpt") == 1
        assert sorted(path.name for path in disk.iterdir()) == ["last.ckpt", "last.ckpt.json"]


def test_a_disk_that_fills_up_at_any_moment_of_a_save_leaves_a_whole_one():
    size, results = FLOATS * 4, set()
    for leave in [0, size // 2, *range(size, size + 32_000, 4096)]:
        with tiny_disk(4000) as disk:
            io.save_checkpoint(checkpoint(1), disk / "last.ckpt")
            fill(disk, leave)
            result = outcome(lambda: io.save_checkpoint(checkpoint(2), disk / "last.ckpt"))
            results.add(type(result))
            assert whole(disk / "last.ckpt") in ((2,) if result is None else (1, 2))
            assert not list(disk.glob(f"{ASIDE}*"))
    assert results == {UserError, type(None)}


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "flipped in the middle": flip,
    "flipped at the start": lambda path: flip(path, 0),
    "flipped at the end": lambda path: flip(path, 1),
    "truncated": truncate,
    "empty": lambda path: os.truncate(path, 0),
    "no manifest": lambda path: manifest_of(path).unlink(),
    "flipped manifest": lambda path: flip(manifest_of(path)),
    "empty manifest": lambda path: manifest_of(path).write_text(""),
    "manifest of nothing": lambda path: manifest_of(path).write_text('{"sha256": []}'),
    "manifest of null": lambda path: manifest_of(path).write_text('{"sha256": null}'),
    "manifest is a list": lambda path: manifest_of(path).write_text("[1]"),
    "manifest of numbers": lambda path: manifest_of(path).write_text('{"sha256": [1, null]}'),
    "manifest is no text": lambda path: manifest_of(path).write_bytes(b"\xff\xfe"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_found(tmp_path, damage):
    for step, name in enumerate(["best.ckpt", "last.ckpt"], start=1):
        io.save_checkpoint(checkpoint(step), tmp_path / name)
        os.utime(tmp_path / name, (step, step))
    DAMAGE[damage](tmp_path / "last.ckpt")
    os.utime(tmp_path / "last.ckpt", (9, 9))
    for action in (verify, read, io.load_checkpoint):
        with pytest.raises(UserError, match=r"last\.ckpt"):
            action(tmp_path / "last.ckpt")
    usable, complaints = newest_intact(tmp_path)
    assert usable == tmp_path / "best.ckpt"
    assert len(complaints) == 1
    assert "last.ckpt" in complaints[0]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_that_are_no_checkpoint_are_refused_even_with_a_manifest(tmp_path):
    path, generator = tmp_path / "x.ckpt", random.Random(0)
    io.save_checkpoint(checkpoint(1, 100), path)
    good = path.read_bytes()
    contents = [
        b"",
        b"PK\x03\x04",
        b"\x80\x02.",
        b"\x80\x04N.",
        pickle.dumps({"global_step": "1"}),
        good[:-100],
        good[100:],
    ]
    contents += [b"\x80\x02" + generator.randbytes(generator.randrange(40)) + b"." for _ in range(200)]
    for content in contents:
        path.write_bytes(content)
        vouch_for(path)
        with pytest.raises(UserError, match="is not read"):
            read(path)


def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_lost():
    with common_folder() as folder:
        io.save_checkpoint(checkpoint(1), folder / "last.ckpt")
        folder.chmod(0o555)
        for name in ("last.ckpt", "new.ckpt", "sub/new.ckpt"):
            error = outcome(lambda: io.save_checkpoint(checkpoint(2), folder / name), NOBODY)  # noqa: B023
            assert isinstance(error, UserError), error
            assert "cannot be written (Permission denied)" in str(error)
        assert outcome(lambda: whole(folder / "last.ckpt"), NOBODY) == 1
        folder.chmod(0o755)


def test_one_that_cannot_be_read_is_refused():
    with common_folder() as folder:
        io.save_checkpoint(checkpoint(1), folder / "last.ckpt")
        (folder / "last.ckpt").chmod(0)
        error = outcome(lambda: read(folder / "last.ckpt"), NOBODY)
        assert isinstance(error, UserError), error
        assert "Permission denied" in str(error)


def test_a_folder_removed_meanwhile_comes_back(tmp_path):
    io.save_checkpoint(checkpoint(1), tmp_path / "gone" / "last.ckpt")
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    (tmp_path / "gone").rmdir()
    io.save_checkpoint(checkpoint(2), tmp_path / "gone" / "last.ckpt")
    assert whole(tmp_path / "gone" / "last.ckpt") == 2


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    path = tmp_path / "last.ckpt"
    for step, delay in enumerate(moments(5, 0.05)):
        killed(lambda report: (report(0), save_forever(tmp_path, 100, report)), delay)
        io.save_checkpoint(checkpoint(step), path)
        assert whole(path) == step
