"""A run's folder, or a sweep's, may be moved or renamed: whatever is done with it afterwards stays in the new place."""

import shutil
from dataclasses import replace

import pytest

from ctxkv_lightning import pipeline
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.cli import at_home
from ctxkv_lightning.door import read_command_line
from ctxkv_lightning.run.saved import read
from tests.small_run import small_run
from tests.test_cli import _own_arguments, cli, stopped  # noqa: F401
from tests.test_resume import BASE, STEPS, Stop, interrupted, numbers
from tests.test_sweeps import SWEEP, TOLD, door, ran, states


def move(folder):
    """Moves a folder; whoever still writes to the old place meets a file."""
    target = folder.parent / "elsewhere" / "renamed"
    target.parent.mkdir()
    folder.rename(target)
    folder.write_text("not here any more")
    return target


@pytest.fixture
def moved(tmp_path):
    """A finished run, moved, whose cache is gone."""
    run = move(small_run(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    return run


def test_a_finished_run_writes_exports_and_reports(moved, tmp_path, capsys):
    assert main(["generate", str(moved), "--prompt", "Zeile", "--max-tokens", "5"]) == 0
    assert main(["export", str(moved), str(tmp_path / "export")]) == 0
    assert main(["report", str(moved)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(moved / "comparison" / "report.html")


def best_of(folder):
    """What the last checkpoint knows of the best one."""
    callbacks = read(folder / "checkpoints" / "last.ckpt")["callbacks"]
    return next(state for name, state in callbacks.items() if name.startswith("ModelCheckpoint"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_remembers_which_epoch_was_best(tmp_path, monkeypatch):
    """The best epoch is not the last; a run that had forgotten it would take a later one for the best."""
    train = replace(BASE.train, max_epochs=8, lr=0.03)  # best at the sixth, in fp32 and in bf16
    config = replace(BASE, cache_dir=str(tmp_path / "cache"), train=train)
    pipeline.run_experiment(config, tmp_path / "whole")
    ppls = [row["val_ppl"] for row in numbers(tmp_path / "whole")[0]]
    best = ppls.index(min(ppls)) + 1
    assert best < 8, "the test shows nothing"
    interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", best * STEPS + 3), monkeypatch)
    run = move(tmp_path / "run")
    pipeline.run_experiment(config, run, resume="strict")
    assert numbers(run) == numbers(tmp_path / "whole")
    assert best_of(run)["best_model_score"] == best_of(tmp_path / "whole")["best_model_score"]
    assert best_of(run)["best_model_path"] == str(run / "checkpoints" / "best.ckpt")
    ends = [read(folder / "checkpoints" / "best.ckpt")["global_step"] for folder in (run, tmp_path / "whole")]
    assert ends == [best * STEPS] * 2
    assert (tmp_path / "run").read_text() == "not here any more"


@pytest.mark.slow
def test_phase_one_goes_on_too(tmp_path, monkeypatch):
    config = replace(BASE, cache_dir=str(tmp_path / "cache"))
    interrupted(config, tmp_path / "run", Stop("OACDPretrainModule", 2), monkeypatch)
    run = move(tmp_path / "run")
    pipeline.run_experiment(config, run, resume="strict")
    assert not (run / "pretrain.ckpt").exists()
    assert [row["iteration"] for row in numbers(run)[1]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_resume_finds_it_by_its_new_name(tmp_path, monkeypatch):
    config = replace(BASE, cache_dir=str(tmp_path / "cache"))
    interrupted(config, tmp_path / "run", Stop("OACDPretrainModule", 1), monkeypatch)
    run = move(tmp_path / "run")
    asked = read_command_line([f"resume={run}"])
    assert asked.folder == run
    assert replace(asked.trials[0].config, resume=None) == config


@pytest.mark.slow
def test_lightning_cli_writes_where_the_run_is_now(stopped, tmp_path):  # noqa: F811
    _, old = stopped
    run = move(old)
    config, last = run / "lightning.yaml", run / "checkpoints" / "last.ckpt"
    assert cli("fit", "--config", config, "--ckpt_path", last) == 0
    assert read(last)["global_step"] == 3 * STEPS
    assert best_of(run)["dirpath"] == str(run / "checkpoints")
    assert cli("test", f"--config={config}", "--ckpt_path", run / "checkpoints" / "best.ckpt") == 0
    assert old.read_text() == "not here any more"


def test_a_runs_own_file_means_its_own_folder(tmp_path):
    file = tmp_path / "lightning.yaml"
    file.write_text("{}")
    assert at_home(["-c", str(file)]) == ["-c", str(file)]
    (tmp_path / "checkpoints").mkdir()
    for words in (["-c", str(file)], ["--config", str(file)], [f"--config={file}"]):
        found = at_home([*words, "--trainer.max_epochs", "3"])
        assert found[: len(words)] == words, "what follows the file has the last word"
        assert f"--checkpoint.dirpath={tmp_path / 'checkpoints'}" in found
        assert len(found) == len(words) + 4 + 2
        assert found[-2:] == ["--trainer.max_epochs", "3"]
    shutil.copy(file, tmp_path / "mine.yaml")
    assert at_home(["-c", str(tmp_path / "mine.yaml")]) == ["-c", str(tmp_path / "mine.yaml")]


@pytest.mark.slow
def test_another_run_starts_from_its_weights_and_not_from_those_that_were_there_before(tmp_path):
    config = replace(BASE, cache_dir=str(tmp_path / "cache"), train=replace(BASE.train, max_epochs=1))
    pipeline.run_experiment(config, tmp_path / "run")
    new = replace(config, init_from=str(tmp_path / "run"))
    pipeline.run_experiment(new, tmp_path / "first")
    run = tmp_path / "moved"
    (tmp_path / "run").rename(run)
    pipeline.run_experiment(
        replace(config, seed=7, embedding=replace(config.embedding, source="svd")), tmp_path / "run"
    )
    pipeline.run_experiment(replace(new, init_from=str(run)), tmp_path / "second")
    assert numbers(tmp_path / "second") == numbers(tmp_path / "first")
    pipeline.run_experiment(replace(new, seed=7), tmp_path / "third")
    encoders = {
        name: read(tmp_path / name / "checkpoints" / "best.ckpt")["state_dict"]["model.encoder.linear.weight"].sum()
        for name in ("run", "third")
    }
    assert encoders["third"] == encoders["run"]


def test_a_sweep_reports_and_is_repeated(tmp_path):
    body = TOLD + "return finish(folder, config.interval)"
    assert door(tmp_path, *SWEEP, body=body).returncode == 0
    sweep = move(tmp_path / "sweep")
    again = door(tmp_path, *SWEEP[:-1], f"hydra.sweep.dir={sweep}", body=body)
    assert (again.returncode, ran(again)) == (0, [])
    assert states(sweep) == [(2, "finished"), (3, "finished"), (4, "finished")]
    assert f"comparison {sweep / 'report.html'}" in again.stdout
