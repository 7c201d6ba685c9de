"""train.py as a program: what it prints, how it ends, what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxkv_lightning.config import Config, DataConfig
from ctxkv_lightning.door import check_command_line, identity
from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.text.mqar import Task

ROOT = Path(__file__).parent.parent

STAND_IN = """
import json, runpy, sys, types
from ctxkv_lightning.errors import UserError

def finish(folder, val_ppl):
    (folder / "metrics.json").write_text(json.dumps({{"result": {{"val_ppl": val_ppl}}}}))
    return float(val_ppl)

def run_experiment(config, folder, resume="no"):
    {body}

def write_comparison(folders, output):
    (output / "report.html").write_text(" ".join(sorted(folder.name for folder in folders)))
    return output / "report.html"

sys.modules["ctxkv_lightning.pipeline"] = types.SimpleNamespace(run_experiment=run_experiment)
sys.modules["ctxkv_lightning.report.comparison"] = types.SimpleNamespace(write_comparison=write_comparison)
sys.argv[0] = {door!r}
runpy.run_path({door!r}, run_name="__main__")
"""


def door(folder, *arguments, body=None):
    """Runs train.py in `folder`, with `body` in place of the pipeline if given."""
    script = str(ROOT / "train.py")
    start = [script] if body is None else ["-c", STAND_IN.format(body=body, door=script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path):
    """An empty working directory inside an empty one."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("intervl=50", "did you mean interval?"),
        ("+x._target_=os.system +x.command=exit", "no key 'x._target_'"),
        ("-m interval=20,30 heads=7", "heads=7 does not divide"),
        ("-m interval=20,30 trainer.devices=2", "must be 1 in a sweep"),
        ("-m interval=20,30 resume=last", "a sweep goes on when its command is repeated"),
        ("name=a=b", "cannot be read"),
        ("--cfg job heads=fifty", "give a whole number"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(here, arguments, message):
    done = door(here, *arguments.split())
    assert done.returncode == EXIT_CODE
    assert message in done.stderr
    assert all(line.startswith(("error: ", "       ")) for line in done.stderr.splitlines())
    assert listing(here) == []


def test_a_refusal_does_not_wait_for_torch(here):
    body = "pass\nsys.modules['torch'] = None"  # from here on, importing it fails
    assert "did you mean interval?" in door(here, "intervl=50", body=body).stderr


def test_the_configuration_can_be_shown(here):
    shown = door(here, "--cfg", "job", "interval=50")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "interval: 50\n" in shown.stdout
    assert "max_contexts: 32\n" in shown.stdout
    assert listing(here) == []


@pytest.mark.parametrize("flag", ["--help", "--hydra-help", "--info"])
def test_the_flags_of_hydra_work(here, flag):
    assert door(here, flag).returncode == 0
    assert listing(here) == []


def test_two_runs_of_the_same_second_have_their_own_folders(here):
    body = "print(folder); (folder / 'x').touch(); return 1.0"
    done = [door(here, "hydra.run.dir=same-${run_id:}", body=body) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0]
    assert len({run.stdout for run in done}) == 2
    assert len(listing(here)) == 4


def test_an_error_in_the_run_removes_what_the_run_made_and_no_more(here):
    done = door(here, body="raise UserError('no file a.txt.')")
    assert (done.returncode, done.stderr) == (EXIT_CODE, "error: no file a.txt.\n")
    assert here.is_dir()  # the working directory is empty, and stays
    assert listing(here) == []


def test_an_empty_folder_that_stood_before_the_run_stays(here):
    (here / "outputs").mkdir()
    (here / "mine").mkdir()
    for arguments in ([], ["hydra.run.dir=mine"]):
        assert door(here, *arguments, body="raise UserError('no.')").returncode == EXIT_CODE
    assert listing(here) == ["mine", "outputs"]


def test_a_folder_with_something_in_it_stays(here):
    body = "(folder / 'log').touch(); raise UserError('no.')"
    assert door(here, "hydra.run.dir=mine", body=body).returncode == EXIT_CODE
    assert listing(here) == ["mine", "mine/log"]


def test_a_bug_keeps_its_traceback_and_an_interrupt_has_none(here):
    bug = door(here, body="raise RuntimeError('a bug')")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    assert door(here, body="raise KeyboardInterrupt").returncode == 130
    assert listing(here) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config-name=other", "--config-name is not offered"),
        ("--config-dir=folder", "--config-dir is not offered"),
        ("--experimental-rerun=x.pickle", "--experimental-rerun is not offered"),
        ("--intervl 5", "unrecognized arguments: --intervl"),
        ("-m --cfg job", "exclude each other"),
        ("--resolve", "add --cfg job"),
        ("data@foo=pydocs", "leave out '@foo'"),
        ("+data@foo=text", "leave out '@foo'"),
        ("+experiment=quick", r"leave out the '\+'"),
        ("interval=???", "give a whole number"),
        ("data.files=x.txt", r"give a list such as \[a,b\]"),
        ("train={lrr:0.1}", "no key 'train'"),
        ("-m interval=range(3,3)", "no trial at all"),
        ("-m experiment=glob(qu*) interval=-1", "interval=-1 must be a whole number, at least 1"),
        ("-m experiment=glob(*)", "is a sweep already: run it by itself"),
        ("-m interval=2,3 hydra.sweep.subdir=x", "hydra.sweep.subdir is not offered"),
        ("-m interval=2,3 hydra/launcher=jobli", r"did you mean joblib\?|does not exist"),
        ("hydra.mode=MULTIRUN interval=20,-3", "interval=-3 must be a whole number, at least 1"),
        ("+hydra.callbacks.x._target_=webbrowser.open", "foreign code"),
    ],
)
def test_what_the_door_keeps_out(here, monkeypatch, arguments, message):
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=message) as error:
        check_command_line(arguments.split())
    assert "\n" not in str(error.value)
    assert listing(here) == []


FOREIGN = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lrr: 5", r"'experiment/mine': there is no key 'train.lrr': did you mean train.lr\?"),
        ("heads: fifty", "'experiment/mine': heads: Value 'fifty'.*give a whole number"),
        ("interval: -5", "interval=-5 must be a whole number, at least 1"),
        ("cache_dir: ${oc.env:HOME}", "interpolation"),
        ("hydra:\n  callbacks:\n    x:\n      _target_: webbrowser.open", "foreign code"),
    ],
)
def test_a_configuration_file_from_elsewhere_is_held_to_the_same_rules(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(FOREIGN + text + "\n")
    with pytest.raises(UserError, match=message):
        check_command_line(["hydra.searchpath=[own]", "experiment=mine"])


def test_a_configuration_file_from_elsewhere_can_ask_for_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    sweep = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      interval: 3,4\n"
    (own / "mine.yaml").write_text(FOREIGN + sweep)
    configs = check_command_line(["hydra.searchpath=[own]", "experiment=mine"])
    assert [config.interval for config in configs] == [3, 4]


def test_the_recall_task_leaves_the_names_of_other_experiments_alone():
    names = {identity(Config(data=DataConfig(mqar=Task(pairs=pairs)))) for pairs in (4, 8)}
    assert len(names) == 1
    tasks = {identity(Config(data=DataConfig(source="mqar", mqar=Task(pairs=pairs)))) for pairs in (4, 8)}
    assert len(tasks | names) == 3
