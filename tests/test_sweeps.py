"""Sweeps through train.py: where they land, what a repeated command runs, presets, launchers."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from hydra.core.global_hydra import GlobalHydra

from ctxkv_lightning.door import EXTRAS, check_command_line, read_command_line
from ctxkv_lightning.errors import EXIT_CODE, UserError
from tests.test_door import ROOT, door

SWEEP = ("-m", "interval=2,3,4", "hydra.sweep.dir=sweep")
TOLD = "print(f'ran {config.interval}'); "
SMALL = shlex.split(
    "context_dim=16 samples=8 tokenizer.vocab_size=400 embedding.dim=32 model.ffn_dim=64 data.heldout_bytes=8000 "
    "pretrain.max_iterations=3 train.max_epochs=1 train.batch_tokens=2000 heads=2"
)


def statuses(folder):
    """The status.json of each trial in a sweep's folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/status.json"))]


def states(folder):
    return sorted((status["config"]["interval"], status["state"]) for status in statuses(folder))


def all_metrics(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/metrics.json"))]


def ran(done):
    """The intervals that a stand-in pipeline was run with, in order."""
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ran ")]


def folder_of(*arguments):
    return read_command_line(list(arguments)).named_folder


def test_the_same_trials_share_a_folder_however_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = folder_of("-m", "interval=20,50", "heads=8")
    assert one.startswith("outputs/sweeps/")
    assert folder_of("-m", "interval=50,20") == one
    assert folder_of("-m", "interval=20,50", "cache_dir=elsewhere") == one
    assert folder_of("-m", "interval=20,51") != one
    assert folder_of("-m", "interval=20,50", "hydra.sweep.dir=mine") == "mine"


def test_a_repeated_command_runs_nothing_and_says_so(tmp_path):
    body = TOLD + "return finish(folder, config.interval)"
    first = door(tmp_path, "-m", "interval=2,3", body=body)
    again = door(tmp_path, "-m", "interval=3,2", body=body)
    assert (first.returncode, again.returncode) == (0, 0)
    assert (ran(first), ran(again)) == ([2, 3], [])
    assert again.stdout.count("skipped, finished with validation PPL") == 2
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert states(sweep) == [(2, "finished"), (3, "finished")]
    pages = [path.name for path in sweep.iterdir() if path.is_dir()]
    assert (sweep / "report.html").read_text().split() == sorted(pages)
    assert f"comparison {sweep / 'report.html'}" in again.stdout


@pytest.mark.parametrize("name", ["mine-${run_id:}", r"'it\'s mine'", "mine[1]=2".join("''")])
def test_the_folder_that_was_checked_is_the_one_that_is_used(tmp_path, name):
    for kind, options in (("sweep", ["-m"]), ("run", [])):
        below = tmp_path / kind
        below.mkdir()
        done = door(below, *options, f"hydra.{kind}.dir={name}", body="return finish(folder, 7)")
        assert done.returncode == 0, done.stderr
        (folder,) = below.iterdir()
        assert "mine" in folder.name
        assert list(folder.glob("report.html" if kind == "sweep" else "metrics.json"))


def test_trials_that_are_one_experiment_run_once(tmp_path):
    body = "print('ran', config.interval); return finish(folder, 7)"
    done = door(tmp_path, "-m", "model=recurrence", "interval=2,3", "max_contexts=4,8", body=body)
    assert done.returncode == 0
    assert ran(done) == [2]
    assert "1 trial (3 more combinations repeat one of them)" in done.stdout


def test_a_failing_trial_does_not_stop_the_others(tmp_path):
    body = """
    if config.interval == 2:
        raise UserError("no file a.txt.")
    if config.interval == 3:
        raise RuntimeError("a bug")
    return finish(folder, 4)"""
    done = door(tmp_path, *SWEEP, body=body)
    assert done.returncode == 1
    assert "(interval=2): no file a.txt." in done.stderr
    assert "RuntimeError: a bug" in done.stderr
    assert states(tmp_path / "sweep") == [(2, "failed"), (3, "failed"), (4, "finished")]
    logs = sorted(path.read_text() for path in (tmp_path / "sweep").glob("*/train.log"))
    assert ["no file a.txt." in log for log in logs] == ["Traceback" not in log for log in logs]
    assert "failed: RuntimeError: a bug" in " ".join(done.stdout.replace("│", " ").split())


def test_failed_trials_run_again_when_the_command_is_repeated(tmp_path):
    done = door(tmp_path, *SWEEP, body=TOLD + "raise UserError('no.')")
    assert (done.returncode, ran(done)) == (EXIT_CODE, [2, 3, 4])
    done = door(tmp_path, *SWEEP, body=TOLD + "return finish(folder, 1)")
    assert (done.returncode, ran(done)) == (0, [2, 3, 4])
    assert states(tmp_path / "sweep") == [(2, "finished"), (3, "finished"), (4, "finished")]


def test_a_killed_sweep_runs_only_what_is_missing(tmp_path):
    body = """
    if config.interval == 3:
        (folder / "checkpoints").mkdir()
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(folder, config.interval)"""
    assert door(tmp_path, *SWEEP, body=body).returncode == -signal.SIGKILL
    assert states(tmp_path / "sweep") == [(2, "finished"), (3, "running")]
    done = door(tmp_path, *SWEEP, body=TOLD + "(folder / 'checkpoints').mkdir(); return finish(folder, 1)")
    assert (done.returncode, ran(done)) == (0, [3, 4])
    assert states(tmp_path / "sweep") == [(2, "finished"), (3, "finished"), (4, "finished")]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise KeyboardInterrupt", 130),
        ("sys.exit(1)", 130),  # what Lightning makes of Ctrl-C
        ("raise type('Interrupted', (BaseException,), {'code': 143})", 143),  # what the pipeline makes of SIGTERM
    ],
)
def test_an_interrupt_ends_the_sweep(tmp_path, body, code):
    done = door(tmp_path, *SWEEP, body=TOLD + body)
    assert (done.returncode, ran(done)) == (code, [2])
    assert done.stderr == "interrupted: the same command goes on from here.\n"
    assert states(tmp_path / "sweep") == [(2, "interrupted")]


def test_two_commands_at_once_share_the_trials(tmp_path):
    body = "import time; time.sleep(0.8); print(f'ran {config.interval}'); return finish(folder, 1)"
    program = f"from tests.test_door import door; print(door({str(tmp_path)!r}, *{SWEEP!r}, body={body!r}).stdout)"
    twins = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [twin.communicate(timeout=100)[0] for twin in twins]
    assert sorted(line for text in told for line in text.splitlines() if line.startswith("ran ")) == [
        "ran 2",
        "ran 3",
        "ran 4",
    ]
    assert states(tmp_path / "sweep") == [(2, "finished"), (3, "finished"), (4, "finished")]


def test_a_trial_that_is_no_number_is_refused_before_the_first_starts(tmp_path):
    done = door(tmp_path, "-m", "interval=2,-3", body=TOLD)
    assert (done.returncode, ran(done)) == (EXIT_CODE, [])
    assert list(tmp_path.iterdir()) == []


def test_skipping_does_not_load_torch(tmp_path):
    assert door(tmp_path, *SWEEP, body="return finish(folder, 1)").returncode == 0
    body = "pass\nsys.modules['torch'] = None"  # from here on, importing it fails
    assert door(tmp_path, *SWEEP, body=body).returncode == 0


def distinct(*arguments):
    command = read_command_line(list(arguments))
    assert command.multirun
    return len({trial.identity for trial in command.trials})


def test_the_presets_are_sweeps_by_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for preset, key, values in (
        ("samples", "samples", [50, 100, 250, 500]),
        ("interval", "interval", [20, 50, 100]),
        ("max_contexts", "max_contexts", [16, 32, 64]),
        ("heads", "heads", [1, 2, 4, 8, 16]),
    ):
        assert [getattr(trial, key) for trial in check_command_line([f"experiment={preset}"])] == values
    pairs = [(t.model.dropout, t.train.weight_decay) for t in check_command_line(["experiment=regularization"])]
    assert pairs == [(dropout, decay) for dropout in (0, 0.1, 0.3) for decay in (0, 0.01, 0.1)]


def test_the_memory_preset_has_every_model_and_runs_each_experiment_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = check_command_line(["experiment=memory"])
    assert {(t.model.name, t.selection, t.max_contexts) for t in trials} == {
        (model, selection, contexts)
        for model in ("context_kv", "sliding_window", "recurrence", "cascade", "transformer")
        for selection in ("strided", "grid")
        for contexts in (8, 16, 32, 64)
    }
    # 8 each of context_kv and sliding_window; nothing that is swept changes the other three
    assert distinct("experiment=memory") == 8 + 8 + 3


def test_the_command_line_replaces_and_extends_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = check_command_line(["experiment=interval", "interval=7,9", "heads=4,8"])
    assert [(t.interval, t.heads) for t in trials] == [(7, 4), (7, 8), (9, 4), (9, 8)]
    assert [t.interval for t in check_command_line(["experiment=interval", "interval=7"])] == [7]
    ultrachat = check_command_line(["-m", "experiment=published", "samples=100,500,1000"])
    assert [t.samples for t in ultrachat] == [100, 500, 1000]


def test_a_preset_runs_as_checked(tmp_path):
    done = door(tmp_path, "experiment=interval", "heads=4", body=TOLD + "return finish(folder, 1)")
    assert (done.returncode, ran(done)) == (0, [20, 50, 100])


def test_a_grid_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distinct("-m", "interval=20,50,100", "max_contexts=16,32,64", "heads=4,8") == 18


@pytest.mark.parametrize("launcher", sorted(EXTRAS))
def test_a_launcher_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, launcher):
    monkeypatch.chdir(tmp_path)
    real = GlobalHydra.instance().config_loader

    def without_plugins(self):
        loader = real()
        options = loader.get_group_options
        monkeypatch.setattr(
            loader,
            "get_group_options",
            lambda group, *more, **named: ["basic"] if group == "hydra/launcher" else options(group, *more, **named),
        )
        return loader

    monkeypatch.setattr(GlobalHydra, "config_loader", without_plugins)
    with pytest.raises(UserError, match=rf"ctxkv-lightning\[{EXTRAS[launcher]}\]"):
        check_command_line(["-m", f"hydra/launcher={launcher}", "interval=2,3"])


def needs(plugin):
    missing = importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(plugin)
    return pytest.mark.skipif(missing, reason=f"{plugin} is not installed")


LAUNCHERS = [
    pytest.param("joblib", ["hydra.launcher.n_jobs=2"], marks=needs("hydra_plugins.hydra_joblib_launcher")),
    pytest.param("submitit_local", [], marks=needs("hydra_plugins.hydra_submitit_launcher")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), LAUNCHERS)
def test_parallel_trials_share_phase_one_and_the_processors(tmp_path, monkeypatch, launcher, options):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = ["-m", f"hydra/launcher={launcher}", *options, "interval=3,5", "pretrain.lr=1e-3,2e-3", *SMALL]
    done = door(tmp_path, *command)
    assert done.returncode == 0, done.stderr + done.stdout
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    metrics = all_metrics(sweep)
    assert [status["state"] for status in statuses(sweep)] == ["finished"] * 4
    # two learning rates of Phase 1, each trained by one trial and reused by the other
    assert sorted((m["config"]["pretrain"]["lr"], m["pretrain"]["reused"]) for m in metrics) == [
        (1e-3, False),
        (1e-3, True),
        (2e-3, False),
        (2e-3, True),
    ]
    side_by_side = 2 if launcher == "joblib" else 4
    assert {m["machine"]["threads"] for m in metrics} == {max(1, os.cpu_count() // side_by_side)}
    assert (sweep / "report.html").stat().st_size > 0
    again = door(tmp_path, *command)
    assert again.returncode == 0
    assert all_metrics(sweep) == metrics


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), LAUNCHERS[:1])
def test_a_parallel_sweep_survives_a_failing_trial(tmp_path, launcher, options):
    command = ["-m", f"hydra/launcher={launcher}", *options, *SMALL, "samples=8,100000"]
    done = door(tmp_path, *command)
    assert done.returncode == EXIT_CODE
    assert "samples=100000" in done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert sorted(status["state"] for status in statuses(sweep)) == ["failed", "finished"]
    (failed,) = (status for status in statuses(sweep) if status["state"] == "failed")
    assert "training documents" in failed["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_real_sweep_stopped_halfway_runs_only_what_is_missing(tmp_path, how):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "interval=3,4,5", "hydra.sweep.dir=sweep", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def hears_ctrl_c():  # which what a shell starts in the background, these tests perhaps, ignores
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    heard = {"preexec_fn": hears_ctrl_c, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **heard) as sweep:
        while len(list((tmp_path / "sweep").glob("*/checkpoints"))) < 2:  # until the second one is under way
            assert sweep.poll() is None
            time.sleep(0.05)
        sweep.send_signal(how)
        sweep.stdout.read()
    assert sweep.returncode == (130 if how == signal.SIGINT else -how)
    assert states(tmp_path / "sweep") == [(3, "finished"), (4, "interrupted" if how == signal.SIGINT else "running")]
    first = all_metrics(tmp_path / "sweep")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"starts: (interval=\d)", done.stdout) == ["interval=4", "interval=5"]
    assert states(tmp_path / "sweep") == [(3, "finished"), (4, "finished"), (5, "finished")]
    assert first[0] in all_metrics(tmp_path / "sweep")
    assert not list((tmp_path / "sweep").glob(".*before-*"))
