"""`python -m ctxkv_lightning evaluate`, from the folders of small runs to tables, figures and JSON."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from ctxkv_lightning import evaluate, pipeline
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.config import DataConfig, TokenizerConfig, load_config
from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.lm.state import state_bytes
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.text.mqar import Task
from ctxkv_lightning.use import open_trained
from tests.conftest import ROOT
from tests.small_run import small_run
from tests.test_pipeline import SMALL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small runs of two models on one text, and of a third with another tokenizer."""
    root = tmp_path_factory.mktemp("text")
    other = tmp_path_factory.mktemp("other")
    return [small_run(root), small_run(root, "recurrence"), small_run(other, tokenizer=TokenizerConfig(vocab_size=270))]


def mqar_config(root, **options):
    task = Task(pairs=2, length=12, keys=4, values=4, heldout=100)
    return replace(
        SMALL,
        samples=100,
        cache_dir=str(root / "cache"),
        data=DataConfig(source="mqar", mqar=task),
        tokenizer=TokenizerConfig(source="symbols"),
        embedding=replace(SMALL.embedding, source="random"),
        trainer=replace(SMALL.trainer, precision="32-true"),
        **options,
    )


@pytest.fixture(scope="module")
def mqar_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("mqar")
    pipeline.run_experiment(mqar_config(root), root / "run")
    return root / "run"


@pytest.fixture(autouse=True)
def _few_lags(monkeypatch):
    monkeypatch.setattr(evaluate, "LAGS", (1, 2, 30))
    monkeypatch.setattr(evaluate, "DISTANCES", (50, 60))


def written(run):
    return json.loads((run / "evaluation.json").read_text())


def test_lags_are_asked_at_the_edges_of_what_layers_read_together():
    (deep,) = check_command_line(["model=sliding_window", "model.layers=4", "model.window_tokens=25"])
    assert evaluate.edges_of(deep) == {96, 97, 98, 4 * 24 + 1}
    (plain,) = check_command_line(["max_contexts=4"])
    (local,) = check_command_line(["max_contexts=4", "model.layers=4", "model.local_window=16"])
    assert evaluate.edges_of(local) == evaluate.edges_of(plain) | {lag + 45 for lag in evaluate.edges_of(plain)}


def test_runs_are_compared_side_by_side(runs, tmp_path, capsys):
    first, second, _ = runs
    assert main(["evaluate", str(first), str(second), "--trials", "2", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    for phrase in (
        "context_kv",
        "recurrence",
        "PPL by position",
        "copy: the answer",
        "passkey: the key",
        "chance 10 %",
    ):
        assert phrase in said.out
    assert "different tokenizers" not in said.out
    assert said.err.count(" s\n") == 6
    for name in ("recall.png", "recall_by_lag.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
        assert f"{tmp_path / 'out' / name}\n" in said.out
    for run, model in ((first, "context_kv"), (second, "recurrence")):
        found = written(run)
        assert (found["model"], found["split"], found["seed"]) == (model, "validation", 42)
        assert list(found["suites"]) == ["position", "copy", "passkey"]
        copy = found["suites"]["copy"]
        assert [each["first"] for each in copy["lags"]] == [1, 2, 4, 5, 6, 14, 15, 16, 30]
        assert copy["chance"] == 0.1
        assert copy["state_bytes"] == state_bytes(open_trained(run).model, copy["tokens"])


def test_the_text_is_the_one_that_the_run_was_validated_and_tested_on(runs, tmp_path):
    run = runs[0]
    for split, key in (("validation", "val_ppl"), ("test", "test_ppl")):
        assert main(["evaluate", str(run), "--suite", "position", "--split", split, "--trials", "2"]) == 0
        expected = open_trained(run).metrics["result"][key]
        assert written(run)["suites"]["position"]["ppl"]["value"] == pytest.approx(expected, rel=1e-5)


def test_suites_that_were_asked_before_stay(runs, capsys):
    run = shutil.copytree(runs[0], runs[0].parent / "copied")
    (run / "evaluation.json").unlink(missing_ok=True)
    assert main(["evaluate", str(run), "--suite", "passkey", "--trials", "1"]) == 0
    assert list(written(run)["suites"]) == ["passkey"]
    passkey = written(run)["suites"]["passkey"]
    assert main(["evaluate", str(run), "--suite", "copy", "--trials", "1", "--seed", "7"]) == 0
    assert list(written(run)["suites"]) == ["passkey", "copy"]
    assert written(run)["suites"]["passkey"] == passkey
    assert written(run)["suites"]["copy"]["seed"] == 7
    assert (run / "recall.png").is_file()
    assert "passkey" not in capsys.readouterr().out.split("copy:")[1]


def test_what_cannot_be_asked_is_left_out_unless_it_was_named(runs, capsys, monkeypatch):
    run = shutil.copytree(runs[0], runs[0].parent / "leaving-out")
    (run / "evaluation.json").unlink(missing_ok=True)
    monkeypatch.setattr(evaluate, "DISTANCES", (5, 60))
    assert main(["evaluate", str(run), "--suite", "passkey", "--trials", "1"]) == 0
    assert [at["first"] for at in written(run)["suites"]["passkey"]["lags"]] == [60]
    monkeypatch.setattr(evaluate, "DISTANCES", (5,))
    (run / "evaluation.json").unlink()
    assert main(["evaluate", str(run), "--trials", "1"]) == 0
    assert "left out: --suite passkey cannot be asked of this run" in capsys.readouterr().err
    assert list(written(run)["suites"]) == ["position", "copy"]
    assert main(["evaluate", str(run), "--suite", "copy", "passkey", "--trials", "1", "--seed", "7"]) == 2
    assert written(run)["suites"]["copy"]["seed"] == 7  # what was answered before is kept


def test_runs_with_other_tokenizers_get_texts_of_their_own(runs, capsys, tmp_path):
    command = ["evaluate", str(runs[0]), str(runs[2]), "--suite", "copy", "position", "--trials", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "different tokenizers" in said
    assert "270" in said
    assert "400" in said


def test_recall_on_its_task_is_the_accuracy_that_training_measured(mqar_run, capsys):
    assert main(["evaluate", str(mqar_run)]) == 0
    assert "chance 25 %" in capsys.readouterr().out
    found = written(mqar_run)["suites"]["mqar"]
    answers = sum(each["recall"]["count"] for each in found["lags"])
    right = sum(each["recall"]["count"] * each["recall"]["value"] for each in found["lags"])
    assert answers == 200
    measured = json.loads((mqar_run / "metrics.json").read_text())
    assert right / answers == pytest.approx(measured["result"]["val_accuracy"], abs=1e-6)
    assert measured["data"]["val_tokens"] == 100 * 14 - 2
    # the counting models are scored on the answers too: 4 values are equally frequent there, among more than 50 symbols
    assert measured["footing"]["kneser_ney_ppl"] < 6


@pytest.mark.parametrize("model", ["transformer", "sliding_window", "recurrence", "cascade"])
def test_every_model_trains_on_the_task(model, tmp_path):
    config = mqar_config(tmp_path, model=replace(SMALL.model, name=model))
    pipeline.run_experiment(config, tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--suite", "mqar"]) == 0
    assert load_config(RunFolder(tmp_path / "run")) == config


def test_what_cannot_be_evaluated_is_one_sentence(runs, mqar_run, tmp_path, capsys):
    unfinished = shutil.copytree(runs[0], tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    changed = shutil.copytree(runs[0], tmp_path / "changed")
    known = json.loads((changed / "data.json").read_text())
    (changed / "data.json").write_text(json.dumps({**known, "text": "0" * 64}))
    damaged = shutil.copytree(runs[0], tmp_path / "damaged")
    (damaged / "evaluation.json").write_text("[]")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is no run folder"),
        ([str(tmp_path)], "is no run folder"),
        ([str(unfinished)], "has no metrics.json"),
        ([str(changed)], "the text has changed"),
        ([str(runs[0]), "--suite", "mqar"], "does not fit .*data=text: train one by 'python train.py data=mqar'"),
        ([str(mqar_run), str(runs[0]), "--suite", "copy"], "does not fit .*data=mqar: name a run that read text"),
        ([str(damaged)], "evaluation.json is not an evaluation"),
        ([str(runs[0]), "--output", str(damaged / "evaluation.json" / "x")], "--output .* cannot be made"),
        ([str(runs[0]), "--trials", "0"], "trials=0 must be at least 1"),
        ([str(runs[0]), "--seed", "-1"], "seed=-1 must be at least 0"),
        ([str(runs[0]), "--suite", "paskey"], "invalid choice: 'paskey'"),
    ):
        assert main(["evaluate", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert re.search(message, said.err), said.err


@pytest.mark.slow
def test_contexts_learn_to_recall(tmp_path):
    options = "samples=2000 model=context_kv max_contexts=32 train.max_epochs=4 hydra.mode=RUN".split()
    command = [sys.executable, "train.py", "experiment=mqar", *options]
    folders = [f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([*command, *folders], cwd=ROOT, check=True, capture_output=True)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = written(tmp_path / "run")["suites"]["mqar"]["lags"]
    right = sum(each["recall"]["count"] * each["recall"]["value"] for each in found)
    assert right / sum(each["recall"]["count"] for each in found) > 0.9
