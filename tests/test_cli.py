"""LightningCLI: the same modules, the same numbers, no code from files, nothing overruled without a word."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import yaml

from ctxkv_lightning import __main__ as second_door
from ctxkv_lightning import pipeline
from ctxkv_lightning.cli import _same, _saved_as, check_overruled, check_spelling
from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.export import export_run
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.run.checkpoint import VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder, alone_in
from ctxkv_lightning.run.saved import read, sha256_of
from tests.test_resume import BASE, STEPS, Stop, interrupted, rows, same


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run stopped in its second epoch, in fp32 on the CPU."""
    config = replace(
        BASE, cache_dir=str(tmp_path / "cache"), trainer=replace(BASE.trainer, accelerator="cpu", precision="32-true")
    )
    interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", STEPS + 3), monkeypatch)
    return config, tmp_path / "run"


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m ctxkv_lightning"])


def cli(*arguments):
    return second_door.main([str(argument) for argument in arguments])


def going_on(run):
    return "fit", "--config", run / "lightning.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_fit_goes_on_like_resume_and_the_others_score_like_the_report(stopped, tmp_path, monkeypatch, capsys):
    config, run = stopped
    other = tmp_path / "other"
    interrupted(config, other, Stop("ContextKVLMModule", STEPS + 3), monkeypatch)
    pipeline.run_experiment(config, run, resume="strict")
    assert cli(*going_on(other)) == 0
    ours, theirs = (read(folder / "checkpoints" / "last.ckpt") for folder in (run, other))
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert same(ours[part], theirs[part]), part
    assert rows(run, "train") == rows(other, "train")
    capsys.readouterr()
    best = other / "checkpoints" / "best.ckpt"
    for subcommand in ("validate", "test"):
        assert cli(subcommand, "--config", other / "lightning.yaml", "--ckpt_path", best) == 0
    told = capsys.readouterr().out
    assert "val/ppl" in told
    assert "test/ppl" in told


@pytest.mark.slow
def test_what_was_trained_since_it_was_measured_is_not_exported(stopped, tmp_path, capsys):
    config, run = stopped
    pipeline.run_experiment(config, run, resume="strict")
    export_run(run, tmp_path / "measured")
    assert cli(*going_on(run), "--trainer.max_epochs=4") == 0
    assert "was trained further after it was measured" in capsys.readouterr().out
    assert json.loads((run / "metrics.json").read_text())["weights"] != sha256_of(run / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match="was trained further after it was measured"):
        export_run(run, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert cli("evaluate", run, "--suite", "position") == EXIT_CODE
    longer = replace(config, train=replace(config.train, max_epochs=4))
    pipeline.run_experiment(longer, run, resume="strict")
    export_run(run, tmp_path / "exported")
    capsys.readouterr()
    assert cli(*going_on(run), "--trainer.max_epochs=4") == 0
    assert "trained further" not in capsys.readouterr().out, "there was nothing left to train"


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_a_checkpoint_is_not_asked_about_contexts_of_another_encoder(stopped, tmp_path, capsys, subcommand):
    _, run = stopped
    last, asked = run / "checkpoints" / "last.ckpt", (subcommand, "--config", run / "lightning.yaml", "--ckpt_path")
    assert cli(*asked, last, "--trainer.precision=bf16-true") == 0, "which rounds its weights"
    content = read(last)
    content["state_dict"]["model.encoder.linear.weight"] *= 1.01
    VerifiedCheckpointIO().save_checkpoint(content, tmp_path / "moved.ckpt")
    capsys.readouterr()
    assert cli(*asked, tmp_path / "moved.ckpt") == EXIT_CODE
    assert "the checkpoint's encoder is not the one" in capsys.readouterr().err


def test_fit_from_the_beginning_replaces_no_checkpoint(stopped, tmp_path, capsys):
    _, run = stopped
    before = read(run / "checkpoints" / "last.ckpt")
    assert cli("fit", "--config", run / "lightning.yaml") == EXIT_CODE
    assert "would replace: go on from it with --ckpt_path" in capsys.readouterr().err
    assert same(read(run / "checkpoints" / "last.ckpt"), before)
    elsewhere = [
        f"--checkpoint.dirpath={tmp_path}",
        f"--safeguard.checkpoint={tmp_path / 'last.ckpt'}",
        f"--csv.folder={tmp_path / 'new'}",
    ]
    assert cli("fit", "--config", run / "lightning.yaml", *elsewhere, "--trainer.max_epochs=1") == 0
    assert read(tmp_path / "last.ckpt")["global_step"] == STEPS


def test_fit_leaves_a_run_alone_that_another_process_is_at(stopped, capsys):
    _, run = stopped
    before = read(run / "checkpoints" / "last.ckpt")["global_step"]
    with alone_in(RunFolder(run)):
        assert cli(*going_on(run)) == EXIT_CODE
    assert "another process is at the run" in capsys.readouterr().err
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fit_ends_after_a_signal_as_train_does_and_lets_go_of_the_run(stopped, monkeypatch, capsys, number, code):
    _, run = stopped
    monkeypatch.setattr(ContextKVLMModule, "on_train_batch_start", lambda *_: os.kill(os.getpid(), number))
    assert cli(*going_on(run)) == code
    assert capsys.readouterr().err == ""
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == STEPS + 4
    with alone_in(RunFolder(run)):
        pass


def test_values_are_compared_at_any_depth():
    saved = {"lr": 3e-4, "recipe": {"output_dropout": 0.3}}
    assert _same(saved["recipe"], {"output_dropout": "3e-1"})
    assert not _same(saved["recipe"], {"output_dropout": 0.5})
    assert _same(_saved_as(saved, "recipe.output_dropout"), 0.3)
    assert _saved_as({"recipe": None}, "recipe.output_dropout") is None


@pytest.mark.slow
def test_what_a_checkpoint_would_overrule_is_refused(stopped, capsys):
    _, run = stopped
    common = going_on(run)
    before = read(run / "checkpoints" / "last.ckpt")["global_step"]
    assert cli(*common, "--model.lr=0.5") == EXIT_CODE
    assert "--model.lr=0.5 has no effect" in capsys.readouterr().err
    assert cli(*common, "--model.heads", "4") == EXIT_CODE
    assert cli(*common, "--seed_everything=7") == EXIT_CODE
    assert "--seed_everything=7 has no effect" in capsys.readouterr().err
    edited = yaml.safe_load((run / "lightning.yaml").read_text())
    edited["model"]["lr"] = 0.5
    (run / "lightning.yaml").write_text(yaml.safe_dump(edited))
    assert cli(*common) == EXIT_CODE
    assert "model.lr: 0.5 of the file has no effect" in capsys.readouterr().err
    own = {**edited, "ckpt_path": str(run / "checkpoints" / "last.ckpt")}
    (run / "own.yaml").write_text(yaml.safe_dump(own))
    assert cli("fit", "--config", run / "own.yaml") == EXIT_CODE
    assert "model.lr: 0.5 of the file has no effect" in capsys.readouterr().err
    saved = read(run / "checkpoints" / "last.ckpt")["hyper_parameters"]["lr"]
    check_overruled([str(each) for each in (*common, f"--model.lr={saved:e}")])
    check_overruled(["fit", "--config", str(run / "own.yaml"), "--ckpt_path=null"])  # a new run
    last = str(run / "checkpoints" / "last.ckpt")
    for words in (["--ckpt_path=none.ckpt", f"--config={run / 'own.yaml'}"], [f"--ckpt_path={last}", "--model.lr=0.5"]):
        with pytest.raises(UserError, match=f"has no effect, for {last}"):
            check_overruled(words)
    check_overruled([f"--ckpt_path={last}", "--model.lr"])  # which LightningCLI has a sentence for
    (run / "own.yaml").write_text(yaml.safe_dump(own | {"ckpt_path": 5}))
    assert cli("fit", "--config", run / "own.yaml") == EXIT_CODE
    assert "ckpt_path: 5 of" in capsys.readouterr().err
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == before


def test_a_file_that_names_code_is_refused(stopped, tmp_path, capsys):
    _, run = stopped
    settings = yaml.safe_load((run / "lightning.yaml").read_text())
    canary = tmp_path / "canary"
    settings["trainer"]["callbacks"] = [
        {"class_path": "builtins.open", "init_args": {"file": str(canary), "mode": "w"}}
    ]
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(settings))
    assert cli("fit", "--config", tmp_path / "evil.yaml") == EXIT_CODE
    assert "names code to run" in capsys.readouterr().err
    assert not canary.exists()


def test_mistakes_are_one_sentence(stopped, tmp_path, capsys):
    _, run = stopped
    for arguments in (
        ("fit", "--config", tmp_path / "none.yaml"),
        ("fit", "--config", run / "lightning.yaml", "--ckpt_path", tmp_path / "none.ckpt"),
        ("fit", "--config", run / "lightning.yaml", "--trainer.max_epochz=3"),
        (*going_on(run), "--trainer.max_epochs=0"),
    ):
        assert cli(*arguments) == EXIT_CODE, arguments
        assert capsys.readouterr().err.count("\n") == 1, arguments


@pytest.mark.parametrize(
    "argument", ["--conf", "--conf=a", "-cevil.yaml", "--ckpt", "--ckpt_pat=a", "--seed", "--mod={}", "--train=a"]
)
def test_an_abbreviation_does_not_get_past_what_whole_names_are_held_to(argument, capsys):
    with pytest.raises(UserError, match=r"is short for -.*: write it out"):
        check_spelling(["--trainer.max_epochs", "3", argument])
    assert cli("fit", argument) == EXIT_CODE
    assert "is short for" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--config", "-c", "-c=a", "--model.lr", "--trainer", "--help", "--print_config"])
def test_a_whole_name_is_no_abbreviation(argument):
    check_spelling([argument, "a"])


def test_an_abbreviation_of_another_option_is_none_either(capsys):
    assert cli("fit", "--trainer.max_epoch", "3") == EXIT_CODE
    assert "trainer.max_epoch" in capsys.readouterr().err
