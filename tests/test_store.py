import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import Store, create_array, get_or_build

KEY = {"text": "abc", "size": 3}


def build(folder, value=1.0):
    create_array(folder, "numbers", (4, 2), np.float32)[:] = value
    return {"mean": value}


def test_a_store_is_built_once_and_then_reused(tmp_path):
    built = get_or_build(tmp_path, "thing", KEY, build)
    again = get_or_build(tmp_path, "thing", KEY, lambda folder: pytest.fail("built twice"))
    assert not built.reused
    assert again.reused
    assert again.path == built.path
    assert again.facts == {"mean": 1.0}
    assert again.manifest["key"] == KEY
    np.testing.assert_array_equal(again.array("numbers"), np.ones((4, 2)))


def test_another_key_or_kind_is_another_store(tmp_path):
    paths = {
        get_or_build(tmp_path, kind, key, build).path
        for kind, key in [("thing", KEY), ("thing", {**KEY, "size": 4}), ("other", KEY)]
    }
    assert len(paths) == 3


def test_content_depends_on_the_bytes_alone(tmp_path):
    one, other = (get_or_build(tmp_path, "thing", {"n": n}, build) for n in (1, 2))
    changed = get_or_build(tmp_path, "thing", {"n": 3}, lambda folder: build(folder, 2.0))
    assert one.content == other.content != changed.content


def test_writing_to_a_mapped_array_leaves_the_file_alone(tmp_path):
    built = get_or_build(tmp_path, "thing", KEY, build)
    built.array("numbers")[:] = 7
    np.testing.assert_array_equal(built.array("numbers"), np.ones((4, 2)))


def test_a_builder_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        build(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        get_or_build(tmp_path, "thing", KEY, fail)
    assert [path.name for path in (tmp_path / "thing").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "no manifest"])
def test_a_damaged_store_is_refused_by_name_and_rebuilt(tmp_path, damage):
    path = get_or_build(tmp_path, "thing", KEY, build).path
    match damage:
        case "truncate":
            os.truncate(path / "numbers.npy", 10)
        case "delete":
            (path / "numbers.npy").unlink()
        case "manifest":
            (path / "manifest.json").write_text("{")
        case "no manifest":
            (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=path.name):
        Store.open(path)
    rebuilt = get_or_build(tmp_path, "thing", KEY, build)
    assert not rebuilt.reused
    np.testing.assert_array_equal(rebuilt.array("numbers"), np.ones((4, 2)))
    assert {p.name for p in (tmp_path / "thing").iterdir() if p.is_dir()} == {path.name}


def _build_slowly(root, queue):
    def slow(folder):
        time.sleep(0.3)
        return build(folder)

    queue.put(get_or_build(root, "thing", KEY, slow).reused)


@pytest.mark.parametrize("locked", [True, False])
def test_two_builders_at_once_give_one_whole_store(tmp_path, locked, monkeypatch):
    if not locked:  # as on file systems where a lock succeeds for everyone
        monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    builders = [context.Process(target=_build_slowly, args=(tmp_path, queue)) for _ in range(3)]
    for builder in builders:
        builder.start()
    reused = [queue.get(timeout=30) for _ in builders]
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    if locked:
        assert sorted(reused) == [False, True, True]
    folders = [path for path in (tmp_path / "thing").iterdir() if path.is_dir()]
    assert len(folders) == 1
    np.testing.assert_array_equal(Store.open(folders[0]).array("numbers"), np.ones((4, 2)))


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written .*cache_dir"):
        get_or_build(tmp_path / "file", "thing", KEY, build)


def test_the_manifest_states_size_and_hash_of_every_file(tmp_path):
    path = get_or_build(tmp_path, "thing", KEY, build).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["numbers.npy"]["bytes"] == Path(path / "numbers.npy").stat().st_size
    assert len(manifest["files"]["numbers.npy"]["sha256"]) == 64


def test_a_folder_that_a_file_system_of_its_own_does_not_have_is_one_sentence(tmp_path, monkeypatch):
    """As below /proc, where making one says that there is no such file."""

    def mkdir(path, **options):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UserError, match=r"cannot be made \(No such file or directory\): set cache_dir"):
        get_or_build(tmp_path / "cache", "thing", {}, lambda folder: None)
