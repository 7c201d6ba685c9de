import os
import re

import numpy as np
import pytest

from ctxkv_lightning import store as stores
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.builders import aside
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run import cache
from ctxkv_lightning.run.cache import age, entries, prune, size
from ctxkv_lightning.store import create_array, get_or_build, lock_of, note_of
from tests.faults.injections import FORK, flip


def built(root, value, kind="thing"):
    def build(folder):
        create_array(folder, "numbers", (1000,), np.float32)[:] = value

    return get_or_build(root, kind, {"value": value}, build).path


def left_over(root):
    """What a killed builder leaves."""

    def die():
        get_or_build(root, "thing", {"value": "dead"}, lambda folder: os._exit(1))

    child = FORK.Process(target=die)
    child.start()
    child.join()
    (folder,) = (root / "thing").glob(".*.tmp-*")
    (folder / "half.npy").write_bytes(bytes(1000))
    return folder


def states(root, hashing="never"):
    return {entry.path: entry.state for entry in entries(root, hashing)}


def test_every_state_has_its_name(tmp_path):
    verified, unverified, truncated, old = (built(tmp_path, value) for value in range(4))
    os.utime(unverified / "numbers.npy")
    os.truncate(truncated / "numbers.npy", 10)
    manifest = (old / "manifest.json").read_text()
    (old / "manifest.json").write_text(manifest.replace(f'"format": {stores.FORMAT}', '"format": 2'))
    left = left_over(tmp_path)
    working = aside(verified)
    working.mkdir()
    (tmp_path / "thing" / "notes").mkdir()
    assert states(tmp_path) == {
        verified: "verified",
        unverified: "unverified",
        truncated: "damaged",
        old: "outdated",
        left: "left over",
        working: "in work",
    }
    assert states(tmp_path, "always")[unverified] == "verified"
    assert states(tmp_path)[unverified] == "verified"


def test_verify_names_what_is_damaged_and_exits_with_1(tmp_path, capsys):
    good, bad = built(tmp_path, 1), built(tmp_path, 2)
    assert main(["cache", "verify", "--cache-dir", str(tmp_path)]) == 0
    assert "2 folders" in capsys.readouterr().out
    flip(bad / "numbers.npy")
    stamps = stores.Store(bad, stores._read_manifest(bad))._stamps()
    stores.Store(bad, stores._read_manifest(bad))._vouch(stamps)  # as if a disk had rotted: nothing shows but the bytes
    assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 0
    assert "0 damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["cache", "verify", "--cache-dir", str(tmp_path)])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"{bad}/numbers.npy is damaged" in said
    assert str(good) not in said
    assert "1 damaged" in said
    with pytest.raises(UserError, match="is damaged"):
        stores.Store.open(bad)


def test_list_has_a_line_for_each_store(tmp_path, capsys):
    path = built(tmp_path, 1, "tokens")
    os.utime(path, (0, 0))
    os.utime(path / "manifest.json", (0, 0))
    assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "tokens" in line)
    assert re.search(rf"tokens .*{path.name[:12]} .* 4\.\d kB .* \d+ days .* verified", line)


def test_prune_removes_what_nobody_can_use_and_counts_it(tmp_path, capsys):
    good, flipped, truncated = (built(tmp_path, value) for value in range(3))
    flip(flipped / "numbers.npy")
    (truncated / "manifest.json").unlink()
    left = left_over(tmp_path)
    gone = [flipped, truncated, left]
    expected = sum(file.stat().st_size for folder in gone for file in folder.iterdir())
    assert main(["cache", "prune", "--cache-dir", str(tmp_path)]) == 0
    assert f"freed {expected:,} bytes" in capsys.readouterr().out
    assert states(tmp_path) == {good: "verified"}
    assert not note_of(flipped).exists()
    assert prune(tmp_path) == []


def test_prune_touches_nothing_else(tmp_path):
    for name in ("a/b", "thing/notes", "thing/.hidden", "x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("mine")
    (tmp_path / "thing" / ("0" * 32)).symlink_to(tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    assert prune(tmp_path, 0) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_prune_keeps_what_is_being_built_locked_or_mapped(tmp_path):
    mapped, locked, idle = (built(tmp_path, value) for value in range(3))
    working = aside(tmp_path / "thing" / ("0" * 32))
    working.mkdir()
    array = np.load(mapped / "numbers.npy", mmap_mode="r")
    flip(locked / "numbers.npy")
    with lock_of(locked):
        assert [entry.path for entry in prune(tmp_path, 0)] == [idle]
    assert array[0] == 0
    del array
    assert {entry.path for entry in prune(tmp_path, 0)} == {mapped, locked}
    assert working.is_dir()


@pytest.mark.parametrize("how", ["opened", "mapped"])
def test_what_comes_into_use_while_others_are_hashed_stays(tmp_path, monkeypatch, how):
    came, idle = built(tmp_path, 1), built(tmp_path, 2)
    for path in (came, idle):
        os.utime(path, (0, 0))
        os.utime(path / "manifest.json", (0, 0))
    look, held = cache.entries, []

    def hashing_takes_long(root, hashing):
        found = look(root, hashing)
        if how == "opened":
            stores.Store.open(came)
        else:
            held.append(np.load(came / "numbers.npy", mmap_mode="r"))
        return found

    monkeypatch.setattr(cache, "entries", hashing_takes_long)
    assert [entry.path for entry in prune(tmp_path, 7)] == [idle]
    assert (came / "numbers.npy").exists()


def test_what_was_used_lately_is_not_old(tmp_path):
    used, unused = built(tmp_path, 1), built(tmp_path, 2)
    for path in (used, unused):
        os.utime(path, (0, 0))
        os.utime(path / "manifest.json", (0, 0))
    built(tmp_path, 1)
    assert main(["cache", "verify", "--cache-dir", str(tmp_path)]) == 0  # which is no use
    assert [entry.path for entry in prune(tmp_path, 7)] == [unused]
    assert used.is_dir()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "--cache-dir", "nowhere"], "nowhere is no folder"),
        (["list", "--older-than", "3"], "--older-than goes with prune"),
        (["prune", "--older-than", "-1"], "at least 0"),
        (["prune", "--older-than", "nan"], "at least 0"),
        (["delete"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert main(["cache", *words]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (12.34e9, "12.3 GB")]
)
def test_sizes_are_readable(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "now"), (60, "1 minute"), (7200, "2 hours"), (86400, "1 day"), (1e6, "11 days")]
)
def test_ages_are_readable(seconds, text):
    assert age(seconds) == text
