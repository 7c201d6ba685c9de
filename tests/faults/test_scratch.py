"""A disk without room for Phase 1's file is one sentence, not a process that dies of a signal."""

import os
import tempfile

import pytest
import torch

from ctxkv_lightning.context import pretrain
from ctxkv_lightning.context.pretrain import scratch
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import get_or_build
from tests.faults.injections import fill, outcome, tiny_disk

ROWS, COLUMNS = 5000, 100
SIZE = ROWS * COLUMNS * 4


@pytest.fixture(autouse=True)
def _file_backed(monkeypatch):
    monkeypatch.setattr(pretrain, "FILE_BACKED", 1)


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk of 4 MB that temporary files go to, but for those of pytest, which has made its folder by now."""
    with tiny_disk(4000) as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


def written(folder=None):
    contexts = scratch(ROWS, COLUMNS, torch.device("cpu"))
    contexts.numpy()[:] = 3  # not by torch, whose threads do not survive a fork
    return float(contexts.numpy().sum())


@pytest.mark.parametrize("reserving", [True, False])
def test_a_temporary_folder_that_is_too_small_is_one_sentence(disk, reserving, monkeypatch):
    if not reserving:
        monkeypatch.delattr(os, "posix_fallocate")
    fill(disk, SIZE - 8192)
    error = outcome(written)
    assert isinstance(error, UserError), error
    assert str(error) == (
        f"Phase 1 needs a file of {SIZE:,} bytes in {disk} (No space left on device): make room there, or set TMPDIR "
        "to a folder that has it"
    )
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_it_is_not_taken_for_a_full_cache(tmp_path, disk):
    fill(disk, 0)
    with pytest.raises(UserError, match="set TMPDIR"):
        get_or_build(tmp_path, "encoder", {}, written)


def test_a_temporary_folder_that_is_large_enough_is_used_up_to_its_last_block(disk):
    fill(disk, SIZE + 8192)
    assert outcome(written) == 3 * ROWS * COLUMNS


def test_no_temporary_folder_at_all_is_one_sentence(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(UserError, match=r"in a folder for temporary files \(No usable temporary directory found"):
        written()
