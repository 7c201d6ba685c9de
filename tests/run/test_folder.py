import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.find import is_free
from ctxkv_lightning.run.folder import RunFolder, alone_in

CLAIM = """
import sys, time
from pathlib import Path
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.find import is_free
from ctxkv_lightning.run.folder import RunFolder
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    RunFolder.claim(Path(sys.argv[1]))
except UserError as error:
    print(error)
else:
    print("mine")
"""


def test_claim_makes_parents_and_names_files(tmp_path: Path) -> None:
    run = RunFolder.claim(tmp_path / "outputs" / "day" / "run")
    assert run.path == tmp_path / "outputs" / "day" / "run"
    assert [path.name for path in run.path.iterdir()] == ["checkpoints"]
    names = [run.config, run.checkpoints, run.metrics, run.report, run.figures, run.log, run.logs("train")]
    assert [path.name for path in names] == [
        "config.yaml",
        "checkpoints",
        "metrics.json",
        "report.md",
        "figures",
        "train.log",
        "train",
    ]
    assert {path.parent for path in names} == {run.path}


def test_an_existing_empty_folder_can_be_claimed_once(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path)
    with pytest.raises(UserError, match="holds a run already, choose another folder"):
        RunFolder.claim(tmp_path)
    assert RunFolder(tmp_path).checkpoints.is_dir()


def test_exactly_one_of_several_processes_gets_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    start = str(time.time() + 1.0)
    command = [sys.executable, "-c", CLAIM, str(target), start]
    runners = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [runner.communicate(timeout=60)[0].strip() for runner in runners]
    assert said.count("mine") == 1
    assert sum("holds a run already" in line for line in said) == 5
    assert (target / "checkpoints").is_dir()


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_file_in_the_way_is_named_and_left_alone(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="Cannot make the run folder") as caught:
        RunFolder.claim(file / below)
    assert str(file) in str(caught.value)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_failed_claim_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, allowed: int
) -> None:
    (tmp_path / "old").mkdir()
    made: list[Path] = []
    mkdir = os.mkdir

    def refusing(path: Path) -> None:
        if len(made) == allowed:
            raise OSError(code, os.strerror(code), str(path))
        made.append(path)
        mkdir(path)

    monkeypatch.setattr(os, "mkdir", refusing)
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        RunFolder.claim(tmp_path / "old" / "new" / "run")
    assert str(tmp_path / "old" / "new" / "run") in str(caught.value)
    assert len(made) == allowed
    assert list((tmp_path / "old").iterdir()) == []


def test_a_claim_cut_short_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def interrupted(path: Path) -> None:
        if Path(path).name == "checkpoints":
            raise KeyboardInterrupt
        mkdir(path)

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.claim(tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder.claim(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_metrics_come_back_as_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    metrics = {"train": {"epochs": [{"epoch": 1, "val_ppl": 361.0}]}, "note": "é", "gpu_gb": None}
    run.write_metrics(metrics)
    assert run.read_metrics() == metrics
    assert run.metrics.read_text().startswith('{\n  "train"')
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, value: float) -> None:
    run = RunFolder(tmp_path)
    run.write_metrics({"val_ppl": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_metrics({"val_ppl": value})
    assert run.read_metrics() == {"val_ppl": 1.0}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    run = RunFolder(tmp_path)
    run.write_metrics({"val_ppl": 1.0})

    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(UserError if isinstance(failure, OSError) else KeyboardInterrupt):
        run.write_metrics({"val_ppl": 2.0})
    assert run.read_metrics() == {"val_ppl": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_killed_writer_keeps_the_old_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_metrics({"val_ppl": 1.0})
    script = (
        "import os, sys; from pathlib import Path; from ctxkv_lightning.run.folder import RunFolder\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "RunFolder(Path(sys.argv[1])).write_metrics({'val_ppl': 2.0})"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    assert run.read_metrics() == {"val_ppl": 1.0}


def test_config_and_report_are_written_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config("interval: 20\n")
    run.write_report("# é\n")
    assert run.config.read_bytes() == b"interval: 20\n"
    assert run.report.read_text(encoding="utf-8") == "# é\n"


def test_a_vanished_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*config\.yaml \(No such file"):
        RunFolder(tmp_path / "gone").write_config("")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        RunFolder(tmp_path / "file").write_config("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metrics.json"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "not a JSON object"),
    ],
)
def test_unreadable_metrics_are_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    run = RunFolder(tmp_path)
    if content is not None:
        run.metrics.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        run.read_metrics()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_that_are_a_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.mkdir()
    with pytest.raises(UserError, match="Cannot read"):
        run.read_metrics()


def test_schema_is_plain_json(tmp_path: Path) -> None:
    from tests.report.sample_metrics import sample_metrics

    run = RunFolder(tmp_path)
    run.write_metrics(sample_metrics())
    assert json.loads(run.metrics.read_text()) == sample_metrics()


def test_a_claim_that_was_killed_at_once_can_be_claimed_again(tmp_path: Path) -> None:
    run = RunFolder.claim(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.claim(run.path)
    with alone_in(run), pytest.raises(UserError, match="holds a run already"):
        RunFolder.claim(run.path, again=True)
    assert RunFolder.claim(run.path, again=True).checkpoints.is_dir()
    (run.checkpoints / "last.ckpt").touch()
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.claim(run.path, again=True)
    (run.checkpoints / "last.ckpt").unlink()
    run.write_config("seed: 1")
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.claim(run.path, again=True)


def test_a_run_whose_lock_cannot_be_written_is_one_sentence_and_not_free(tmp_path: Path) -> None:
    run = RunFolder.claim(tmp_path / "run")
    run.lock.mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*\.lock \(Is a directory\)"), alone_in(run):
        pass
    assert not is_free(run)
