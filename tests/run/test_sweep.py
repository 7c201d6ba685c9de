"""A trial's folder: run once, by one process, and never taken for what it is not."""

import errno
import fcntl
import gc
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import psutil
import pytest
from rich.console import Console

from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.run import lease, sweep
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import manifest_of, sha256_of
from ctxkv_lightning.run.sweep import Outcome, exit_code, look, read_status, run_trial

SPAWN = multiprocessing.get_context("spawn")


def finish(folder, resume=False, val_ppl=7.0):
    RunFolder(folder).write_metrics({"result": {"val_ppl": val_ppl}})
    return val_ppl


def trial(folder, run=finish, **options):
    return run_trial(folder, ["interval=2"], {"interval": 2}, run, **options)


def never(folder, resume):
    pytest.fail("it ran")


def raising(error):
    def run(folder, resume):
        raise error

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweep" / "abc"


def write(folder, metrics=None, **status):
    """A trial's folder as an earlier attempt has left it; without a given host and state, one that died here."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"state": "running", "host": socket.gethostname(), "pid": 1, "reason": None, **status}
    (folder / "status.json").write_text(json.dumps(stated))
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)


def test_the_status_of_a_finished_trial_has_what_the_contract_names(folder):
    seen = []
    assert trial(folder, lambda path, resume: seen.append(read_status(path)) or finish(path)) == 7
    (during,), after = seen, read_status(folder)
    assert during == {
        "state": "running",
        "reason": None,
        "overrides": ["interval=2"],
        "config": {"interval": 2},
        "started": during["started"],
        "ended": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "exit_code": None,
    }
    assert after == {**during, "state": "finished", "ended": after["ended"], "exit_code": 0}
    assert after["ended"] >= after["started"] > "2000"


def test_a_finished_trial_is_not_run_again(folder, capsys):
    trial(folder)
    assert trial(folder, never) == 7
    assert "abc skipped, finished with validation PPL 7.0 before: interval=2" in capsys.readouterr().out


@pytest.mark.parametrize("metrics", [None, "", "{", '{"result": {}}', '{"result": {"val_ppl": null}}', "[]"])
def test_finished_without_metrics_is_not_finished(folder, metrics):
    write(folder, metrics, state="finished")
    assert look(folder, []).state == "interrupted"
    assert trial(folder) == 7
    assert look(folder, []).val_ppl == 7


def test_metrics_are_never_deleted(folder):
    write(folder, '{"result": {"val_ppl": 5}}', state="interrupted")
    trial(folder)
    (kept,) = folder.parent.glob(".abc.before-*")
    assert json.loads((kept / "metrics.json").read_text()) == {"result": {"val_ppl": 5}}


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_an_attempt_that_came_to_nothing_makes_room(folder, state):
    write(folder, state=state)
    (folder / "checkpoints").mkdir()
    assert trial(folder, lambda path, resume: finish(RunFolder.claim(path).path)) == 7
    assert sorted(path.name for path in folder.parent.iterdir()) == [".abc.lock", "abc"]


def test_a_damaged_status_counts_as_none(folder):
    for text in ("", "{", "[]", "null", '{"state": "finished"}'):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").write_text(text)
        assert read_status(folder) is None
        assert look(folder, []).state == "interrupted"
        assert trial(folder) == 7


def test_the_users_mistake_is_told_and_kept(folder, capsys):
    assert math.isnan(trial(folder, raising(UserError("no file\na.txt."))))
    assert capsys.readouterr().err == "error in trial abc (interval=2): no file a.txt.\n"
    status = read_status(folder)
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", "no file a.txt.", EXIT_CODE)
    assert RunFolder(folder).log.read_text().endswith(" failed: no file a.txt.\n")


def test_a_bug_is_told_and_kept_with_its_traceback(folder, capsys):
    def run(path, resume):
        RunFolder(path).log.write_text("what was said before\n")
        raise RuntimeError("two\nlines")

    assert math.isnan(trial(folder, run))
    status = read_status(folder)
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", "RuntimeError: two lines", 1)
    for text in (RunFolder(folder).log.read_text(), capsys.readouterr().err):
        assert "Traceback" in text
        assert "in run" in text
    assert RunFolder(folder).log.read_text().startswith("what was said before\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_passes_through(folder, error):
    with pytest.raises(type(error)):
        trial(folder, raising(error))
    assert (look(folder, []).state, read_status(folder)["state"]) == ("interrupted", "interrupted")
    assert trial(folder) == 7


def test_quiet_drops_what_the_run_prints_but_not_how_it_ended(folder, capsys):
    trial(folder, lambda path, resume: print("chatter") or finish(path), quiet=True)
    trial(folder.with_name("def"), lambda path, resume: print("chatter") or finish(path))
    assert capsys.readouterr().out.splitlines() == [
        "trial abc starts: interval=2",
        "trial abc finished: validation PPL 7.0",
        "trial def starts: interval=2",
        "chatter",
        "trial def finished: validation PPL 7.0",
    ]


def test_what_a_trial_held_is_free_for_the_next(folder):
    held = []

    def run(path, resume):
        module = threading.Event()
        module.itself = module  # a cycle, as models have them
        held.append(weakref.ref(module))
        raise RuntimeError("out of memory")

    gc.disable()
    try:
        trial(folder, run)
        assert held[0]() is None
    finally:
        gc.enable()


def _hang(folder, resume):
    (folder / "checkpoints").mkdir()
    time.sleep(100)


def _start_and_hang(folder):
    process = SPAWN.Process(target=trial, args=(folder, _hang))
    process.start()
    while not (folder / "checkpoints").exists():
        assert process.is_alive()
        time.sleep(0.01)
    return process


def test_a_trial_that_another_process_runs_is_skipped_until_that_process_is_killed(folder, capsys):
    process = _start_and_hang(folder)
    try:
        assert math.isnan(trial(folder, never))
        assert f"process {process.pid} on {socket.gethostname()} is running it" in capsys.readouterr().out
        assert look(folder, []).state == "running"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert look(folder, []) == Outcome(
        folder, [], "interrupted", None, f"process {process.pid} on {socket.gethostname()} died", None
    )
    assert trial(folder) == 7


def _slow(folder, resume):
    with (folder.parent / "runs").open("a") as file:
        file.write(folder.name + "\n")
    time.sleep(0.02)
    return finish(folder)


def _sweep(root, barrier, seed):
    names = [f"t{number}" for number in range(12)]
    barrier.wait()
    for name in names[seed:] + names[:seed]:
        trial(root / name, _slow)


def test_processes_that_start_together_run_each_trial_once(tmp_path):
    barrier = SPAWN.Barrier(3)
    processes = [SPAWN.Process(target=_sweep, args=(tmp_path, barrier, seed)) for seed in (0, 0, 6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "runs").read_text().split()) == sorted(f"t{number}" for number in range(12))
    assert all(look(tmp_path / f"t{number}", []).state == "finished" for number in range(12))


def no_locks(descriptor, flags):
    raise OSError(errno.ENOSYS, "no locks here")


@pytest.mark.parametrize("flock", [fcntl.flock, no_locks, lambda descriptor, flags: None])
@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_the_heartbeat_decides_where_locks_say_nothing(folder, monkeypatch, flock, host):
    monkeypatch.setattr(fcntl, "flock", flock)
    write(folder, host=host)
    proven = flock is not no_locks and host == socket.gethostname() and flock.__module__ == "fcntl"
    assert look(folder, []).state == ("interrupted" if proven else "running")
    if not proven:
        assert math.isnan(trial(folder, never))
    silent = time.time() - lease.SILENT_SECONDS - 1
    os.utime(folder / "status.json", (silent, silent))
    assert look(folder, []).state == "interrupted"
    assert trial(folder) == 7


def test_a_running_trial_has_a_heartbeat(folder, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    heard, before = threading.Event(), threading.active_count()

    def run(path, resume):
        os.utime(path / "status.json", (0, 0))
        for _ in range(500):
            if (path / "status.json").stat().st_mtime > 0:
                heard.set()
                break
            time.sleep(0.01)
        return finish(path)

    trial(folder, run)
    assert heard.is_set()
    assert threading.active_count() == before


def test_who_only_looks_keeps_nobody_from_starting(folder, monkeypatch):
    folder.parent.mkdir()
    with lease.locked(folder.with_name(".abc.lock")) as held:
        assert held is True
        taken = threading.Thread(target=lambda: results.append(trial(folder)))
        results = []
        taken.start()
        time.sleep(0.15)
    taken.join()
    assert results == [7]


def test_where_there_are_no_locks_a_folder_that_appears_meanwhile_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(sweep, "make_room", lambda path: path.mkdir())
    assert math.isnan(trial(folder, never))


def test_a_status_is_replaced_as_a_whole(folder, monkeypatch):
    def die(*_):
        raise OSError(errno.ENOSPC, "no room")

    def run(path, resume):
        monkeypatch.setattr(os, "replace", die)
        return 7.0

    with pytest.raises(UserError, match="Cannot write"):
        trial(folder, run)
    assert read_status(folder)["state"] == "running"
    assert not list(folder.glob(".status*"))


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([], 0),
        ([("finished", 0), ("running", None)], 0),
        ([("finished", 0), ("failed", 2)], 2),
        ([("failed", 2), ("failed", 1)], 1),
        ([("failed", 2), ("interrupted", None)], 1),
        ([("missing", None)], 1),
    ],
)
def test_the_exit_code(tmp_path, outcomes, code):
    assert exit_code([Outcome(tmp_path, [], state, exit_code=each) for state, each in outcomes]) == code


def test_a_folder_that_is_not_there_is_missing_and_stays_so(folder):
    assert look(folder, ["a=1"]) == Outcome(folder, ["a=1"], "missing")
    assert not folder.parent.exists()


def test_the_table_shows_what_tells_trials_apart(tmp_path):
    rows = [
        Outcome(tmp_path / "abc", ["heads=4", "interval=[1,2]"], "finished", 281.34),
        Outcome(tmp_path / "def", ["heads=4", "interval=3"], "failed", reason="no [bold]file."),
    ]
    text = io.StringIO()
    Console(file=text, width=100).print(sweep.table("outputs/[x]", rows))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert lines[0] == "outputs/[x]"
    assert "abc interval=[1,2] finished 281.3" in lines
    assert "def interval=3 failed: no [bold]file. –" in lines


def test_a_worker_ends_with_its_parent(tmp_path):
    worker = "import sys, time; from ctxkv_lightning.run.lease import end_with; end_with(int(sys.argv[1])); "
    worker += "print('up', flush=True); time.sleep(100)"
    parent = (
        "import os, subprocess, sys, time; worker = subprocess.Popen([sys.executable, '-c', sys.argv[1], "
        "str(os.getpid())], stdout=subprocess.PIPE, text=True); worker.stdout.readline(); "
        "print(worker.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", parent, worker], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    deadline = time.time() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.time() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def test_a_process_that_is_no_worker_of_that_parent_is_left_alone():
    before = threading.active_count()
    lease.end_with(os.getpid())
    assert threading.active_count() == before


def test_a_sweep_is_told_without_loading_torch():
    code = "import ctxkv_lightning.run.sweep, ctxkv_lightning.door, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("state", "left", "resumed"),
    [
        ("interrupted", ("config.yaml", "data.json"), True),
        ("running", ("config.yaml", "data.json"), True),  # its process is dead
        ("interrupted", ("config.yaml",), False),  # the text had not been read
        ("failed", ("config.yaml", "data.json"), False),
    ],
)
def test_an_interrupted_trial_goes_on_and_one_that_failed_early_starts_afresh(folder, state, left, resumed):
    write(folder, state=state)
    for name in left:
        (folder / name).write_text("")
    seen = []

    def run(path, resume):
        seen.append((resume, (path / "config.yaml").exists()))
        return finish(path)

    assert trial(folder, run) == 7
    assert seen == [(resumed, resumed)]
    assert read_status(folder)["state"] == "finished"


def failed(folder, name):
    """A trial that failed with a checkpoint; the checkpoint."""
    write(folder, state="failed")
    for left in ("config.yaml", "data.json"):
        (folder / left).write_text("")
    checkpoint = folder / name
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_bytes(b"weights")
    manifest_of(checkpoint).write_text(json.dumps({"sha256": [sha256_of(checkpoint)]}))
    return checkpoint


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "pretrain.ckpt"])
def test_a_failed_trial_goes_on_from_its_checkpoint_as_often_as_it_fails(folder, name):
    checkpoint, seen = failed(folder, name), []

    def run(path, resume):
        seen.append((resume, checkpoint.read_bytes()))
        raise UserError("no room.")

    for _ in range(2):
        assert math.isnan(trial(folder, run))
        assert (look(folder, []).state, look(folder, []).reason) == ("failed", "no room.")
    assert seen == 2 * [(True, b"weights")]
    assert trial(folder) == 7


def test_a_damaged_checkpoint_is_not_deleted_either(folder):
    failed(folder, "checkpoints/last.ckpt").write_bytes(b"damaged")
    assert trial(folder, lambda path, resume: finish(path, val_ppl=8.0 if resume else 7.0)) == 7
    (kept,) = folder.parent.glob(".abc.before-*")
    assert (kept / "checkpoints" / "last.ckpt").read_bytes() == b"damaged"
