"""The whole experiment, small: what it leaves behind, what it reuses, how it fails."""

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctxkv_lightning import build, phase_one, pipeline
from ctxkv_lightning.config import (
    Config,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.use import open_trained
from tests.conftest import ROOT, SHARED_DATA

SMALL = Config(
    interval=5,
    heads=2,
    max_contexts=4,
    context_dim=16,
    samples=8,
    tokenizer=TokenizerConfig(vocab_size=400),
    embedding=EmbeddingConfig(dim=32),
    pretrain=PretrainConfig(max_iterations=4),
    model=ModelConfig(ffn_dim=64),
    train=TrainConfig(batch_tokens=2000, max_epochs=2),
    data=DataConfig(heldout_bytes=8_000),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run's folder, and the configuration that made it."""
    root = tmp_path_factory.mktemp("run")
    config = replace(SMALL, cache_dir=str(root / "cache"))
    pipeline.run_experiment(config, root / "one")
    return root / "one", config


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_leaves_the_files_of_the_contract(finished):
    folder, _ = finished
    for name in (
        "config.yaml", "metrics.json", "report.md", "train.log", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "pretrain/metrics.csv", "train/metrics.csv", "figures/pretrain.png", "figures/spectrum.png",
        "figures/perplexity.png", "figures/attention.png",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name


def test_metrics_have_the_keys_that_other_programs_read(finished):
    metrics = read_metrics(finished[0])
    expected = {
        "data": {"train_tokens", "val_tokens", "train_documents", "sha256"},
        "parameters": {"total", "trainable", "embedding", "embedding_norm", "encoder", "attention", "ffn"},
        "window": {"interval", "max_contexts", "span_tokens", "theoretical_max"},
        "pretrain": {"iterations", "convergence_rate", "effective_rank", "seconds", "history"},
        "contexts": {"seconds", "seam_error", "bytes"},
        "train": {"epochs", "best_epoch", "stopped_early"},
        "result": {"val_ppl", "val_accuracy", "test_ppl", "train_val_gap"},
        "footing": {"unigram_ppl", "kneser_ney_ppl", "kneser_ney_cache_ppl"},
        "seconds": {"total", "pretrain", "contexts", "train"},
        "versions": {"python", "torch", "lightning"},
        "config": {"interval", "samples", "data", "train"},
    }
    for section, names in expected.items():
        assert names <= set(metrics[section]), section
    assert {"epoch", "train_ppl", "val_ppl", "val_accuracy", "seconds", "tokens_per_second"} <= set(
        metrics["train"]["epochs"][0]
    )
    assert {"stage", "cpu_gb", "gpu_gb"} == set(metrics["memory"][0])
    assert metrics["window"]["span_tokens"] == 3 * 5 + 1
    assert metrics["window"]["theoretical_max"] == metrics["data"]["train_tokens"] // 5 + 1
    assert metrics["contexts"]["seam_error"] <= 1e-5
    assert metrics["config"]["samples"] == metrics["data"]["train_documents"] == 8


def test_epochs_after_the_best_one_are_kept(finished, tmp_path):
    """Nothing is learnt, so the first epoch stays the best; its checkpoint is reloaded, with what was known then."""
    config = replace(SMALL, cache_dir=finished[1].cache_dir, train=TrainConfig(lr=1e-30, max_epochs=3))
    pipeline.run_experiment(config, tmp_path / "run")
    trained = read_metrics(tmp_path / "run")["train"]
    assert trained["best_epoch"] == 1
    assert [row["epoch"] for row in trained["epochs"]] == [1, 2, 3]


def test_the_result_is_that_of_the_best_checkpoint(finished):
    folder, _ = finished
    metrics = read_metrics(folder)
    best = min(metrics["train"]["epochs"], key=lambda row: row["val_ppl"])
    assert metrics["train"]["best_epoch"] == best["epoch"]
    assert metrics["result"]["val_ppl"] == pytest.approx(best["val_ppl"], rel=1e-6)
    assert metrics["result"]["train_val_gap"] == pytest.approx(best["val_ppl"] - best["train_ppl"], rel=1e-6)
    assert math.isfinite(metrics["result"]["test_ppl"])


def test_attention_weights_sum_to_one(finished):
    weights = torch.tensor(read_metrics(finished[0])["attention"]["slot_weights"])
    assert weights.shape == (2, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_metrics_csv_has_a_row_of_each_epoch(finished):
    with (finished[0] / "train" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/ppl"]]
    assert len(rows) == 2


def test_checkpoints_hold_no_pickled_objects(finished):
    for name in ("best", "last"):
        module = ContextKVLMModule.load_from_checkpoint(finished[0] / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert all(p.isfinite().all() for p in module.parameters())


def test_the_same_run_again_reuses_every_store_and_gives_the_same_numbers(finished, tmp_path, monkeypatch):
    folder, config = finished
    monkeypatch.setattr(phase_one, "OACDPretrainModule", lambda *_, **__: pytest.fail("Phase 1 ran again"))
    monkeypatch.setattr(build, "read_pydocs", lambda: pytest.fail("the documentation was parsed again"))
    monkeypatch.setattr(build.tokenizer, "learn_bpe", lambda *_: pytest.fail("the tokenizer was learnt again"))
    monkeypatch.setattr(
        "ctxkv_lightning.datamodule.solve_contexts", lambda *_: pytest.fail("contexts were solved again")
    )
    pipeline.run_experiment(config, tmp_path / "two")
    first, second = read_metrics(folder), read_metrics(tmp_path / "two")
    assert second["pretrain"]["reused"]
    assert second["contexts"]["reused"]
    assert not first["contexts"]["reused"]
    assert second["result"] == first["result"]
    same = [[row["train_ppl"] for row in metrics["train"]["epochs"]] for metrics in (first, second)]
    assert same[0] == same[1]


def test_a_cache_that_has_all_but_the_documents_and_cannot_be_written_will_do(monkeypatch):
    def unwritable(root, kind, key, build):
        assert kind == "pydocs"
        raise UserError("the cache folder cannot be written")

    monkeypatch.setattr(build, "get_or_build", unwritable)
    assert build.build_pydocs(SMALL) == build.read_pydocs()


def test_a_run_that_differs_in_the_window_reuses_phase_one_and_contexts(finished, tmp_path):
    _, config = finished
    pipeline.run_experiment(replace(config, interval=7, max_contexts=2, heads=4, embeddings="tokens"), tmp_path / "two")
    metrics = read_metrics(tmp_path / "two")
    assert metrics["pretrain"]["reused"]
    assert metrics["contexts"]["reused"]


def test_held_out_tokens_do_not_depend_on_samples(finished):
    _, config = finished
    few, more = (pipeline.prepare_text(replace(config, samples=n)).tokens for n in (3, 9))
    for split in ("validation", "test"):
        assert few.array(split).tolist() == more.array(split).tolist()
    shared = few.array("train")
    assert more.array("train")[: len(shared)].tolist() == shared.tolist()


def text_config(root, *files, **options):
    config = replace(SMALL, cache_dir=str(root / "cache"), samples=None)
    return replace(config, data=DataConfig(source="text", files=[str(root / name) for name in files], **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "nothing.txt"),
        (b"", "bad.txt"),
        (b"a", "."),
        (b"some text \xff and more " * 50, r"data\.errors"),
    ],
)
def test_bad_text_is_one_sentence_and_leaves_no_folder(tmp_path, content, message):
    name = "nothing.txt" if content is None else "bad.txt"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        pipeline.run_experiment(text_config(tmp_path, name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("max_contexts", {}),
        ("max_contexts", {"name": "sliding_window"}),
        ("model.window_tokens", {"name": "sliding_window", "window_tokens": 100_000}),
        ("model.local_window", {"layers": 2, "local_window": 100_000}),
    ],
)
def test_more_than_there_is_to_read_is_refused(tmp_path, key, model):
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), model=replace(SMALL.model, **model))
    config = replace(config, max_contexts=100_000 if key == "max_contexts" else SMALL.max_contexts)
    with pytest.raises(UserError, match=rf"{key}=100000 must be at most the [\d,]+ training tokens"):
        pipeline.run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_more_history_is_read_than_there_is_text(tmp_path):
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), interval=30, max_contexts=1_000)
    text = pipeline.prepare_text(config)
    tokens = len(text.tokens.array("train"))
    assert tokens < 999 * 30
    table = pipeline.build_embedding(config, text)
    assert pipeline.build_data(config, text, table).hparams["history"] == tokens
    grid = pipeline.build_data(replace(config, selection="grid"), text, table).hparams["history"]
    assert grid % 30 == 0
    assert tokens <= grid < tokens + 30


def test_too_many_samples_are_refused_with_the_count(tmp_path):
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), samples=100_000)
    with pytest.raises(UserError, match=r"samples=100000.* \d+ training documents"):
        pipeline.run_experiment(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            TrainerConfig(strategy="foo"),
            r"trainer.strategy=foo cannot be had here \(.*invalid strategy name.*\): change",
        ),
        *(
            (
                TrainerConfig(accelerator="cpu", devices=2, strategy=f"ddp_{how}"),
                rf"trainer.strategy=ddp_{how} trains in processes that take what they have trained with them",
            )
            for how in ("spawn", "fork")
        ),
        (TrainerConfig(accelerator="cpu", strategy="fsdp"), r"trainer.strategy=fsdp cannot .*requires a GPU"),
        (TrainerConfig(accelerator="mps"), r"trainer.accelerator=mps .* cannot be had here \(.*not available\)"),
        (TrainerConfig(accelerator="gpu", devices=99), r"trainer.accelerator=gpu trainer.devices=99 .* cannot be had"),
    ],
)
def test_hardware_that_is_not_there_is_one_sentence_and_leaves_no_folder(tmp_path, trainer, message):
    if trainer.accelerator == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match=message) as error:
        pipeline.run_experiment(replace(SMALL, cache_dir=str(tmp_path / "cache"), trainer=trainer), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_of_tokens_that_reads_the_current_context_has_an_encoder_and_keeps_one(tmp_path):
    """What its best checkpoint says of the validation text when it is opened again is what the run has measured."""
    recipe = replace(SMALL.recipe, read_current=True)
    model = replace(SMALL.model, name="sliding_window", window_tokens=5, layers=2)
    trainer = TrainerConfig(accelerator="cpu", precision="32-true")
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), model=model, recipe=recipe, trainer=trainer)
    pipeline.run_experiment(config, tmp_path / "run")
    metrics, trained = read_metrics(tmp_path / "run"), open_trained(tmp_path / "run")
    assert metrics["pretrain"]["iterations"] > 0
    assert metrics["contexts"]["seam_error"] <= config.contexts.tolerance
    assert metrics["decode_state"]["tensors"]["context"] == [1, config.context_dim]
    (tokens,) = (tmp_path / "cache" / "tokens").glob("*/validation.npy")
    losses, _ = score_tokens(trained.model, torch.from_numpy(np.load(tokens)).long())
    assert float(losses.double().mean().exp()) == pytest.approx(metrics["result"]["val_ppl"], rel=1e-4)


@pytest.mark.parametrize("model", ["context_kv", "transformer"])
def test_a_start_that_is_not_there_is_one_sentence_and_leaves_no_folder(tmp_path, model):
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), model=replace(SMALL.model, name=model))
    with pytest.raises(UserError, match=r"init_from=/nope is no start \(there is no checkpoint .*\): name"):
        pipeline.run_experiment(replace(config, init_from="/nope"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_interval_longer_than_the_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A few words, and then some more of them. " * 30)
    with pytest.raises(UserError, match="interval=5000 must be below"):
        pipeline.run_experiment(replace(text_config(tmp_path, "a.txt"), interval=5000), tmp_path / "run")
    plain = text_config(tmp_path, "a.txt")
    build.prepare_text(replace(plain, interval=5000, model=replace(plain.model, name="recurrence")))  # which reads none
    spanned = replace(plain, interval=5000, model=replace(plain.model, name="sliding_window", window_tokens=None))
    with pytest.raises(UserError, match="interval=5000 must be below"):  # as many bytes as contexts would take
        build.prepare_text(spanned)


def test_intervals_of_a_grid_that_never_meet_in_the_text_are_refused(tmp_path):
    """Windows start where all grids do: a common multiple beyond the text would be as much padding."""
    (tmp_path / "a.txt").write_text("A few words, and then some more of them. " * 30)
    config = replace(text_config(tmp_path, "a.txt"), selection="grid", heads=2, interval=[97, 89])
    with pytest.raises(UserError, match=r"repeats every 8,633 tokens, and there are .* a smaller common multiple"):
        pipeline.run_experiment(config, tmp_path / "run")


def test_a_tiny_text_of_ones_own_runs_through(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of a short text about nothing, {i * i}." for i in range(40)))
    pipeline.run_experiment(text_config(tmp_path, "a.txt"), tmp_path / "run")
    assert math.isfinite(read_metrics(tmp_path / "run")["result"]["val_ppl"])


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the UltraChat sample is not here")
def test_conversations_run_through(tmp_path):
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"))
    data = DataConfig(source="text", files=[str(SHARED_DATA / "ultrachat_sample.jsonl")], heldout_bytes=8_000)
    pipeline.run_experiment(replace(config, data=data), tmp_path / "run")
    assert read_metrics(tmp_path / "run")["data"]["train_documents"] == 8


def test_a_used_folder_is_refused(finished):
    folder, config = finished
    before = read_metrics(folder)
    with pytest.raises(UserError, match="holds a run already"):
        pipeline.run_experiment(config, folder)
    assert read_metrics(folder) == before


def test_a_loss_that_becomes_nan_ends_the_run_without_a_best_checkpoint(finished, tmp_path):
    _, config = finished
    with pytest.raises(UserError, match=r"train\.lr"):
        pipeline.run_experiment(replace(config, train=replace(config.train, lr=1e30)), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("best*"))
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
def test_the_door_runs_and_reports(tmp_path):
    """From another folder, as a user types it; the second line of the same command reuses the first one's work."""
    options = (
        "interval=5 max_contexts=4 heads=2 context_dim=16 samples=8 tokenizer.vocab_size=400 embedding.dim=32 "
        "model.ffn_dim=64 pretrain.max_iterations=3 train.max_epochs=1 data.heldout_bytes=8000"
    ).split()
    command = [sys.executable, str(ROOT / "train.py"), *options]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert "val PPL" in done.stdout
    assert "(reused)" in done.stdout
    assert len(list(tmp_path.glob("outputs/*/*/report.md"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["intervl=50"], "did you mean interval?"),
        (["data=text", "data.files=[missing.txt]"], "missing.txt"),
        (["-m", "samples=100000,200000"], "samples=100000"),
    ],
)
def test_the_door_ends_with_one_sentence_and_leaves_nothing(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoints"))
    assert not list(tmp_path.glob("outputs/2*/*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_model_trains_in_fp32_like_an_eager_one(tmp_path):
    """Batches have two lengths here, after which the compiler would take them for any."""
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of a short text about nothing, {i * i}." for i in range(90)))
    plain = text_config(tmp_path, "a.txt")
    plain = replace(plain, trainer=replace(plain.trainer, precision="32-true"))
    compiled = replace(plain, train=replace(plain.train, compile="on"))
    eager, fast = (
        pipeline.run_experiment(config, tmp_path / name) for name, config in (("eager", plain), ("fast", compiled))
    )
    assert fast == pytest.approx(eager, rel=1e-3)
