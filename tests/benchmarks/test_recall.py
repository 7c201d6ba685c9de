"""What is recorded of models' memory is what was asked, and what is said of it follows the numbers."""

import copy
import json
from dataclasses import asdict

import pytest

from benchmarks import findings, recall, recorded, remembered
from ctxkv_lightning import pipeline
from ctxkv_lightning.door import check_command_line
from tests.conftest import ROOT
from tests.test_evaluate import mqar_config

PAGES = ROOT / "docs" / "results"


def estimate(value, error=0.01, count=50):
    return {"value": value, "error": error, "count": count}


def suite(lags, state, raised=0.1, recalled=0.1, gain=0.0):
    """A recall suite, at each lag the same unless a dict says what it is there."""

    def at(what, lag):
        return what.get(lag, 0.1) if isinstance(what, dict) else what

    asked = [
        {
            "first": lag,
            "last": lag,
            "recall": estimate(at(recalled, lag)),
            "without": estimate(0.1),
            "gain": estimate(at(gain, lag)),
            "raised": estimate(at(raised, lag)),
            "rank": None,
        }
        for lag in lags
    ]
    return {"chance": 0.1, "tokens": 2052, "lags": asked, "state_bytes": state}


def on_text(name, model, ppl, excess=0.0, **suites):
    """A run on the text that is at chance but for what is said."""
    histories = [
        {"tokens": tokens, "ppl": estimate(ppl), "excess": estimate(excess if tokens == 100 else 0.0)}
        for tokens in (100, 640)
    ]
    position = {"chance": 8192, "ppl": estimate(ppl), "bins": [], "histories": histories}
    found = {
        "position": position,
        "copy": suite((1, 19, 20, 21, 619, 620, 621), 1_000),
        "passkey": suite((30, 2000), 1_000),
        **suites,
    }
    return {
        "name": name,
        "seed": 42,
        "trained": 5,
        "reads": 32,
        "task": None,
        "evaluation": {"model": model, "suites": found},
    }


def on_task(name, state, near, seed=42, far=0.05):
    model = name.split(",")[0]
    lags = [
        {"first": 1, "last": 1, "recall": estimate(near), "without": None, "gain": estimate(0.5), "raised": None},
        {"first": 2, "last": 3, "recall": estimate(far), "without": None, "gain": estimate(0.5), "raised": None},
    ]
    found = {"chance": 1 / 16, "tokens": 99, "lags": lags, "state_bytes": state}
    task = {"pairs": 4, "length": 32, "keys": 16, "values": 16, "heldout": 9}
    evaluation = {"model": model, "suites": {"mqar": found}}
    read = int(name.split(", ")[1].split()[0]) if "," in name else None
    return {"name": name, "seed": seed, "trained": 5, "reads": read, "task": task, "evaluation": evaluation}


TASK = [
    *(on_task("context_kv, 4 contexts", 100, 0.1 + seed / 100, seed) for seed in (1, 2, 3)),
    on_task("context_kv, 8 contexts", 200, 0.95, far=0.85),
    on_task("context_kv, 16 contexts", 400, 0.5),
    on_task("sliding_window, 8 tokens", 250, 0.2),
    on_task("recurrence", 50, 0.3, far=0.3),
]
TEXT = [on_text(recorded.OURS, "context_kv", 350.0, 0.2), on_text("recurrence", "recurrence", 360.0)]


def said(entries):
    return "\n".join(remembered.section(entries))


def test_the_task_is_a_row_for_each_size_with_its_lags_over_seeds():
    table = said(TASK).split("| --- |")[0] and said(TASK).splitlines()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith(("| c", "| s", "| r"))
    ]
    assert rows == [
        ["recurrence", "50", "30.0", "30.0", "30.0", "1"],
        ["context_kv, 4 contexts", "100", "12.0", "5.0", "8.5 ± 0.5", "3"],
        ["context_kv, 8 contexts", "200", "95.0", "85.0", "90.0", "1"],
        ["sliding_window, 8 tokens", "250", "20.0", "5.0", "12.5", "1"],
        ["context_kv, 16 contexts", "400", "50.0", "5.0", "27.5", "1"],
    ]


def test_bytes_against_recall_is_said_as_it_is():
    text = said(TASK)
    assert "at best 90.0 % with 200 (context_kv, 8 contexts); 400 bytes (context_kv, 16 contexts) find 27.5 %" in text
    assert "less by 62.5 points (one seed)" in text
    assert "`sliding_window, 8 tokens` finds" not in text, "a margin over who has not learnt it says nothing"
    assert "`recurrence` finds 30.0 % with 50 bytes, fewer than any" in text
    assert "keys: `context_kv, 4 contexts` (8.5 ± 0.5 %) and `sliding_window, 8 tokens` (12.5 %)." in text
    better = [*TASK[:-2], on_task("sliding_window, 8 tokens", 250, 1.0, far=1.0)]
    assert "90.0 %, less by 10.0 points (one seed)" in said(better)


def test_what_lies_behind_the_window_is_told_apart():
    assert "to the window" not in said(TASK)
    narrow = [on_task("context_kv, 2 contexts", 100, near, seed) for near, seed in ((0.9, 1), (0.7, 2))]
    assert "to the window, 80.0 % inside it and 5.0 % behind it (`context_kv, 2 contexts`) are found" in said(narrow)


def test_chance_and_edges_are_told_from_what_stands_out():
    text = said(TEXT)
    assert "In copy none of 2 models is above chance" in text
    assert "lag 20 is not told apart from its neighbours" in text
    assert "are 100 for `recurrence`; 640 for `context_kv, strided`" in text
    assert "(1,000 bytes) loses to none of these" in text
    lags = (1, 19, 20, 21, 619, 620, 621)
    edge = suite(lags, 1_000, gain={20: 0.3, 620: -0.2}, raised={20: 0.5})
    text = said([on_text(recorded.OURS, "context_kv", 350.0, copy=edge), TEXT[1]])
    assert "lag 20 is above its neighbours (+0.200 ± 0.012)" in text
    assert "lag 620 is below its neighbours (-0.300 ± 0.012)" in text


def test_where_ours_loses_is_said():
    strong = on_text("best", "transformer", 300.0, copy=suite((1, 19, 20, 21, 619, 620, 621), 7_000, 0.9, 0.8))
    text = said([*TEXT, strong])
    assert (
        "above chance (10.0 %) over all lags: `best` (80.0 % recalled, 90.0 % moved); 2 others not above chance" in text
    )
    assert "loses to `best` (7,000 bytes) in copy (90.0 % moved against 10.0 %) and PPL (300.0 against 350.0)." in text


def test_nothing_is_said_where_nothing_was_recorded():
    assert remembered.section([]) == []
    assert "Copying" not in said(TASK)
    assert "Associative" not in said(TEXT)


def as_run(*arguments):
    run = json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text())
    run["config"] = asdict(check_command_line(list(arguments))[0])
    run["decode_state"] = {"bytes": {"10000": 1_000}}
    return copy.deepcopy(run)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "context_kv, strided"),
        (["selection=grid"], "context_kv, grid"),
        (["model=transformer"], "transformer"),
        (["experiment=best"], "context_kv, best"),
        (["experiment=best", "model=recurrence", "recipe.pointer_window=602"], "recurrence, best"),
        (["experiment=best", "model=sliding_window"], "sliding_window, best"),
        (["experiment=best", "model=transformer"], "transformer, best"),
        (["experiment=best", "pretrain.lm_epochs=0"], None),
        (["seed=1"], None),
        (["interval=50"], None),
        (["samples=500"], None),
        (["experiment=best", "recipe.pointer_heads=2"], None),
        (["experiment=best", "model=recurrence", "train.lr=0.5"], None),
    ],
)
def test_runs_are_chosen_by_what_they_are(arguments, name):
    assert recall.text_name(as_run(*arguments)) == name


def test_of_each_kind_one_is_chosen_and_the_task_is_another_kind(tmp_path):
    task = as_run("experiment=mqar", "model=recurrence", "max_contexts=8", "hydra.mode=RUN")
    for name, run in (("a", as_run("model=recurrence")), ("b", as_run("model=recurrence")), ("c", task)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(run))
    assert [(each.folder.name, each.name) for each in recall.chosen(tmp_path)] == [
        ("a", "recurrence"),
        ("c", "recurrence"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("recall")
    pipeline.run_experiment(mqar_config(root), root / "runs" / "mqar" / "one")
    return root / "runs"


def test_runs_are_asked_once_and_what_does_not_load_is_one_line(runs, tmp_path, monkeypatch, capsys):
    options = [str(runs), "--output", str(tmp_path / "R.md"), "--pages", str(tmp_path / "pages")]
    record = recall.main(options)
    (entry,) = json.loads(record.read_text())
    assert entry["name"] == f"context_kv, {mqar_config(tmp_path).max_contexts} contexts"
    assert entry["reads"] == mqar_config(tmp_path).max_contexts
    written = json.loads((runs / "mqar" / "one" / "evaluation.json").read_text())
    assert entry["evaluation"]["suites"] == written["suites"]
    page = (tmp_path / "R.md").read_text()
    assert "## What they remember" in page
    assert (tmp_path / "pages" / "recall" / "task_recall.png").stat().st_size > 10_000
    monkeypatch.setattr(recall, "evaluate_run", None)  # would be called for what is not finished
    before = record.read_bytes()
    recall.main(options)
    assert record.read_bytes() == before
    monkeypatch.undo()
    (runs / "mqar" / "one" / "evaluation.json").unlink()
    (runs / "mqar" / "one" / "checkpoints" / "best.ckpt").write_bytes(b"other")
    capsys.readouterr()
    recall.main(options)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is left out: " in error
    assert record.read_bytes() == before
    assert (tmp_path / "R.md").read_text() == page


def test_metrics_of_the_task_are_no_results_of_the_text(runs, tmp_path):
    findings.keep_metrics(runs, tmp_path / "kept")
    assert not list(tmp_path.rglob("metrics.json"))


def test_the_tables_in_the_repository_are_made_of_the_evaluations_in_the_repository():
    entries = recorded.kept_entries(PAGES / "recall")
    assert {entry["task"] is None for entry in entries} == {True, False}
    assert (PAGES / "recall" / "report.md").read_text() == remembered.report(entries)


def test_more_layers_are_another_rival():
    deep = on_task("sliding_window, 4 tokens, 2 layers", 300, 0.6)
    found = recall.task_name(
        {"config": {"model": {"name": "sliding_window", "layers": 2}}, "window": {"span_tokens": 7}}
    )
    assert found == deep["name"]
    text = said([*TASK, deep])
    assert "`sliding_window, 8 tokens` (12.5 %)" in text
    assert "`sliding_window, 4 tokens, 2 layers` finds 32.5 %" in text
