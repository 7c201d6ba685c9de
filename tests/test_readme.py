"""README's commands compose, its files exist, its table is the one that the recorded run printed."""

import argparse
import io
import json
import re
import shlex
import statistics

import pytest
from rich.console import Console

from benchmarks import findings, findings_runs, findings_sentences, recipe_runs, recipe_sentences
from ctxkv_lightning.__main__ import generate
from ctxkv_lightning.config import check_key
from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.report.page import summary_table
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
DEFAULT_RUN = ROOT / "docs" / "default-run" / "metrics.json"


def default_run_table() -> str:
    """The summary table of the recorded default run, as a terminal of 80 columns shows it."""
    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(summary_table(json.loads(DEFAULT_RUN.read_text())))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).strip()


def test_the_table_is_the_recorded_run():
    shown = re.search(r"<!-- default run -->\n```\n(.*?)\n```\n<!-- /default run -->", README, re.DOTALL)
    assert shown
    assert shown.group(1).strip() == default_run_table()


@pytest.mark.parametrize("command", re.findall(r"^python train\.py (?!resume)(.*)$", README, re.MULTILINE))
def test_every_command_composes(command):
    check_command_line(shlex.split(command))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (train|test|setup|lint|bench|clean)\b", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_key_in_the_table_exists_with_its_default():
    (config,) = check_command_line([])
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 6
    for key, default in rows:
        check_key(key)
        assert str(getattr(config, key)) == default


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


def test_every_source_file_that_is_named_exists():
    for name in ("config.py", "pipeline.py", "store.py", "errors.py", "datamodule.py"):
        assert name in README
        assert (ROOT / "ctxkv_lightning" / name).exists()


def test_every_promise_names_tests_that_exist():
    promises = README.split("## What you can rely on")[1].split("From Python:")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "Promise" not in line]
    assert len(rows) >= 9
    for row in rows:
        paths = re.findall(r"\[(tests/[^]]+)\]\(([^)]+)\)", row)
        assert paths, row
        for name, path in paths:
            assert name == path
            files = [ROOT / path] if path.endswith(".py") else list((ROOT / path).glob("test_*.py"))
            assert any(re.search(r"^def test_", file.read_text(), re.MULTILINE) for file in files), path


def test_the_decoding_table_is_the_one_that_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "generate.json").read_text())["result"]
    shown = re.search(r"<!-- decoding -->\n(.*?)\n<!-- /decoding -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[1].splitlines()[2:]]
    expected = [
        [
            name,
            f"{int(tokens):,}",
            f"{of['milliseconds_per_token']:.2f}",
            f"{of['state_bytes'] / 1000:,.1f}",
            f"{of['peak_anonymous_bytes'] / 1e6:,.0f}",
            f"{of['first_token_seconds']:.2f}",
        ]
        for name, lengths in measured["systems"].items()
        for tokens, of in lengths.items()
    ]
    assert rows == expected
    assert f"{measured['against_recomputing']['ratio']:.1f} × faster" in README
    assert f"{measured['prompt']['ratio']:.0f} × sooner" in README


def test_what_taught_contexts_are_worth_is_what_was_measured():
    runs = findings_runs.published(findings.kept_runs(ROOT / "docs" / "results" / "runs"))
    test = {row.name: statistics.mean(row.test) for row in findings_runs.rows_of(runs, 100)}
    ours = test[findings_runs.OURS + findings_runs.LEARNT + findings_runs.DIRECT]
    shown = re.search(r"<!-- taught -->(.*?)<!-- /taught -->", README, re.DOTALL)
    assert shown
    ratios = [f"{ours / test[name]:.3f}" for name in (findings_runs.OURS, "sliding_window", "transformer")]
    assert re.findall(r"0\.\d{3}", shown.group(1)) == ratios
    assert test["recurrence" + findings_runs.LEARNT] < test["sliding_window"]
    told = re.search(r"<!-- told -->(.*?)<!-- /told -->", README, re.DOTALL)
    assert told
    rows = {row.name: row for row in findings_runs.rows_of(runs, 100)}
    own, others = (
        rows[findings_runs.OURS + findings_runs.TOLD],
        [rows[name + findings_runs.TOLD] for name in findings_runs.TOKENS],
    )
    assert [len(row.runs) for row in others] == [3, 3]
    assert re.findall(r"0\.\d{3}", told.group(1)) == [f"{ours / statistics.mean(row.test):.3f}" for row in others]
    assert not any(findings_sentences.apart(own.test, row.test) for row in others)


def test_what_a_sliding_window_does_better_is_what_was_measured():
    runs = findings_runs.published(findings.kept_runs(ROOT / "docs" / "results" / "runs"))
    ratios = []
    for samples in (100, 500):
        test = {row.name: statistics.mean(row.test) for row in findings_runs.rows_of(runs, samples)}
        ratios.append(f"{test['sliding_window'] / test[findings_runs.OURS]:.3f} ×")
    shown = re.search(r"<!-- window -->(.*?)<!-- /window -->", README, re.DOTALL)
    assert shown
    assert shown[1] == f"{ratios[0]} the test PPL at 100 samples, {ratios[1]} at 500"


def test_what_a_single_context_is_worth_is_what_was_measured():
    runs = findings_runs.published(findings.kept_runs(ROOT / "docs" / "results" / "runs"))
    ratios = []
    for samples in (100, 500):
        rows = {row.name: row for row in findings_runs.rows_of(runs, samples)}
        ours, single, grid = rows[findings_runs.OURS], rows["recurrence"], rows[findings_runs.GRID]
        ratios.append(f"{statistics.mean(single.test) / statistics.mean(ours.test):.3f} ×")
        assert statistics.mean(grid.val) < 1.06 * statistics.mean(ours.val)
    shown = re.search(r"<!-- single -->(.*?)<!-- /single -->", README, re.DOTALL)
    assert shown
    assert shown[1] == " and ".join(ratios)


def test_that_the_recipe_ties_with_a_sliding_window_is_what_was_measured():
    found = recipe_runs.groups(findings.kept_runs(ROOT / "docs" / "results" / "runs"))
    ratios = []
    for samples in (100, 500):
        sized = recipe_sentences.sized(samples)
        rival = recipe_runs.RIVALS["sliding_window, most for its pointer"]
        own, others = recipe_sentences.of_the_same_seeds(
            recipe_runs.of(found, **sized), recipe_runs.of(found, **sized, **rival)
        )
        ratios.append(f"{recipe_runs.mean(own, 'test_ppl') / recipe_runs.mean(others, 'test_ppl'):.3f} ×")
        assert len(own) == 1 or recipe_runs.told_apart(own, others)
    shown = re.search(r"<!-- tie -->(.*?)<!-- /tie -->", README, re.DOTALL)
    assert shown
    assert shown[1] == f"{ratios[0]} with 100 samples and {ratios[1]} with 500"


def test_what_is_said_of_repetition_was_measured_at_the_defaults():
    default = json.loads((ROOT / "benchmarks" / "results" / "repetition.json").read_text())["result"]["runs"][0]
    assert (default["layers"], default["samples"]) == (1, 100)
    again = {(row["temperature"], row["presence_penalty"]): row["again"] for row in default["settings"]}
    parser = argparse.ArgumentParser()
    generate(parser)
    options = parser.parse_args(["RUN", "--prompt", "a"])
    assert (options.temperature, options.presence_penalty) == (0.6, 3)
    words = f"at 0.6, {again[0.6, 0]:.0%} of what the default model writes is the token before once more, of its text "
    assert words.replace("%", " %") + f"{default['text']['again']:.0%}".replace("%", " %") in README
    assert f"brings that to {again[0.6, 3]:.0%}".replace("%", " %") in README


def test_the_table_of_speed_is_the_one_that_was_measured():
    shown = re.search(r"<!-- speed -->\n(.*?)\n<!-- /speed -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[1].splitlines()[2:]]
    assert [row[:-1] for row in rows] == speed_rows()


def speed_rows() -> list[list[str]]:
    """What was asked for and what was measured, claim by claim."""
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    of = {file.stem: json.loads(file.read_text())["result"] for file in files}
    fp32, bf16, kept = (
        of["attention"][name]["ratio"]["median"] for name in ("fp32", "bf16", "fp32, freed memory kept")
    )
    pointer, bias = (of["pointer"][name]["ratio"]["median"] for name in ("pointer", "bias"))
    small, large = (of["phase2"]["speed"][V] for V in ("8192", "50257"))
    gpu, longest = of["gpu"], of["scale"]["largest_to_smallest"]
    eager, compiled = (gpu["phase2"][mode]["tokens_per_second"] / 1e6 for mode in ("eager", "compiled"))
    whole, decoding = gpu["experiment"]["seconds"], gpu["decoding"]["contexts"]
    quality = of["time_to_quality"]
    reached = quality["ours"]["best_val_ppl"]
    stopped = quality["published"]["seconds_to_target"] / quality["ours"]["seconds_to_target"]
    rounding = abs(of["precision"]["percent_at_best"]["bf16-mixed"])
    return [
        [
            "folded attention, forward and backward, against gathering, fp32 (with a run's allocator; bf16)",
            "15 ×",
            f"{fp32:.1f} × ({kept:.1f} ×; {bf16:.1f} ×)",
        ],
        [
            "the recipe's pointer against its plain formula (the gradient of its bias against one sum)",
            "",
            f"{pointer:.1f} × ({bias:.1f} ×)",
        ],
        [
            "Phase 2 in bf16 against the published method in its fp32, V=8,192",
            "4.4 ×",
            f"{small['ratio']['median']:.1f} ×",
        ],
        [
            "Phase 2 in bf16 against the published method in its fp32, V=50,257",
            "4.4 ×",
            f"{large['ratio']['median']:.1f} ×",
        ],
        [
            "Phase 2 against its own matrix products alone, V=8,192 (50,257)",
            "75 %",
            f"{small['percent_of_chain']['median']:.0f} % ({large['percent_of_chain']['median']:.0f} %)",
        ],
        ["exact contexts against the loop, 122,794 tokens", "15 ×", f"{of['contexts']['ratio']['median']:.0f} ×"],
        [
            "time to the published method's best validation PPL, whole pipeline: by the recipe, encoder "
            "not taught, whose counts are below it by themselves",
            "8 ×",
            f"{quality['recipe']['ratio']:.1f} ×",
        ],
        [
            "the same by the published model: PPL where its patience ended, and how much sooner that was",
            f"{quality['target_val_ppl']:.1f}",
            f"{reached:.1f}{'' if quality['ours']['reached'] else ', not reached'} ({stopped:.1f} ×)",
        ],
        ["time per token at 10 M tokens against 0.1 M, Phase 2", "1.15 ×", f"{longest['train']:.2f} ×"],
        ["peak memory of Phase 2, V=50,257", "1.5 GB", f"{of['phase2']['memory']['beyond_gb']:.1f} GB"],
        ["validation PPL in bf16 against fp32, one epoch and one seed", "1 %", f"{rounding:.2f} %"],
        [
            "Phase 2 on one H200, V=50,257, tokens/s, compiled (eager)",
            "2.3 M",
            f"{compiled:.2f} M ({eager:.2f} M)",
        ],
        [
            "an experiment of the published size, of synthetic tokens that need no tokenizer, on one H200",
            "10 s",
            f"{whole['total']:.1f} s",
        ],
        ["of that, Phase 2 with its checkpoints", "", f"{whole['train']:.1f} s"],
        [
            "a step of decoding on one H200, as a graph against launching it anew",
            "",
            f"{decoding['graph']:.2f} ms, {decoding['ratio']:.1f} ×",
        ],
    ]
