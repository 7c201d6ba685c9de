"""RESULTS.md says what the metrics say, whichever way they fall."""

import copy
import json

import pytest

from benchmarks import findings, findings_runs, findings_sentences
from benchmarks.recorded import kept_entries
from tests.conftest import ROOT


@pytest.fixture
def runs():
    """Three seeds of the published selection and of a rival, around 350 and 320."""
    base = json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text())
    base["config"] |= {"selection": "strided"}
    base["decode_state"] = {"bytes": {"10000": 635_904}}
    made = []
    for name, ppl in (("context_kv", 350.0), ("sliding_window", 320.0)):
        for seed in (42, 1, 2):
            run = copy.deepcopy(base)
            run["config"]["seed"], run["config"]["model"]["name"] = seed, name
            run["result"] |= {"val_ppl": ppl + seed % 3, "test_ppl": ppl + 50}
            made.append(run)
    return made


def test_rows_are_means_over_seeds_best_first(runs):
    rows = findings_runs.rows_of(runs, 100)
    assert [(row.name, len(row.runs)) for row in rows] == [("sliding_window", 3), (findings_runs.OURS, 3)]
    assert rows[0].cells()[1] == "321.0 ± 1.0"


def test_who_wins_is_decided_by_the_numbers(runs):
    def said():
        return " ".join(findings_sentences.sentences(runs, findings_runs.rows_of(runs, 100)))

    assert "beats the published selection" in said()
    for run in runs[3:]:
        run["result"]["val_ppl"] += 100
    assert "loses to the published selection" in said()
    for run in runs[3:]:
        run["result"]["val_ppl"] -= 70
    assert "not told apart" in said()


def test_what_is_missing_is_named(runs):
    left = findings.missing(runs)
    assert "context_kv, grid (3)" in left
    assert " sliding_window (" not in left.split(";")[0]
    assert "8 of 9 trials of the sweep over interval and max_contexts" in left


def test_a_run_of_more_epochs_is_a_kind_of_its_own(runs):
    for run in runs[:3]:
        run["config"]["train"]["max_epochs"] = 40
    assert [row.name for row in findings_runs.rows_of(runs, 100)] == ["sliding_window", findings_runs.PATIENT]
    for run in runs[3:]:
        run["config"]["train"]["max_epochs"] = 40
    assert [row.name for row in findings_runs.rows_of(runs, 100)] == [findings_runs.PATIENT]


def test_what_more_text_does_is_said(runs):
    more = copy.deepcopy(runs)
    for run in more:
        run["config"]["samples"] = 500
    said = findings_sentences.sentences(runs, findings_runs.rows_of(runs, 100), findings_runs.rows_of(more, 500))
    assert "better than it are `sliding_window` 321.0 ± 1.0" in said[-1]


def test_interval_and_max_contexts_are_crossed(runs):
    other = copy.deepcopy(runs[0])
    other["config"] |= {"interval": 50, "max_contexts": 16}
    lines = findings.crossed_table([runs[0], other]).splitlines()
    assert lines[0] == "| max_contexts | interval=20 | interval=50 |"
    assert lines[2].endswith("|  | 350.0 |")
    assert lines[3].endswith("| 350.0 |  |")


def test_a_trial_that_ran_twice_is_told_and_the_last_is_in_the_table(runs):
    again = copy.deepcopy(runs[0])
    again["config"] |= {"interval": 50}
    once = copy.deepcopy(again)
    again["result"]["val_ppl"], again["machine"]["device"] = 340.0, "cuda:0"
    table = findings.crossed_table([runs[0], once, again])
    assert "| 32 | 350.0 | 340.0 |" in table
    assert "`interval=50 max_contexts=32` ran once more: 350.0 on a CPU, 340.0 on a GPU." in table
    assert table.count("ran once more") == 1


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ((400.0, 401.0, 402.0), "is not told apart from the published selection: validation"),
        ((480.0, 481.0, 482.0), "from the published selection on the validation set and loses to it on the test set:"),
        ((300.0, 301.0, 302.0), "from the published selection on the validation set and beats it on the test set:"),
    ],
)
def test_validation_and_test_are_both_said(runs, test, words):
    def row(name, vals, tests):
        found = [copy.deepcopy(runs[0]) for _ in vals]
        for run, val, ppl in zip(found, vals, tests, strict=True):
            run["result"] |= {"val_ppl": val, "test_ppl": ppl}
        return findings_runs.Row(name, found)

    ours = row("ours", (350.0, 352.0, 351.0), (400.0, 401.0, 402.0))
    said = findings_sentences._against(ours, row("theirs", (351.0, 353.0, 352.0), test), "why")
    assert words in said
    assert f"test PPL {test[1]} ± 1.0 against 401.0 ± 1.0" in said


def test_the_page_in_the_repository_is_made_of_the_metrics_in_the_repository():
    pages = ROOT / "docs" / "results"
    kept = findings.kept_runs(pages / "runs")
    assert kept
    recorded = kept_entries(pages / "recall")
    expected = findings.page(kept, pages.relative_to(ROOT), recorded)
    assert (ROOT / "RESULTS.md").read_text() == expected


def test_a_model_whose_encoder_was_taught_is_a_row_of_its_own(runs):
    for run in runs[3:]:
        run["config"]["model"]["name"], run["config"]["pretrain"]["lm_epochs"] = "context_kv", 4
    rows = findings_runs.rows_of(runs, 100)
    assert [row.name for row in rows] == [findings_runs.OURS + findings_runs.LEARNT, findings_runs.OURS]
    said = findings_sentences.sentences(runs, rows)
    assert any("taught to predict" in sentence and "beats the published" in sentence for sentence in said)
    assert "for 4 epochs by truncated" in findings.taught(runs)
    assert findings.taught(runs[:3]) == ""
    assert all(run["config"]["pretrain"].get("lm_epochs", 0) == 0 for run in findings_runs.crossed(runs)[20, 32])


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ((301.0, 300.0, 296.0), "0.998 ×: attention to contexts and to tokens are not told apart by these seeds"),
        ((401.0, 400.0, 402.0), "0.744 ×: attention to contexts does better"),
        ((201.0, 200.0, 202.0), "1.484 ×: attention to contexts does worse"),
    ],
)
def test_models_that_read_the_same_context_are_told_apart_or_not(runs, theirs, verdict):
    for run in runs:
        run["config"]["pretrain"]["lm_epochs"], run["config"]["recipe"] = 4, {"read_current": True}
    for run, test in zip(runs, (297.0, 299.0, 299.0, *theirs), strict=True):
        run["result"]["test_ppl"] = test
    plain = copy.deepcopy(runs[0])
    plain["config"]["pretrain"]["lm_epochs"], plain["config"]["recipe"] = 0, {"read_current": False}
    made = [*runs, plain]
    said = findings_sentences.sentences(made, findings_runs.rows_of(made, 100))
    assert any(f"against which ours is at {verdict}." in sentence for sentence in said), said
    assert sum("`sliding_window" in sentence and "the very same context" in sentence for sentence in said) == 1


def test_of_models_that_read_the_same_context_only_seeds_that_both_have_are_compared(runs):
    for run in runs:
        run["config"]["pretrain"]["lm_epochs"], run["config"]["recipe"] = 4, {"read_current": True}
    plain = copy.deepcopy(runs[0])
    plain["config"]["pretrain"]["lm_epochs"], plain["config"]["recipe"] = 0, {"read_current": False}
    for run, test in zip(runs, (100.0, 300.0, 500.0, 200.0, 0.0, 0.0), strict=True):
        run["result"]["test_ppl"] = test
    made = [*runs[:4], plain]  # of the rival, seed 42 alone
    said = " ".join(findings_sentences.sentences(made, findings_runs.rows_of(made, 100)))
    assert "(1,000 bytes kept; one seed), against which ours is at 0.500 ×: one seed says no more." in said.replace(
        "635,904 bytes kept; one", "1,000 bytes kept; one"
    )


def test_taught_contexts_that_are_read_directly_stand_beside_rivals_and_beside_either_alone(runs):
    third = copy.deepcopy(runs[0])
    third["config"]["pretrain"]["lm_epochs"] = 4
    third["config"]["recipe"] = {"read_current": True}
    third["result"] |= {"val_ppl": 250.0, "test_ppl": 296.8}
    more = [*runs, third]
    assert findings_runs.published(more) == more
    rows = findings_runs.rows_of(more, 100)
    assert rows[0].name == findings_runs.OURS + findings_runs.LEARNT + findings_runs.DIRECT
    (said,) = [each for each in findings_sentences.sentences(more, rows) if "both taught and read" in each]
    assert "a test PPL of 296.8 (635,904 bytes kept); with neither 400.0 ± 0.0. That is" in said
    assert "0.802 × that of `sliding_window` (370.0 ± 0.0, 635,904 bytes)" in said
    third["config"]["recipe"]["projection"] = True
    assert findings_runs.published(more) == runs


def test_what_the_runs_ran_on_and_in_is_said(runs):
    for run in runs:
        run["machine"] |= {"device": "cpu", "precision": "bf16-mixed"}
    assert findings.machines(runs) == "on a CPU"
    runs[0]["machine"]["precision"] = "32-true"
    runs[1]["machine"] |= {"device": "cuda:0", "processor": "NVIDIA H200"}
    said = "5 of the 6 runs on a CPU, 1 on an NVIDIA H200, 1 in fp32, the others in bf16"
    assert findings.machines(runs) == said
