import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import ctxkv_lightning.__main__ as door
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.errors import UserError
from tests.report.sample_metrics import model_metrics, write_run


def test_help_names_every_command_and_loads_nothing_slow() -> None:
    code = (
        "import sys, ctxkv_lightning.__main__ as door\n"
        "try:\n    door.main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "slow = {'torch', 'lightning', 'matplotlib', 'numpy', 'scipy', 'jinja2', 'omegaconf', 'datasets'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "report" in said
    assert "Compare runs on one page" in said
    assert said.splitlines()[-1] == "[]"


def test_python_m_compares_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", model_metrics())
    command = [sys.executable, "-m", "ctxkv_lightning", "report", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'runs' / 'report.html'}\n"
    assert (tmp_path / "runs" / "report.html").is_file()


def test_several_folders_are_compared_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, model_metrics(val_ppl=100.0 + ord(name)))
    assert main(["report", "a", "b"]) == 0
    assert capsys.readouterr().out == f"{Path('comparison') / 'report.html'}\n"
    assert (tmp_path / "comparison" / "report.md").is_file()
    assert not (tmp_path / "a" / "report.md").exists()


def test_one_runs_comparison_leaves_its_own_report_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", model_metrics())
    (run / "report.md").write_text("mine")
    assert main(["report", str(run)]) == 0
    assert (run / "report.md").read_text() == "mine"
    assert (run / "comparison" / "report.html").is_file()


def test_output_can_be_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model_metrics())
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "x" / "y")]) == 0
    assert (tmp_path / "x" / "y" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND: 'python -m ctxkv_lightning --help' shows how."),
        (["reprot"], "invalid choice: 'reprot'"),
        (["report"], "the following arguments are required: FOLDER: 'python -m ctxkv_lightning report --help' shows"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["report", ".", "--outptu", "x"], "unrecognized arguments: --outptu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert told in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_command_is_one_function(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def clear_cache(parser: argparse.ArgumentParser) -> door.Handler:
        """Delete what can be computed again."""
        parser.add_argument("--older", type=int, default=7)

        def run(options: argparse.Namespace) -> None:
            if options.older < 0:
                raise UserError("--older must be at least 0.")
            print(options.older)

        return run

    monkeypatch.setattr(door, "COMMANDS", (*door.COMMANDS, clear_cache))
    assert main(["clear-cache", "--older", "3"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert main(["clear-cache", "--older=-1"]) == 2
    assert capsys.readouterr().err == "error: --older must be at least 0.\n"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(parser: argparse.ArgumentParser) -> door.Handler:
        """Stop."""

        def run(options: argparse.Namespace) -> None:
            raise KeyboardInterrupt

        return run

    monkeypatch.setattr(door, "COMMANDS", (stop,))
    assert main(["stop"]) == 130


def test_a_reader_that_has_seen_enough_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctxkv_lightning", "cache", "prune", "--cache-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before it has loaded what it needs to print
        assert process.stderr.read() == b""
    assert process.returncode == 0
