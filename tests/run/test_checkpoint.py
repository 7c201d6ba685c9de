import json
import os

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run import checkpoint
from ctxkv_lightning.run.checkpoint import BestCheckpoint, Patience, RandomState, VerifiedCheckpointIO, clear_aside
from ctxkv_lightning.run.saved import manifest_of, newest_intact, read, steps_done, verify

io = VerifiedCheckpointIO()


def save(path, step=1, **more):
    io.save_checkpoint({"global_step": step, **more}, path)


def test_what_is_saved_is_read_back(tmp_path):
    more = {"weights": torch.arange(5.0), "nested": {"a": [1, 2.5, "x", None, True]}, "half": torch.ones(2).bfloat16()}
    save(tmp_path / "sub" / "x.ckpt", 7, **more)
    found = io.load_checkpoint(tmp_path / "sub" / "x.ckpt")
    assert found["global_step"] == 7
    assert found["nested"] == more["nested"]
    assert torch.equal(found["weights"], more["weights"])
    assert found["half"].dtype == torch.bfloat16
    assert steps_done(tmp_path / "sub" / "x.ckpt") == 7
    assert steps_done(None) == 0


def test_the_manifest_states_the_sha256_that_another_program_finds(tmp_path):
    import subprocess

    save(tmp_path / "x.ckpt")
    stated = json.loads((tmp_path / "x.ckpt.json").read_text())["sha256"]
    found = subprocess.run(["sha256sum", tmp_path / "x.ckpt"], capture_output=True, text=True, check=True).stdout
    assert stated == [found.split()[0]]


def test_a_save_is_flushed_before_it_is_renamed_and_the_manifest_knows_both(tmp_path, monkeypatch):
    """At the instant of the rename, whichever file stands under the name is vouched for."""
    path, seen = tmp_path / "x.ckpt", []
    save(path, 1)
    replace, fsync, flushed = os.replace, os.fsync, []

    def look(source, target):
        seen.append((os.path.basename(target), len(flushed)))
        verify(path)
        replace(source, target)
        verify(path)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(descriptor) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", look)
    save(path, 2)
    assert [name for name, _ in seen] == ["x.ckpt.json", "x.ckpt", "x.ckpt.json"]
    assert seen[0][1] == 2, "file and manifest have been flushed"
    assert read(path)["global_step"] == 2


def test_bytes_that_the_disk_gives_back_differently_are_an_error(tmp_path, monkeypatch):
    replace = os.replace

    def spoil(source, target):
        replace(source, target)
        if str(target).endswith(".ckpt"):
            with open(target, "r+b") as file:
                file.write(b"spoilt")

    monkeypatch.setattr(os, "replace", spoil)
    with pytest.raises(UserError, match="is damaged"):
        save(tmp_path / "x.ckpt")


def test_the_newest_is_found_by_time(tmp_path):
    assert newest_intact(tmp_path) == (None, [])
    for step, name in ((2, "a.ckpt"), (1, "b.ckpt")):
        save(tmp_path / name, step)
        os.utime(tmp_path / name, (step, step))
    assert newest_intact(tmp_path) == (tmp_path / "a.ckpt", [])


def waiting(tmp_path, monkeypatch):
    """An IO for which a second of writing is worth ten, on a disk that takes one; its `best.ckpt`."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    replace = checkpoint._replace

    def write(path, content):
        replace(path, content)
        now[0] += 1.2

    monkeypatch.setattr(checkpoint, "_replace", write)
    return VerifiedCheckpointIO(["best.ckpt"]), tmp_path / "best.ckpt", now


def at_step(step, weights=None):
    return {"global_step": step, "state_dict": weights or {}}


@pytest.mark.parametrize("second", [7.9, 8.0])
def test_the_first_that_may_wait_is_written_once_its_weights_are_worth_it(tmp_path, monkeypatch, second):
    """Weights that take a second to write, of which 0.2 are free and 0.8 are worth eight of training."""
    made, best, now = waiting(tmp_path, monkeypatch)
    weights = {"table": torch.ones(25, 100), "head": torch.ones(25, 100, dtype=torch.float64)}
    monkeypatch.setattr(checkpoint, "PACE", 4 * 2500 + 8 * 2500)
    for step, at in ((1, 0.0), (2, second)):
        now[0] = at
        made.save_checkpoint(at_step(step, weights), best)
        assert best.exists() == (at >= 8)
    made.teardown()
    assert read(best)["global_step"] == 2


def test_what_may_wait_is_written_again_once_it_is_worth_it(tmp_path, monkeypatch):
    made, best, now = waiting(tmp_path, monkeypatch)
    for step, at in ((1, 0.0), (2, 3.0), (3, 11.0), (4, 11.3), (5, 12.0)):
        now[0] = at
        made.save_checkpoint(at_step(step), best)
        assert read(best)["global_step"] == {1: 1, 2: 1, 3: 1, 4: 4, 5: 4}[step]
    made.teardown()
    assert read(best)["global_step"] == 5


def test_what_waits_is_as_it_was_when_it_was_saved(tmp_path, monkeypatch):
    made, best, _ = waiting(tmp_path, monkeypatch)
    weights, epochs = torch.ones(3), [1]
    for step in (1, 2):
        made.save_checkpoint({**at_step(step, {"w": weights}), "callbacks": {"history": epochs}}, best)
    weights += 1
    epochs.append(2)
    loaded = made.load_checkpoint(best)
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(3)), "loading writes it first"
    assert loaded["callbacks"] == {"history": [1]}
    assert read(best)["global_step"] == 2


@pytest.mark.parametrize("end", ["another", "remove", "teardown"])
def test_nothing_is_written_or_removed_before_what_waits(tmp_path, monkeypatch, end):
    """Another checkpoint may say what the best was, which must then be on the disk."""
    made, best, _ = waiting(tmp_path, monkeypatch)
    last, order, write = tmp_path / "last.ckpt", [], checkpoint._replace
    monkeypatch.setattr(checkpoint, "_replace", lambda path, content: order.append(path.name) or write(path, content))
    made.save_checkpoint({"global_step": 0}, last)
    for step in (1, 2, 3):
        made.save_checkpoint(at_step(step), best)
    {
        "another": lambda: made.save_checkpoint({"global_step": 3}, last),
        "remove": lambda: made.remove_checkpoint(last),
        "teardown": made.teardown,
    }[end]()
    assert order == ["last.ckpt", "best.ckpt", "best.ckpt", *(["last.ckpt"] if end == "another" else [])]
    assert read(best)["global_step"] == 3


def test_what_waits_and_cannot_be_written_is_said(tmp_path, monkeypatch):
    made, best, _ = waiting(tmp_path, monkeypatch)
    for step in (1, 2):
        made.save_checkpoint(at_step(step), best)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        made.teardown()
    made.teardown()
    assert read(best)["global_step"] == 1


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*x\.ckpt"):
        read(tmp_path / "x.ckpt")
    save(tmp_path / "x.ckpt")
    manifest_of(tmp_path / "x.ckpt").unlink()
    with pytest.raises(UserError, match=r"x\.ckpt\.json is missing"):
        read(tmp_path / "x.ckpt")


def test_a_checkpoint_without_its_step_is_none_of_a_run(tmp_path):
    for content in ({}, {"global_step": "1"}, [1]):
        torch.save(content, tmp_path / "x.ckpt")
        (tmp_path / "x.ckpt.json").write_text(json.dumps({"sha256": [_sha256(tmp_path / "x.ckpt")]}))
        with pytest.raises(UserError, match="no global_step"):
            read(tmp_path / "x.ckpt")


def _sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_removing_takes_the_manifest_along_and_nothing_else(tmp_path):
    save(tmp_path / "x.ckpt")
    save(tmp_path / "y.ckpt")
    io.remove_checkpoint(str(tmp_path / "x.ckpt"))
    io.remove_checkpoint(str(tmp_path / "x.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.ckpt", "y.ckpt.json"]
    for path in (tmp_path / "y.ckpt.json", tmp_path / "sub" / ".." / "y.ckpt", tmp_path):
        with pytest.raises(UserError, match="is not removed"):
            io.remove_checkpoint(path)
    read(tmp_path / "y.ckpt")


def test_what_is_half_written_is_cleared_and_nothing_else(tmp_path):
    save(tmp_path / "x.ckpt")
    for name in (".aside-x.ckpt-123", ".aside-x.ckpt.json-123"):
        (tmp_path / name).write_text("half")
    clear_aside(tmp_path)
    clear_aside(tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "x.ckpt.json"]


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    torch.manual_seed(3)
    torch.rand(10)
    save(tmp_path / "x.ckpt", random=RandomState().state_dict())
    expected = torch.rand(5)
    again = RandomState()
    again.load_state_dict(read(tmp_path / "x.ckpt")["random"])
    torch.manual_seed(99)
    again.on_train_batch_start(None, None, None, 0)
    assert torch.equal(torch.rand(5), expected)
    again.on_train_batch_start(None, None, None, 1)
    assert not torch.equal(torch.rand(5), expected)


def test_the_best_of_a_moved_run_is_remembered_and_is_in_the_new_place():
    old = BestCheckpoint("/old/run/checkpoints", monitor="x")
    old.best_model_score = old.kth_value = torch.tensor(3.0)
    old.best_model_path = old.kth_best_model_path = "/old/run/checkpoints/best.ckpt"
    old.best_k_models = {old.best_model_path: torch.tensor(3.0)}
    new = BestCheckpoint("/new/checkpoints", monitor="x")
    new.load_state_dict(old.state_dict())
    assert (new.best_model_score, new.kth_value) == (3, 3)
    assert new.best_model_path == new.kth_best_model_path == "/new/checkpoints/best.ckpt"
    assert new.best_k_models == {"/new/checkpoints/best.ckpt": 3}
    untouched = BestCheckpoint("/new/checkpoints", monitor="x")
    untouched.load_state_dict(BestCheckpoint("/old", monitor="x").state_dict())
    assert (untouched.best_model_path, untouched.best_k_models) == ("", {})
    assert new.state_key == ModelCheckpoint("/new", monitor="x").state_key


def test_a_changed_patience_is_not_overruled_by_the_checkpoint():
    old, new = Patience("x", patience=1), Patience("x", patience=9)
    old.wait_count, old.best_score = 1, torch.tensor(2.0)
    new.load_state_dict(old.state_dict())
    assert (new.patience, new.wait_count, new.best_score) == (9, 1, 2)
    assert new.state_key == EarlyStopping("x").state_key


def test_a_signal_while_torch_writes_is_no_trouble_with_the_disk(tmp_path, monkeypatch):
    """torch's writer complains that it did not come to its end, which hid what a launcher's handler had raised."""
    write, calls = checkpoint._HashingWriter.write, []

    def stopped(self, data):
        calls.append(len(data))
        if len(calls) == 3:
            raise SystemExit(-1)
        return write(self, data)

    monkeypatch.setattr(checkpoint._HashingWriter, "write", stopped)
    with pytest.raises(SystemExit) as raised:
        save(tmp_path / "x.ckpt", weights={str(i): torch.zeros(50_000) for i in range(30)})
    assert raised.value.code == -1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_a_run_is_stopped_is_said(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    def stopped():
        try:
            raise SystemExit(143)
        finally:
            save(tmp_path / "x.ckpt")

    monkeypatch.setattr(checkpoint, "_replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        stopped()
