"""The published method is the same function as ours, and every benchmark runs at tiny sizes."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from benchmarks import (
    allocator,
    attention,
    compile,
    contexts,
    gpu,
    harness,
    phase2,
    pointer,
    precision,
    published,
    scale,
    time_to_quality,
    workload,
)
from benchmarks.published import PublishedLM, Split, published_contexts
from benchmarks.workload import QUICK
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.lm.attention import strided_attention
from ctxkv_lightning.lm.head import frozen_cross_entropy
from ctxkv_lightning.windows import WindowLoader
from tests.conftest import ROOT
from tests.oracles import contexts_step_by_step, gather_attention


@pytest.fixture
def twins():
    """Our model and the published one with the same weights, and a stream for both."""
    table = workload.random_table(50, QUICK.D)
    stream = workload.random_stream(150, table, QUICK.C)
    ours = workload.our_model(table, QUICK).eval()
    theirs = PublishedLM(table, QUICK.C, QUICK.heads, QUICK.interval, QUICK.max_contexts, QUICK.ffn).eval()
    return ours, theirs.copy_from(ours), stream


def test_the_published_model_has_our_hidden_states(twins):
    ours, theirs, stream = twins
    positions = torch.randperm(150)
    expected = ours(stream.embeddings[stream.rows][None], stream.contexts[0][None])[0]
    hidden = theirs.hidden(Split.of(stream), positions)
    torch.testing.assert_close(hidden, expected[positions], atol=1e-5, rtol=1e-5)


def test_the_published_model_has_our_loss_and_gradients_over_a_pass(twins):
    ours, theirs, stream = twins
    losses = []
    for batch in WindowLoader(stream, QUICK.history, QUICK.step, seed=1):
        hidden = workload.hidden_of(ours, batch)
        losses.append(frozen_cross_entropy(hidden, ours.embedding.weight, batch.targets))
    loss = torch.cat(losses).mean()
    split, positions = Split.of(stream), torch.randperm(149)
    their_loss = F.cross_entropy(theirs(split, positions), split.tokens[positions + 1])
    torch.testing.assert_close(their_loss, loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    their_loss.backward()
    gradients = dict(ours.named_parameters())
    trained = [(name, p.grad) for name, p in theirs.named_parameters() if p.requires_grad]
    assert {name for name, _ in trained} == {name for name, p in gradients.items() if p.requires_grad}
    for name, gradient in trained:
        torch.testing.assert_close(gradient, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_published_evaluation_is_the_perplexity_of_all_positions(twins):
    _, theirs, stream = twins
    split = Split.of(stream)
    logits = theirs(split, torch.arange(149)).detach()
    perplexity, accuracy = published.evaluate(theirs, split, batch=40)
    assert perplexity == pytest.approx(float(F.cross_entropy(logits, split.tokens[1:]).exp()), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == split.tokens[1:]).float().mean()))


def test_sweeps_approach_the_exact_contexts():
    encoder, table = ContextEncoder(32, 48), F.layer_norm(torch.randn(40, 48), (48,))
    embeddings = table[torch.randint(40, (300,))]
    exact = contexts_step_by_step(encoder, embeddings).detach()
    errors = [float((published_contexts(encoder, embeddings, n, batch=64) - exact).abs().max()) for n in (3, 300)]
    assert errors[0] > 1e-2
    assert errors[1] < 1e-5


def test_as_many_sweeps_as_positions_are_exact_whatever_the_encoder():
    encoder, embeddings = ContextEncoder(8, 16), torch.randn(20, 16)
    exact = contexts_step_by_step(encoder, embeddings).detach()
    torch.testing.assert_close(published_contexts(encoder, embeddings, 20, batch=7), exact, atol=1e-6, rtol=1e-5)


def test_published_training_lowers_the_loss_and_obeys_its_limits(twins):
    _, theirs, stream = twins
    split = Split.of(stream)
    epochs = list(published.train_published(theirs, split, split, batch=40, max_epochs=4, patience=9))
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["train_ppl"] < epochs[0]["train_ppl"]
    assert len(list(published.train_published(theirs, split, split, batch=40, max_epochs=4, budget=0))) == 1


def test_gathered_attention_is_the_oracle_and_the_fold():
    inputs = [torch.randn(2, 3, 50, 8) for _ in range(3)]
    gathered = attention.gathered_attention(*inputs, 4, 5)
    torch.testing.assert_close(gathered, gather_attention(*inputs, 4, 5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gathered, strided_attention(*inputs, 4, 5), atol=1e-5, rtol=1e-5)


def test_the_step_by_step_loop_is_the_oracle():
    encoder, table, ids = ContextEncoder(8, 16), torch.randn(20, 16), torch.randint(20, (60,))
    oracle = contexts_step_by_step(encoder, table[ids]).detach()
    torch.testing.assert_close(contexts.step_by_step(encoder, table, ids), oracle, atol=1e-6, rtol=1e-5)


def test_pairs_interleave_and_divide_pair_by_pair():
    calls = []
    timed = harness.pairs(lambda: (calls.append("a"), time.sleep(0.02)), lambda: calls.append("b"), 3, warmup=1)
    assert calls == list("abababab")
    assert len(timed["baseline"]["seconds"]) == len(timed["ours"]["seconds"]) == 3
    assert timed["baseline"]["median"] >= 0.02
    assert timed["ratio"]["min"] <= timed["ratio"]["median"] <= timed["ratio"]["max"]


def test_results_name_machine_versions_and_command_but_no_folder(tmp_path):
    for written in (["--quick", "--output", str(tmp_path)], ["--quick", f"--output={tmp_path}"]):
        options = harness.parse(harness.parser("Text."), written)
        harness.save("nothing", {"x": 1}, [["x"], ["1"]], options)
        record = json.loads((tmp_path / "nothing.json").read_text())
        assert record["command"] == "python -m benchmarks.nothing --quick"
        assert record["result"] == {"x": 1}
        assert {"cpu", "cores", "threads", "gpu", "cpu_bf16"} <= set(record["machine"])
        assert "torch" in record["versions"]
        assert str(tmp_path) not in json.dumps(record)
    assert [file.name for file in tmp_path.iterdir()] == ["nothing.json"]


def test_quick_runs_write_only_where_they_are_told():
    assert harness.parse(harness.parser("Text."), ["--quick"]).output is None
    assert harness.parse(harness.parser("Text."), []).output == harness.RESULTS


def sampled_peak():
    """Bytes that `AnonymousPeak` sees of 40 MB which are there for a moment."""
    with harness.AnonymousPeak(interval=0.001) as peak:
        block = torch.ones(10_000_000)
        time.sleep(0.05)
        del block
    return peak.bytes


def test_a_pointer_is_compared_with_the_same_results():
    result = pointer.main(["--quick"])
    assert result["pointer"]["max_difference"] < 1e-5
    assert result["bias"]["max_difference"] < 1e-4


def test_a_sampled_peak_sees_memory_that_is_gone_again():
    assert 39e6 < harness.in_fresh_process(sampled_peak) < 80e6


def test_the_chain_has_the_products_of_a_training_step():
    assert workload.product_chain(100, QUICK, torch.device("cpu"))() == QUICK.step


@pytest.mark.parametrize("script", [attention, contexts, pointer], ids=lambda module: module.__name__)
def test_it_runs(script, tmp_path):
    check_script(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [allocator, compile, phase2, scale, precision, time_to_quality, published],
    ids=lambda module: module.__name__,
)
def test_it_runs_too(script, tmp_path):
    check_script(script, tmp_path)


def check_script(script, folder):
    """Runs a script at tiny sizes and compares what it returns with what it wrote."""
    result = script.main(["--quick", "--output", str(folder)])
    (file,) = folder.glob("*.json")
    record = json.loads(file.read_text())
    assert file.stem == record["benchmark"] == script.__name__.removeprefix("benchmarks.")
    assert record["result"] == json.loads(json.dumps(result))


@pytest.mark.slow
def test_time_to_quality_compares_with_what_the_published_run_reached(tmp_path):
    result = time_to_quality.main(["--quick", "--budget", "0"])
    assert result["published"]["stopped_by"] == "budget"
    assert len(result["published"]["epochs"]) == 1
    assert "budget" in result["target_is"]
    for method in ("ours", "recipe"):
        assert (result[method]["ratio"] is None) != result[method]["reached"]
        assert result[method]["seconds_to_target"] > sum(result[method]["prepare_seconds"].values()) > 0
    assert result["recipe"]["prepare_seconds"] != result["ours"]["prepare_seconds"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_set_without_a_gpu_is_one_sentence_and_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--quick"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_the_gpu_set_runs_on_a_cpu_at_tiny_sizes():
    result = gpu.measure(True, torch.device("cpu"))
    assert result["experiment"]["epochs"] == 2
    assert "report" in result["experiment"]["seconds"]
    assert len({len(row) for row in gpu.rows(result)}) == 1


@pytest.mark.slow
def test_a_script_is_a_module_that_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.attention", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "attention.json").is_file()
