"""A store is whole or not there, whoever builds it and whatever becomes of it; nothing damaged is ever handed out."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

from ctxkv_lightning import builders
from ctxkv_lightning import store as stores
from ctxkv_lightning.builders import place
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import Store, create_array, get_or_build, note_of
from tests.faults.injections import FORK, NOBODY, common_folder, fill, flip, killed, moments, outcome, tiny_disk

ROWS = 50_000


def build(folder, value):
    create_array(folder, "first", (ROWS, 2), np.float32)[:] = value
    create_array(folder, "second", (ROWS,), np.int32)[:] = value
    return {"value": value}


def built(root, value, key=None):
    return get_or_build(root, "thing", {"value": value if key is None else key}, lambda folder: build(folder, value))


def whole(store, value):
    assert store.facts == {"value": value}
    np.testing.assert_array_equal(store.array("first"), np.full((ROWS, 2), value))
    np.testing.assert_array_equal(store.array("second"), np.full(ROWS, value))
    return store


def visible(root):
    return [path for path in (root / "thing").iterdir() if not path.name.startswith(".")]


def unfinished(root):
    return list((root / "thing").glob(".*.tmp-*"))


@pytest.mark.parametrize("locks", [True, False])
def test_a_builder_killed_at_any_moment_leaves_whole_stores_only(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    caught, first = 0, 0

    def build_forever(report):
        for value in itertools.count(first):
            built(tmp_path, value)
            report(value)

    for delay in moments(20, 0.05, seed=locks):
        reported = killed(build_forever, delay)
        caught += bool(unfinished(tmp_path))
        found = [Store.open(path, "always") for path in visible(tmp_path)]
        assert {store.facts["value"] for store in found} >= set(range(reported[-1]))
        for store in found:
            whole(store, store.facts["value"])
        first = reported[-1]
    assert caught, "no kill hit a builder: the test has shown nothing"
    whole(built(tmp_path, 10_000), 10_000)
    assert unfinished(tmp_path) == [], "what the dead have left goes with the next build"


def test_a_process_killed_while_it_replaces_a_damaged_store_leaves_none_or_a_whole_one(tmp_path):
    path = built(tmp_path, 1).path

    def damage_and_mend(report):
        while True:
            flip(path / "first.npy")
            assert not built(tmp_path, 1).reused
            report(1)

    for delay in moments(15, 0.06):
        killed(damage_and_mend, delay)
        whole(built(tmp_path, 1), 1)
        assert visible(tmp_path) == [path]


@pytest.mark.parametrize("locks", [True, False])
def test_builders_at_once_leave_one_whole_store_each(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)

    def work(report):
        report([whole(built(tmp_path, value), value).reused for value in range(5)])

    pipes = [FORK.Pipe(duplex=False) for _ in range(6)]
    children = [FORK.Process(target=work, args=(sender.send,)) for _, sender in pipes]
    for child in children:
        child.start()
    reused = [receiver.recv() for receiver, _ in pipes]
    for child in children:
        child.join()
    assert len(visible(tmp_path)) == 5
    assert unfinished(tmp_path) == []
    for path in visible(tmp_path):
        Store.open(path, "always")
    if locks:
        assert [sum(not value for value in values) for values in zip(*reused, strict=True)] == [1] * 5


def test_who_comes_second_leaves_the_first_ones_store_where_it_is(tmp_path, monkeypatch):
    """Not even for a moment is it away: others may be about to open it."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    first = []

    def overtaken(folder):
        first.append(outcome(lambda: built(tmp_path, 1).path.stat().st_ino))
        return build(folder, 1)

    store = whole(get_or_build(tmp_path, "thing", {"value": 1}, overtaken), 1)
    assert store.path.stat().st_ino == first[0]
    assert unfinished(tmp_path) == []


def test_damaged_stores_are_mended_by_several_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    for _ in range(5):
        flip(built(tmp_path, 1).path / "second.npy")
        children = [FORK.Process(target=lambda: whole(built(tmp_path, 1), 1)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4


@pytest.mark.parametrize("moment", ["before it is looked at again", "before it is taken away"])
def test_a_store_mended_since_it_was_judged_stays(tmp_path, monkeypatch, moment):
    """Without locks, two find the same store damaged; the second must not take the first one's whole one away."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    path = built(tmp_path, 1).path
    flip(path / "second.npy")
    first, name = [], {"before it is looked at again": "_take_away", "before it is taken away": "aside"}[moment]
    original = getattr(stores, name)

    def overtaken(*args):
        if not first and (name == "_take_away" or (args == (path,) and unfinished(tmp_path))):
            first.append(0)
            first[0] = outcome(lambda: built(tmp_path, 1).path.stat().st_ino)
        return original(*args)

    monkeypatch.setattr(stores, name, overtaken)
    assert whole(built(tmp_path, 1), 1).path.stat().st_ino == first[0]
    assert unfinished(tmp_path) == []


DAMAGE = {
    "flipped": lambda path: flip(path / "first.npy"),
    "flipped header": lambda path: flip(path / "first.npy", 0),
    "flipped last byte": lambda path: flip(path / "second.npy", 1),
    "truncated": lambda path: os.truncate(path / "first.npy", 1000),
    "longer": lambda path: os.truncate(path / "first.npy", 10_000_000),
    "empty": lambda path: os.truncate(path / "first.npy", 0),
    "missing": lambda path: (path / "first.npy").unlink(),
    "a folder": lambda path: ((path / "first.npy").unlink(), (path / "first.npy").mkdir()),
    "zeros": lambda path: (path / "first.npy").write_bytes(bytes((path / "first.npy").stat().st_size)),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest empty": lambda path: (path / "manifest.json").write_text(""),
    "manifest truncated": lambda path: os.truncate(path / "manifest.json", 300),
    "manifest no object": lambda path: (path / "manifest.json").write_text("[3]"),
    "manifest without files": lambda path: rewrite(path, files=None),
    "facts changed": lambda path: rewrite(path, facts={"value": 8}),
    "no facts": lambda path: rewrite(path, sealed=True, facts=None, files={"../x": {}}),
    "files elsewhere": lambda path: rewrite(path, sealed=True, files={"../x": {"bytes": 1, "sha256": "0"}}),
    "another key": lambda path: rewrite(path, sealed=True, key={"value": 8}),
    "another kind": lambda path: rewrite(path, sealed=True, kind="other"),
    "another format": lambda path: rewrite(path, sealed=True, format=stores.FORMAT - 1),
    "format of the future": lambda path: rewrite(path, sealed=True, format="4"),
}


def rewrite(path, sealed=False, **changes):
    """Changes the manifest; `sealed` with a right hash, as another program's would have."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    if sealed:
        manifest["sha256"] = stores._sha256_of_json({k: v for k, v in manifest.items() if k != "sha256"})
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_by_name_and_built_again(tmp_path, damage, caplog):
    path = whole(built(tmp_path, 7), 7).path
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=path.name):
        Store.open(path)
    with caplog.at_level(logging.WARNING, "ctxkv_lightning"):
        assert not whole(built(tmp_path, 7), 7).reused
    assert "it is built again" in caplog.text
    assert built(tmp_path, 7).reused
    assert visible(tmp_path) == [path]
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("where", [i / 40 for i in range(40)])
def test_a_bit_flipped_anywhere_in_the_manifest_is_found_or_changes_nothing(tmp_path, where):
    path = built(tmp_path, 7).path
    before = json.loads((path / "manifest.json").read_text())
    flip(path / "manifest.json", where)
    with contextlib.suppress(UserError):
        assert Store.open(path).manifest == before
    whole(built(tmp_path, 7), 7)


def test_a_flip_that_keeps_the_time_of_the_file_is_found(tmp_path):
    path = built(tmp_path, 7).path
    before = (path / "first.npy").stat()
    flip(path / "first.npy")
    os.utime(path / "first.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"first\.npy is damaged"):
        Store.open(path)


def test_another_stores_folder_under_this_name_is_not_taken_for_it(tmp_path):
    one, other = built(tmp_path, 1).path, built(tmp_path, 2).path
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(UserError, match=f"{one.name} is another one, by its manifest {other.name}"):
        Store.open(one)
    whole(built(tmp_path, 1), 1)


def test_files_are_hashed_once_and_again_after_any_change_or_start_of_the_machine(tmp_path, monkeypatch):
    path, hashed = built(tmp_path, 7).path, []
    sha256 = stores._sha256
    monkeypatch.setattr(stores, "_sha256", lambda file: hashed.append(file.name) or sha256(file))

    def opened():
        stores._verified_here.clear()  # another process
        hashed.clear()
        Store.open(path)
        return sorted(hashed)

    both = ["first.npy", "second.npy"]
    assert opened() == []
    os.utime(path / "first.npy")
    assert opened() == both
    assert opened() == []
    shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "copy", path)
    assert opened() == both
    text_of = stores._text_of
    monkeypatch.setattr(stores, "_text_of", lambda file: "restarted" if file.name == "boot_id" else text_of(file))
    assert opened() == both
    assert opened() == []
    note_of(path).write_text("half a no")
    assert opened() == both
    note_of(path).unlink()
    note_of(path).mkdir()  # no note can be kept: once in each process
    assert opened() == both
    hashed.clear()
    Store.open(path)
    assert hashed == []


@pytest.mark.parametrize("how", ["array", "file", "weights"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(how):
    def too_much(folder):
        match how:
            case "array":
                create_array(folder, "big", (10_000_000,), np.float32)[:] = 1
            case "file":
                (folder / "big").write_bytes(bytes(40_000_000))
            case "weights":
                with (folder / "big").open("wb") as file:
                    torch.save(torch.zeros(10_000_000), file)

    with tiny_disk(4000) as disk:
        kept = built(disk, 1)
        error = outcome(lambda: get_or_build(disk, "big", {}, too_much))
        assert isinstance(error, UserError), error
        assert str(error) == (
            f"the cache folder {disk} cannot be written (No space left on device): make room or set cache_dir"
        )
        assert [path.name for path in (disk / "big").iterdir() if path.is_dir()] == []
        whole(Store.open(kept.path, "always"), 1)


def test_a_disk_that_fills_up_at_any_moment_of_a_build_leaves_none_or_a_whole_one():
    size, results = ROWS * 12, set()
    for leave in [0, 8192, *range(size - 8192, size + 40_000, 4096)]:
        with tiny_disk(4000) as disk:
            fill(disk, leave)
            result = outcome(lambda: whole(built(disk, 1), 1).reused)
            results.add(type(result))
            (disk / "filler").unlink()
            assert whole(built(disk, 1), 1).reused == (result is False)
    assert results == {UserError, bool}


def test_a_complete_cache_that_cannot_be_written_is_used():
    with common_folder() as root:
        path = built(root, 1).path
        note_of(path).unlink()
        for folder in (path, path.parent, root):
            folder.chmod(0o555)
        assert outcome(lambda: (stores._verified_here.clear(), whole(built(root, 1), 1).reused)[1], NOBODY) is True
        assert not note_of(path).exists() or os.getuid() != 0
        error = outcome(lambda: built(root, 2), NOBODY)
        assert isinstance(error, UserError), error
        assert "cannot be written (Permission denied): make room or set cache_dir" in str(error)
        for folder in (root, path.parent, path):
            folder.chmod(0o755)
        flip(path / "first.npy")
        for folder in (path, path.parent, root):
            folder.chmod(0o555)
        error = outcome(lambda: built(root, 1), NOBODY)
        assert isinstance(error, UserError), "what is damaged is not handed out because it cannot be built again"
        for folder in (root, path.parent, path):
            folder.chmod(0o755)


def test_a_cache_on_a_disk_mounted_read_only_is_used():
    with tiny_disk(4000) as disk:
        path = built(disk, 1).path
        note_of(path).unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        stores._verified_here.clear()
        assert whole(built(disk, 1), 1).reused
        with pytest.raises(UserError, match="Read-only file system"):
            built(disk, 2)


def test_a_file_that_may_not_be_read_is_no_store():
    with common_folder() as root:
        path = built(root, 1).path
        (path / "first.npy").chmod(0)
        error = outcome(lambda: (stores._verified_here.clear(), Store.open(path, "always"))[1], NOBODY)
        assert isinstance(error, UserError), error


def test_somebody_elses_lock_keeps_nobody_out():
    with common_folder() as root:
        (root / "thing").mkdir(mode=0o777)
        (root / "thing").chmod(0o777)
        path = root / "thing" / stores._digest(stores.FORMAT, "thing", {"value": 1})
        lock = stores.lock_of(path)
        with lock:
            os.chmod(lock.lock_file, 0o600)
        assert outcome(lambda: whole(built(root, 1), 1).reused, NOBODY) is False


def being_built(root, seconds, by=lambda: None):
    """A process that builds the store of value 1 for so long, and has begun; it calls `by` first."""

    def slow(folder):
        time.sleep(seconds)
        return build(folder, 1)

    def work():
        by()
        get_or_build(root, "thing", {"value": 1}, slow)

    child = FORK.Process(target=work)
    child.start()
    while not unfinished(root):
        time.sleep(0.01)
    return child


def test_who_waits_is_told_for_whom_and_builds_in_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stores, "WAITS", (0.2, 0.2))
    child = being_built(tmp_path, 2, lambda: monkeypatch.setattr(builders, "place", lambda: "0" * 8))
    with caplog.at_level(logging.INFO, "ctxkv_lightning"):
        assert not whole(built(tmp_path, 1), 1).reused
    child.join()
    assert child.exitcode == 0
    assert f"is being built by process {child.pid} on {os.uname().nodename} (" in caplog.text
    assert "is built a second time" in caplog.text
    assert len(visible(tmp_path)) == 1
    whole(Store.open(visible(tmp_path)[0], "always"), 1)


def test_who_builds_here_and_lives_is_waited_for_however_long_it_takes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stores, "WAITS", (0.1, 0.5))
    child = being_built(tmp_path, 1.5)
    with caplog.at_level(logging.INFO, "ctxkv_lightning"):
        assert whole(built(tmp_path, 1), 1).reused
    child.join()
    assert "a second time" not in caplog.text
    assert "; if it hangs, stop it" in caplog.text


def test_who_waits_long_enough_gets_what_the_other_has_built(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "WAITS", (0.2, 10))
    child = being_built(tmp_path, 0.6)
    assert whole(built(tmp_path, 1), 1).reused
    child.join()


def test_folders_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    folder = tmp_path / "thing"
    folder.mkdir()
    names = {who: f".{'0' * 32}.tmp-{rest}-00000000" for who, rest in others().items()}
    for name in names.values():
        (folder / name).mkdir()
        (folder / name / "half.npy").write_text("x")
    for path in (folder / names["silent elsewhere"], folder / names["silent elsewhere"] / "half.npy"):
        os.utime(path, (1, 1))
    (folder / "notes.tmp-x").mkdir()
    built(tmp_path, 1)
    left = {path.name for path in folder.iterdir()}
    assert {who for who, name in names.items() if name in left} == {"alive here", "elsewhere"}
    assert "notes.tmp-x" in left


def others():
    host = os.uname().nodename
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    return {
        "dead here": f"{host}-{place()}-{ended.pid}",
        "alive here": f"{host}-{place()}-{os.getppid()}",
        "elsewhere": f"other-machine-ffffffff-{ended.pid}",
        "silent elsewhere": f"other-machine-eeeeeeee-{ended.pid}",
    }
