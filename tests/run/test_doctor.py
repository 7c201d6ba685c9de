import os
import socket
import subprocess
import sys

import pytest
import tiktoken
import torch

from ctxkv_lightning.__main__ import main
from ctxkv_lightning.run import doctor
from ctxkv_lightning.run.doctor import Finding, examine
from tests.run.test_cache import built


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine without network or downloads."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(socket.socket, "connect", lambda *address: pytest.fail(f"asks the network: {address}"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def by_subject(folder):
    return {finding.subject: finding for finding in examine(folder / "cache", "some/dataset")}


def test_ten_readable_lines_and_exit_code_0_whatever_is_merely_missing(alone, capsys):
    assert main(["doctor", "--cache-dir", str(alone / "cache")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(line.split()[0] in ("ok", "warning") for line in lines)
    assert f"torch {torch.__version__}" in lines[1]
    assert not (alone / "cache").exists()


def test_the_command_takes_seconds_and_no_network_in_a_process_of_its_own(alone):
    command = [sys.executable, "-m", "ctxkv_lightning", "doctor", "--cache-dir", str(alone / "cache")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (told.stderr, len(told.stdout.splitlines())) == ("", 10)


def test_precision_is_what_a_run_would_choose(alone, monkeypatch):
    for bf16, chosen in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("ctxkv_lightning.run.machine.cpu_multiplies_bf16", lambda bf16=bf16: bf16)
        if not torch.cuda.is_available():
            assert by_subject(alone)["precision"].text.endswith(f"precision=auto is {chosen}")


def test_more_threads_than_processors_is_a_warning(monkeypatch):
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.setattr(torch, "get_num_threads", lambda: usable + 1)
    found = doctor.check_threads()
    assert (found.mark, found.advice) == ("warning", f"export OMP_NUM_THREADS={usable}")


@pytest.mark.parametrize(
    ("versions", "mark"),
    [
        ({}, "ok"),
        ({"omegaconf": "2.4.0"}, "broken"),
        ({"hydra-core": "1.4.0"}, "broken"),
        ({"lightning": "2.6.3"}, "broken"),
        ({"torch": "2.9.1"}, "broken"),
        ({"torch": "2.13.0+cpu"}, "ok"),
        ({"lightning": None}, "broken"),
    ],
)
def test_versions_that_do_not_go_together_are_broken_with_the_cure(monkeypatch, versions, mark):
    right = {"torch": "2.12.0", "lightning": "2.6.6", "hydra-core": "1.3.8", "omegaconf": "2.3.1"}
    needs = ["torch>=2.10,<3", "lightning>=2.6.6,<2.7", "hydra-core>=1.3.8,<1.4", "omegaconf>=2.3.1,<2.4"]
    monkeypatch.setattr(doctor, "requirements", lambda: [doctor.Requirement(text) for text in needs])
    monkeypatch.setattr(doctor, "_version", {**right, **versions}.get)
    found = doctor.check_packages()
    assert found.mark == mark
    for name in versions if mark == "broken" else ():
        assert f"'{next(need for need in needs if need.startswith(name))}'" in found.advice


@pytest.mark.parametrize(
    ("version", "mark"), [("3.10.1", "ok"), ("3.13.9", "ok"), ("3.14.0", "broken"), ("3.9.9", "broken")]
)
def test_the_python_that_hydra_runs_on(monkeypatch, version, mark):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: version)
    assert doctor.check_python().mark == mark


def test_the_cache_is_counted_and_what_is_damaged_is_told(alone):
    os.truncate(built(alone / "cache", 1) / "numbers.npy", 1)
    built(alone / "cache", 2)
    found = by_subject(alone)["cache"]
    assert found.mark == "warning"
    assert ": 1 store, " in found.text
    assert "1 that nobody can use" in found.text
    assert found.advice == "python -m ctxkv_lightning cache prune"


def test_a_cache_that_cannot_be_written_is_told(alone):
    (alone / "cache").write_text("in the way")
    assert "not writable (Not a directory)" in by_subject(alone)["cache"].text


def test_the_tokenizer_is_ready_when_its_files_are_there_and_intact(alone, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)}
    small = {"name": "gpt2", "pat_str": r"\S+|\s+", "mergeable_ranks": ranks, "special_tokens": {}}
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", tiktoken.Encoding(**small))
    kept = tiktoken.registry.ENCODINGS["gpt2"]
    assert by_subject(alone)["tokenizer"].mark == "warning", "one that is loaded already says nothing about the files"
    assert tiktoken.registry.ENCODINGS["gpt2"] is kept
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"gpt2": lambda: small})
    assert by_subject(alone)["tokenizer"].mark == "ok"


def test_a_check_that_fails_is_a_line_too(alone, monkeypatch):
    monkeypatch.setattr(doctor, "check_devices", lambda: 1 / 0)
    found = by_subject(alone)["devices"]
    assert (found.mark, found.text) == ("broken", "ZeroDivisionError: division by zero")
    assert len(by_subject(alone)) == 10


def test_something_broken_is_exit_code_1(alone, monkeypatch):
    monkeypatch.setattr(doctor, "check_python", lambda: Finding("python", "broken", "3.14"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--cache-dir", str(alone / "cache")])
    assert stop.value.code == 1
