import errno
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report import page
from ctxkv_lightning.report.kept import decoder_section
from ctxkv_lightning.report.markdown import table, thinned
from ctxkv_lightning.report.page import render, summary, summary_table, write_report
from ctxkv_lightning.run.folder import RunFolder
from tests.conftest import ROOT
from tests.report.sample_metrics import model_metrics, sample_metrics


def cells(text: str, first: str, section: str) -> list[str]:
    """The cells of the row of `section` that begins with `first`, without the first."""
    body = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    (found,) = [row[1:] for row in rows if row[0] == first]
    return found


@pytest.fixture(scope="module")
def text() -> str:
    return render(sample_metrics(), {"perplexity": "figures/perplexity.png"})


def test_report_and_figures_are_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_metrics(sample_metrics())
    assert write_report(run) == run.report
    links = re.findall(r"!\[\w+\]\((.+?)\)", run.report.read_text(encoding="utf-8"))
    assert links == [f"figures/{name}.png" for name in ("pretrain", "spectrum", "perplexity", "attention")]
    assert all((tmp_path / link).is_file() for link in links)
    assert str(tmp_path) not in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("section", "first", "rest"),
    [
        ("Text", "train", ["100", "122,794"]),
        ("Settings", "`interval`", ["20"]),
        ("Settings", "`pretrain.lr`", ["0.002"]),
        ("Settings", "`trainer.enable_progress_bar`", ["null"]),
        ("Context window", "Theoretical contexts, N / I + 1", ["6,140"]),
        ("Context window", "Tokens of history, M × I", ["640"]),
        ("Context window", "Contexts a decoder must keep", ["621"]),
        ("Context window", "Bytes of those in fp32", ["635,904 (636 KB)"]),
        ("Parameters", "embedding", ["38,597,376", "85.5 %"]),
        ("Parameters", "total", ["45,163,264", "100.0 %"]),
        ("Parameters", "trained", ["6,301,440", "14.0 %"]),
        ("Phase 1", "Iterations", ["18"]),
        ("Phase 1", "Effective rank", ["82.2 %"]),
        ("Phase 2, epoch by epoch", "1", ["3,085.4", "572.0", "11.6 %", "11.0", "11,012", ""]),
        ("Phase 2, epoch by epoch", "**5**", ["148.7", "**361.0**", "16.2 %", "11.4", "10,852", "best"]),
        ("Result, and its footing", "this model, epoch 5", ["361.0", "1.00 ×", "372.6", "1.00 ×"]),
        ("Result, and its footing", "unigram model", ["982.0", "0.37 ×", "1,004.1", "0.37 ×"]),
        ("Result, and its footing", "Kneser-Ney trigram + cache", ["128.0", "2.82 ×", "133.9", "2.78 ×"]),
        ("Overfitting", "best (5)", ["148.7", "361.0", "212.3", "2.43 ×"]),
        ("Overfitting", "last (8)", ["59.8", "484.4", "424.6", "8.10 ×"]),
        ("Time by stage", "train", ["89.2", "91.1 %"]),
        ("Memory by stage", "train", ["2.71", "–"]),
        ("Cache", "train context", ["119.92"]),
        ("Cache", "total", ["313.16"]),
        ("Cache", "`tokens`, a row per token of the text", ["497.77"]),
        ("What a decoder keeps", "1,000", ["0.61", "3.64", "5.86"]),
        ("What a decoder keeps", "100,000", ["0.61", "3.64", "585.94"]),
        ("Versions and machine", "torch", ["2.13.0"]),
    ],
)
def test_the_published_numbers_stand_in_their_tables(text: str, section: str, first: str, rest: list[str]) -> None:
    assert cells(text, first, section) == rest


def test_the_source_is_aligned(text: str) -> None:
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.splitlines()}) == 1


def test_summary_says_what_the_numbers_say() -> None:
    said = summary(sample_metrics())
    assert "best at epoch 5 of 8: a validation PPL of 361.0" in said
    assert "better than the unigram model (1,004.1; ours is 63 % lower)" in said
    assert "worse than the Kneser-Ney trigram + cache (133.9; ours is 178 % higher)" in said
    assert "Training stopped when validation no longer improved" in said


def test_summary_turns_with_the_numbers() -> None:
    metrics = sample_metrics(epochs=3)
    metrics["result"]["test_ppl"] = 1004.0
    said = summary(metrics)
    assert "level with the unigram model (1,004.1)" in said
    assert "worse than the Kneser-Ney trigram (415.3; ours is 142 % higher)" in said
    assert "better" not in said
    assert "to its last epoch" in said


def test_without_a_test_set_validation_decides() -> None:
    metrics = sample_metrics()
    metrics["result"].update(test_ppl=None, test_accuracy=None)
    for key in ("unigram", "kneser_ney", "kneser_ney_cache"):
        del metrics["footing"][f"test_{key}_ppl"]
    said = render(metrics, {})
    assert "On the same validation tokens it is better than the unigram model (982.0; ours is 63 % lower)" in said
    assert "On the test text" not in said
    assert cells(said, "unigram model", "Result, and its footing") == ["982.0", "0.37 ×", "–", "–"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"epochs": 1, "iterations": 1, "heads": 1, "max_contexts": 1},
        {"iterations": 0},
        {"epochs": 2, "iterations": 60, "interval": 1, "max_contexts": 2},
    ],
)
def test_degenerate_runs_have_a_report(tmp_path: Path, sizes: dict[str, int]) -> None:
    run = RunFolder(tmp_path)
    run.write_metrics(sample_metrics(**sizes))
    said = write_report(run).read_text(encoding="utf-8")
    assert ("history of this encoder was not stored" in said) == (sizes.get("iterations") == 0)
    if sizes.get("max_contexts") == 1:
        assert cells(said, "Contexts a decoder must keep", "Context window") == ["1"]


def test_optional_entries_may_be_missing() -> None:
    metrics = sample_metrics()
    for section, keys in {
        "data": ("test_tokens", "val_documents", "test_documents", "vocab_size"),
        "pretrain": ("reused", "stopped_by", "singular_values"),
        "result": ("test_accuracy",),
    }.items():
        for key in keys:
            del metrics[section][key]
    del metrics["machine"], metrics["attention"]
    del metrics["contexts"]["bytes"]["as_tokens"], metrics["contexts"]["bytes"]["as_table"]
    metrics["memory"] = []
    said = render(metrics, {})
    assert "## Memory" not in said
    assert cells(said, "validation", "Text") == ["–", "22,800"]


@pytest.mark.parametrize("count", [0, 1, 2, 19, 20, 21, 60, 1000])
def test_long_tables_keep_their_ends_and_the_best(count: int) -> None:
    keep = 2 * count // 3
    rows = thinned(range(count), keep=keep)
    assert len(rows) <= 22
    assert rows == sorted(set(rows))
    assert count == 0 or {0, keep, count - 1} <= set(rows)
    assert count > 20 or rows == list(range(count))


@pytest.mark.parametrize(("chosen", "total"), [("table", "313.16"), ("tokens", "663.69")])
def test_embeddings_count_even_where_only_their_two_sizes_are_given(chosen: str, total: str) -> None:
    metrics = sample_metrics()
    metrics["config"]["embeddings"] = chosen
    del metrics["contexts"]["bytes"]["table"]
    assert cells(render(metrics, {}), "total", "Cache") == [total]


def test_pipes_and_newlines_cannot_break_a_table() -> None:
    metrics = sample_metrics()
    metrics["config"]["data"]["files"] = ["a|b\nc"]
    assert "| `data.files` " in render(metrics, {})
    assert table(("A",), [["x|y\nz"]]) == "| A      |\n| ------ |\n| x\\|y z |"


def test_a_missing_entry_is_one_sentence(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    metrics = sample_metrics()
    del metrics["footing"]
    run.write_metrics(metrics)
    with pytest.raises(UserError, match="lacks the entry 'footing'"):
        write_report(run)
    assert not run.report.exists()
    with pytest.raises(UserError, match=r"has no metrics\.json"):
        write_report(RunFolder(tmp_path / "none"))


def test_figures_that_cannot_be_written_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> list[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunFolder(tmp_path)
    run.write_metrics(sample_metrics())
    monkeypatch.setattr(page, "draw_all", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(run)


def printed(metrics: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(metrics))
    return out.getvalue()


def test_the_terminal_table_fits_80_columns() -> None:
    said = printed(sample_metrics())
    assert max(map(len, said.splitlines())) <= 80
    for number in ("122,794", "45,163,264 (6,301,440 trained)", "5 of 8", "361.0", "16.2 %", "372.6", "97.9 s"):
        assert number in said
    assert "reused" not in said


def test_the_terminal_table_says_when_phase_1_was_reused() -> None:
    metrics = sample_metrics(iterations=0)
    metrics["result"]["test_ppl"] = None
    assert "(reused)" in printed(metrics)


def test_the_recorded_run_still_has_the_recorded_report() -> None:
    recorded = ROOT / "docs" / "default-run"
    figures = {path.stem: f"figures/{path.name}" for path in (recorded / "figures").iterdir()}
    said = render(json.loads((recorded / "metrics.json").read_text(encoding="utf-8")), figures)
    assert said == (recorded / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({}, "However long the text, a decoder keeps at most 635,904 bytes (636 KB) in fp32."),
        ({"selection": "grid"}, "However long the text, a decoder keeps at most 32,768 bytes (32.8 KB) in fp32."),
        ({"model": "cascade"}, "However long the text, a decoder keeps at most 2,048 bytes (2.05 KB) in fp32."),
        ({"model": "recurrence"}, "However long the text, a decoder keeps at most 1,024 bytes (1.02 KB) in fp32."),
        ({"model": "sliding_window"}, "However long the text, a decoder keeps at most 632,832 bytes (633 KB) in fp32."),
        (
            {"model": "transformer"},
            "What a decoder keeps grows with the text: 6,144 KB in fp32 after 1,000 tokens, 61,440 KB after 10,000 and "
            "614,400 KB after 100,000. PPL is measured as it was trained, with the last 1,110 tokens in reach, or "
            "somewhat more.",
        ),
        (  # 620,001 contexts fill up long after the last count
            {"interval": 20_000},
            "After 100,000 tokens a decoder keeps 102,400,000 bytes (102,400 KB) in fp32, and its window of 620,001 "
            "tokens is not yet full.",
        ),
        (
            {"interval": 1_000},
            "However long the text, a decoder keeps at most 31,745,024 bytes (31,745 KB) in fp32.",
        ),
    ],
)
def test_what_a_decoder_keeps_is_true_of_each_model(choice: dict[str, Any], said: str) -> None:
    assert summary(model_metrics(**choice)).endswith(said)


@pytest.mark.parametrize(
    ("choice", "section", "first", "rest"),
    [
        ({}, "What a decoder keeps", "`contexts`", ["1 × 620 × 256"]),
        ({}, "What a decoder keeps", "10,000", ["635,904", "0.61", "58.59"]),
        ({}, "Context window", "Selection", ["strided: every I-th back from the current one"]),
        ({"selection": "grid"}, "Context window", "Selection", ["grid: the current one and multiples of I"]),
        ({"selection": "grid"}, "What a decoder keeps", "100,000", ["32,768", "0.03", "585.94"]),
        ({"interval": [1, 20, 80, 5] * 2}, "Context window", "Interval I, by head", ["1, 20, 80, 5, 1, 20, 80, 5"]),
        ({"model": "transformer"}, "What a decoder keeps", "`kv`", ["1 × 8 × 1,000 × 192"]),
        ({"model": "transformer"}, "What a decoder keeps", "10,000", ["61,440,000", "58.59"]),
        ({"model": "sliding_window"}, "Token window", "Tokens read at a position, its own included", ["103"]),
        ({"model": "cascade"}, "Phase 1", "Iterations", ["18", "9"]),
        ({"model": "cascade"}, "Phase 1", "Effective rank", ["82.2 %", "80.0 %"]),
    ],
)
def test_sections_fit_the_model(choice: dict[str, Any], section: str, first: str, rest: list[str]) -> None:
    assert cells(render(model_metrics(**choice), {}), first, section) == rest


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ("transformer", ["Phase 1", "Cache", "Context window", "Token window"]),
        ("sliding_window", ["Phase 1", "Cache", "Context window"]),
        ("recurrence", ["Context window", "Token window"]),
        ("cascade", ["Context window", "Token window"]),
        ("context_kv", ["Token window"]),
    ],
)
def test_sections_that_say_nothing_of_the_model_are_left_out(model: str, absent: list[str]) -> None:
    titles = re.findall(r"^## (.+)$", render(model_metrics(model), {}), re.MULTILINE)
    optional = {"Phase 1", "Cache", "Context window", "Token window"}
    assert optional - set(titles) == set(absent)
    assert "What a decoder keeps" in titles


def test_the_terminal_table_leaves_out_a_phase_that_was_not() -> None:
    assert "Phase 1" not in printed(model_metrics("transformer"))
    said = printed(model_metrics("cascade"))
    assert "82.2 %, 80.0 %" in said
    assert said.count("converged") == 2
    assert max(map(len, said.splitlines())) <= 80


def test_full_attention_is_counted_at_the_same_depth() -> None:
    metrics = model_metrics()
    for layers, full in ((1, "58.59"), (4, "234.38")):
        metrics["config"]["model"]["layers"] = layers
        text = "\n".join(decoder_section(metrics))
        assert cells(text, "10,000", "What a decoder keeps")[-1] == full
