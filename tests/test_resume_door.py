"""`resume=` on the command line: which run it means, with which settings, and what it refuses."""

import operator
import os
import shutil
import sys
import time
from dataclasses import asdict

import pytest
import yaml

import train
from ctxkv_lightning.config import Config
from ctxkv_lightning.door import check_command_line, read_command_line
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.lease import locked
from tests.test_door import door


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left(here, name, *words, finished=False, day="2026-01-01"):
    """A run folder as an interrupted, or finished, run of these words leaves it."""
    (config,) = check_command_line(list(words))
    run = RunFolder.claim(here / "outputs" / day / name)
    run.write_config(yaml.safe_dump(asdict(config)))
    if finished:
        run.write_metrics({"config": asdict(config)})
    os.utime(run.config, ns=(time.time_ns(), time.time_ns()))
    return run


def test_a_folder_brings_its_own_settings(here):
    run = left(here, "a", "interval=50", "train.lr=0.5")
    asked = read_command_line([f"resume={run.path}"])
    assert asked.folder == run.path
    (trial,) = asked.trials
    assert (trial.config.interval, trial.config.train.lr) == (50, 0.5)


def test_what_the_command_line_says_stands_on_top_even_if_it_is_a_default(here):
    run = left(here, "a", "interval=50", "train.max_epochs=3")
    (trial,) = read_command_line([f"resume={run.path}", "train.max_epochs=8", "trainer=cpu"]).trials
    assert (trial.config.interval, trial.config.train.max_epochs) == (50, 8)
    assert trial.config.trainer.accelerator == "cpu"
    (trial,) = read_command_line([f"resume={run.path}", "interval=20"]).trials
    assert trial.config.interval == 20  # for the pipeline to refuse


@pytest.mark.parametrize(
    ("began", "words", "key", "value"),
    [
        ("model=transformer", "model=context_kv", "model.name", "context_kv"),
        ("data=text data.files=[a.txt]", "data=pydocs", "data.source", "pydocs"),
        ("embedding=random", "embedding=svd", "embedding.source", "svd"),
        ("embedding.dim=64", "experiment=published", "embedding.dim", 768),
        ("data=mqar", "data=ultrachat", "tokenizer.source", "tiktoken"),
        ("trainer=cpu", "trainer=auto", "trainer.accelerator", "auto"),
    ],
)
def test_an_option_that_is_a_default_stands_on_top_too(here, began, words, key, value):
    run = left(here, "a", "train.lr=0.5", *began.split())
    (trial,) = read_command_line([f"resume={run.path}", *words.split()]).trials
    assert operator.attrgetter(key)(trial.config) == value  # for the pipeline to refuse, if it may not change


def test_last_is_the_newest_run_that_is_not_finished(here):
    left(here, "b", "interval=2")
    newest = left(here, "a", "interval=3")
    left(here, "c", "interval=4", finished=True)
    assert read_command_line(["resume=last"]).folder == newest.path


@pytest.mark.parametrize("more", ["train.max_epochs=30", "train.patience=30"])
def test_a_finished_run_that_was_to_go_on_for_longer_and_was_interrupted_is_found(here, more):
    """Going on, it writes its new settings first, and its metrics when it ends."""
    run = left(here, "a", "interval=2", finished=True)
    assert read_command_line(["resume=auto", "interval=2", more]).resumed is None, "nothing was interrupted yet"
    (longer,) = check_command_line(["interval=2", more])
    run.write_config(yaml.safe_dump(asdict(longer)))
    assert read_command_line(["resume=last"]).folder == run.path
    assert read_command_line(["resume=auto", "interval=2", more]).folder == run.path
    run.write_metrics({"config": asdict(longer)})
    with pytest.raises(UserError, match="finds no interrupted run"):
        read_command_line(["resume=last"])


def test_a_run_whose_folder_was_named_is_found_too(here):
    left(here, "a", "interval=2")
    named = left(here, "named", "interval=2", day="")
    left(here, "trial", "interval=2", day="sweeps")
    for name in ("last", "auto"):
        assert read_command_line([f"resume={name}", "interval=2"]).folder == named.path


def test_auto_is_the_newest_interrupted_run_with_these_settings_that_nobody_is_at(here):
    older = left(here, "a", "interval=2")
    newer = left(here, "b", "interval=2")
    left(here, "c", "interval=3")
    left(here, "d", "interval=2", finished=True)
    assert read_command_line(["resume=auto", "interval=2"]).folder == newer.path
    with locked(newer.lock):
        assert read_command_line(["resume=auto", "interval=2"]).folder == older.path
    assert read_command_line(["resume=auto", "interval=4"]).resumed is None


def test_auto_looks_in_the_folder_that_is_named_and_in_no_other(here):
    """A requeued job repeats its command: it goes on with its own run, wherever that is, and with nobody else's."""
    left(here, "other", "interval=2")
    far = here / "elsewhere" / "job"
    words = ["resume=auto", "interval=2", f"hydra.run.dir={far}"]
    asked = read_command_line(words)
    assert (asked.resumed, asked.folder) == (None, far)
    shutil.copytree(left(here, "own", "interval=2").path, far)
    assert read_command_line(words).resumed.path == far


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume=nowhere"], "there is no run in that folder"),
        (["resume=last"], "finds no interrupted run below outputs"),
        (["-m", "resume=auto", "interval=2,3"], "a sweep goes on when its command is repeated"),
        (["-m", "trainer.devices=2", "interval=2,3"], "must be 1 in a sweep"),
        (["-m", "trainer.num_nodes=2"], "must be 1 in a sweep"),
    ],
)
def test_refused_in_one_sentence(here, words, message):
    with pytest.raises(UserError, match=message):
        read_command_line(words)


@pytest.mark.parametrize(
    "content",
    [
        "interval: fifty",
        "_target_: os.system",
        "interval: ${oc.env:HOME}",
        "[1, 2",
        "!!python/object/apply:os.system [ls]",
    ],
)
def test_a_hostile_or_damaged_run_folder_is_refused(here, content):
    run = left(here, "a")
    run.config.write_text(content)
    with pytest.raises(UserError):
        read_command_line([f"resume={run.path}"])


BODY = """
    print("ran", config.interval, config.resume, resume, folder.name)
    return 7.0
"""


def test_the_door_hands_the_run_over_to_go_on(here):
    run = left(here, "a", "interval=3")
    done = door(here, f"resume={run.path}", body=BODY)
    assert "ran 3 " in done.stdout
    assert done.stdout.rstrip().endswith("strict a"), (done.stdout, done.stderr)
    assert door(here, "resume=auto", "interval=3", body=BODY).stdout.rstrip().endswith("forgiving a")
    fresh = door(here, "resume=auto", "interval=4", body=BODY)
    assert "starting a new one" in fresh.stdout
    assert " no " in fresh.stdout
    assert Config().resume is None


@pytest.mark.parametrize("started", [{"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_processes_that_a_cluster_starts_are_told_their_folder(here, monkeypatch, started):
    """The first would leave a run alone that somebody is at, the others would not."""
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    words = ["resume=auto", "trainer.devices=2"]
    with pytest.raises(UserError, match=r"give hydra\.run\.dir"):
        read_command_line(words)
    assert read_command_line([*words, "hydra.run.dir=job"]).resumed is None
    assert read_command_line(["trainer.devices=2"]).resumed is None
    if "RANK" not in started:
        assert read_command_line(["resume=auto"]).resumed is None, "a job's first process may be its only one"


def test_who_follows_asks_nobody_whether_the_run_is_free(here, monkeypatch):
    run = left(here, "a", "trainer.devices=2")
    words = ["resume=auto", "trainer.devices=2", f"hydra.run.dir={run.path}"]
    with locked(run.lock):
        assert read_command_line(words).resumed is None
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert read_command_line(words).resumed.path == run.path


@pytest.mark.parametrize("rank", ["SLURM_PROCID", "RANK", "LOCAL_RANK"])
def test_a_process_that_follows_nobody_is_refused(here, monkeypatch, rank):
    """It trained to the end, wrote no metrics, and said nothing."""
    monkeypatch.setenv(rank, "1")
    for words in (["interval=5"], ["-m", "interval=5,10"]):
        with pytest.raises(UserError, match=rf"not the first .* \({rank}=1\), but trainer.devices and num_nodes are 1"):
            read_command_line(words)
    assert read_command_line(["trainer.devices=2", "hydra.run.dir=a"]).trials
    monkeypatch.setenv(rank, "0")
    assert read_command_line(["interval=5"]).trials


def test_auto_in_a_named_folder_goes_on_with_a_finished_run_too(here):
    """A job that was killed before its report, or is run again, ends well."""
    run = left(here, "a", finished=True)
    assert read_command_line(["resume=auto", f"hydra.run.dir={run.path}"]).resumed.path == run.path
    assert read_command_line(["resume=auto"]).resumed is None
    assert read_command_line(["resume=auto", "interval=5", f"hydra.run.dir={run.path}"]).resumed is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a=1", "-m"], ["a=1", "b=2", "-m"]),
        (["-m", "a=1"], ["-m", "a=1", "b=2"]),
        (["a=1", "c='x=y'", "--run"], ["a=1", "c='x=y'", "b=2", "--run"]),
        (["~c", "-m"], ["~c", "b=2", "-m"]),
        (["-m"], ["-m", "b=2"]),
        ([], ["b=2"]),
    ],
)
def test_what_is_added_to_the_command_line_stands_where_overrides_are_read(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", ["/a=b/train.py", *words])
    train._add("b=2")
    assert sys.argv == ["/a=b/train.py", *expected]
