import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ctxkv_lightning import config
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report import runs
from ctxkv_lightning.report.runs import as_run, collect, reads, settings
from ctxkv_lightning.unread import Voices
from tests.conftest import ROOT
from tests.report.sample_metrics import model_metrics, sample_metrics, write_run, write_status

EACH = Voices(), Voices(pointer=True), Voices(counts=True), Voices(direct=True)


def test_runs_are_found_at_any_depth_once_and_best_first(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "deep" / "er", model_metrics(val_ppl=300.0))
    write_run(tmp_path / "b", model_metrics(val_ppl=100.0))
    write_run(tmp_path / ".hidden", model_metrics(val_ppl=1.0))
    found = collect([tmp_path, tmp_path / "b", tmp_path / "a" / ".." / "b"])
    assert [(run.name, round(run.val_ppl, 6)) for run in found.runs] == [("b", 100.0), ("a/deep/er", 300.0)]
    assert found.unfinished == found.skipped == []


def test_a_run_folder_itself_is_a_run(tmp_path: Path) -> None:
    assert [run.name for run in collect([write_run(tmp_path / "one", model_metrics())]).runs] == ["one"]


def test_what_a_run_says_is_what_its_metrics_say() -> None:
    run = as_run("x", sample_metrics())
    assert (run.val_ppl, run.train_ppl, run.gap, run.test_ppl) == (361.0, 148.7, 361.0 - 148.7, 372.6)
    assert (run.val_accuracy, run.best_epoch, run.trained, run.seconds) == (0.162, 5, 6_301_440, 97.9)
    assert run.kept is None  # these metrics are from before decode_state
    assert as_run("x", model_metrics()).kept == 621 * 256 * 4


def test_metrics_from_before_there_were_rivals_are_read() -> None:
    run = as_run("old", json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text()))
    assert run.model == "context_kv"
    assert run.settings["interval"] == 20


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("failed", "out of memory", "out of memory"),
        ("interrupted", None, "no reason was recorded"),
        ("running", None, "still running, or ended without a word"),
        ("finished", None, "said to be finished, but there is no metrics.json"),
    ],
)
def test_a_trial_without_metrics_is_listed_with_its_reason(
    tmp_path: Path, state: str, reason: str | None, told: str
) -> None:
    write_run(tmp_path / "1", model_metrics())
    write_status(tmp_path / "2", state, reason, interval=7, heads=2)
    assert collect([tmp_path]).unfinished == [("2", "interval=7 heads=2", state, told)]


def test_a_trial_with_metrics_is_a_run_whatever_its_status(tmp_path: Path) -> None:
    write_run(write_status(tmp_path / "1", "running", None).parent / "2", model_metrics())
    (tmp_path / "1" / "metrics.json").write_text(json.dumps(model_metrics(seed=3)))
    found = collect([tmp_path])
    assert len(found.runs) == 2
    assert found.unfinished == []


def _without(entry: str) -> dict[str, Any]:
    metrics = model_metrics()
    holder, _, key = entry.rpartition(".")
    del (metrics[holder] if holder else metrics)[key]
    return metrics


def _with(holder: str, key: str, value: Any) -> dict[str, Any]:
    metrics = model_metrics()
    metrics[holder][key] = value
    return metrics


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "metrics.json is not valid JSON (Expecting property name"),
        ("[]", "metrics.json is not a JSON object"),
        ("{}", "it lacks the entry 'result'"),
        (json.dumps(_without("result.val_ppl")), "it lacks the entry 'val_ppl'"),
        (json.dumps(_without("parameters.trainable")), "it lacks the entry 'trainable'"),
        (json.dumps(_with("result", "val_ppl", None)), "its entry result.val_ppl is null, not a finite number"),
        (json.dumps(_with("result", "val_ppl", float("nan"))), "its entry result.val_ppl is NaN, not a finite number"),
        (json.dumps(_with("train", "best_epoch", 99)), "its entries are not those of a run"),
        (json.dumps({**model_metrics(), "config": "?"}), "its entries are not those of a run"),
        ("\udcff", "metrics.json is not valid JSON ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_metrics_that_cannot_be_used_are_named_and_skipped(tmp_path: Path, content: str, told: str) -> None:
    write_run(tmp_path / "good", model_metrics())
    write_run(tmp_path / "bad", {})
    (tmp_path / "bad" / "metrics.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    found = collect([tmp_path])
    assert [run.name for run in found.runs] == ["good"]
    ((name, reason),) = found.skipped
    assert name == "bad"
    assert reason.startswith(told)


def test_copies_are_named_and_skipped(tmp_path: Path) -> None:
    shutil.copytree(write_run(tmp_path / "a", model_metrics()), tmp_path / "b")
    found = collect([tmp_path])
    assert [run.name for run in found.runs] == ["a"]
    assert found.skipped == [("b", "the same metrics.json as a")]


def test_a_broken_status_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model_metrics())
    (write_status(tmp_path / "b", "failed", "x") / "status.json").write_text("[1]")
    assert collect([tmp_path]).skipped == [("b", "status.json cannot be read")]


def test_no_run_at_all_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no run in .*: name folders that contain a metrics\.json"):
        collect([tmp_path])
    write_status(tmp_path / "7", "failed", "out of memory")
    write_status(tmp_path / "8", "failed", "out of time")
    with pytest.raises(UserError, match=r"no finished run in .* \(2 others; 7: out of memory\)"):
        collect([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        collect([tmp_path / "none"])


def test_runs_of_earlier_versions_did_what_the_defaults_say() -> None:
    defaults = dict(runs.leaves(asdict(config.Config())))
    assert all(defaults[key] == value for key, value in runs.LATER.items())
    assert {key for key in defaults if key.startswith("recipe.")} == {
        *(key for key in runs.LATER if key.startswith("recipe.")),
        *("recipe.pointer_dim", "recipe.pointer_window", "recipe.pointer_values"),
    }


def test_settings_leave_out_what_changes_nothing() -> None:
    kept = settings(model_metrics("transformer"))
    assert not {"interval", "max_contexts", "selection", "context_dim", "embeddings", "model.window_tokens"} & set(kept)
    assert not [key for key in kept if key.startswith(("pretrain.", "contexts."))]
    assert kept["heads"] == 8
    assert kept["model.dropout"] == 0.1
    assert reads("transformer", "heads", Voices())
    assert [reads("transformer", "pretrain.lr", voices) for voices in EACH] == [False, True, False, True]
    assert [reads("recurrence", "recipe.apart", voices) for voices in EACH] == [False, True, True, False]
    assert [reads("sliding_window", "recipe.pointer_dim", voices) for voices in EACH] == [False, True, False, False]


def test_settings_say_what_null_stands_for() -> None:
    everything = model_metrics()
    everything["config"]["samples"], everything["data"]["train_documents"] = None, 541
    assert settings(everything)["samples"] == 541
    assert settings(model_metrics("sliding_window"))["model.window_tokens"] == 621 * 256 // (2 * 768)
    assert settings(model_metrics("sliding_window", window_tokens=8))["model.window_tokens"] == 8
    deep = model_metrics("sliding_window")
    deep["config"]["model"]["layers"], deep["window"]["span_tokens"] = 4, 4 * (50 - 1) + 1
    assert settings(deep)["model.window_tokens"] == 50


def test_runs_from_before_an_encoder_could_be_taught_taught_none() -> None:
    now, idle, taught = model_metrics(), model_metrics(), model_metrics()
    now["config"]["pretrain"] |= {"lm_epochs": 0, "lm_weight_dropout": 0.0}
    idle["config"]["pretrain"] |= {"lm_epochs": 0, "lm_weight_dropout": 0.5}
    taught["config"]["pretrain"] |= {"lm_epochs": 1, "lm_weight_dropout": 0.5}
    assert settings(model_metrics()) == settings(now) == settings(idle)
    assert settings(taught)["pretrain.lm_weight_dropout"] == 0.5


def test_runs_from_before_there_were_layers_have_one() -> None:
    now, local = model_metrics(), model_metrics()
    now["config"]["model"] |= {"layers": 1, "local_window": None}
    local["config"]["model"] |= {"layers": 1, "local_window": 8}
    assert settings(model_metrics()) == settings(now) == settings(local)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({}, "context_kv"),
        ({"selection": "grid"}, "context_kv, grid"),
        ({"interval": [1, 1, 5, 5, 20, 20, 80, 80]}, "context_kv, per head"),
        ({"selection": "grid", "interval": [1] * 8}, "context_kv, grid, per head"),
        ({"model": "transformer", "selection": "grid"}, "transformer"),
    ],
)
def test_a_model_is_named_with_how_it_chooses_contexts(choice: dict[str, Any], name: str) -> None:
    assert as_run("x", model_metrics(**choice)).model == name


def test_a_run_that_was_resumed_is_a_run_like_any_other() -> None:
    """Older metrics say how it was resumed."""
    resumed = model_metrics()
    resumed["config"]["resume"] = "outputs/some/run"
    assert as_run("a", resumed).settings == as_run("b", model_metrics()).settings
