"""A Ctrl-C that arrives in a finalizer, where Python ignores what is raised."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxkv_lightning.run.ctrl_c import heard

ROOT = Path(__file__).parents[2]


class Garbage:
    """As it is freed, Ctrl-C arrives, or something fails."""

    def __init__(self, failing=False):
        self.failing = failing

    def __del__(self):
        if self.failing:
            raise ValueError("as it was freed")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # Python looks for signals between two of its own instructions


def freed(seconds=2.0):
    garbage = Garbage()
    del garbage
    for _ in range(round(seconds / 0.01)):
        time.sleep(0.01)
    return "went on"


@pytest.fixture
def hearing():
    """Ctrl-C raises here, also where these tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_in_a_finalizer_is_sent_again(hearing, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    assert freed(0.3) == "went on"  # Python's own way, in which it is lost
    assert [each.exc_type for each in ignored] == [KeyboardInterrupt]
    with heard(), pytest.raises(KeyboardInterrupt):
        freed()
    assert len(ignored) == 1


def test_other_ignored_exceptions_are_told_as_before(monkeypatch):
    ignored = []
    told = ignored.append
    monkeypatch.setattr(sys, "unraisablehook", told)
    with heard():
        Garbage(failing=True)
    assert [str(each.exc_value) for each in ignored] == ["as it was freed"]
    assert sys.unraisablehook is told


@pytest.mark.parametrize("door", ["train.py", "-m ctxkv_lightning"])
def test_both_doors_hear_it(door, tmp_path):
    """With a finalizer that Ctrl-C meets as the program begins to work."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "class Garbage:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(0)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            sys.meta_path.remove(self); Garbage(); time.sleep(5)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    words = {"train.py": [str(ROOT / "train.py")], "-m ctxkv_lightning": ["-m", "ctxkv_lightning", "doctor"]}[door]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def hears_ctrl_c():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=hears_ctrl_c,
    )
    assert done.returncode == 130, done.stderr
