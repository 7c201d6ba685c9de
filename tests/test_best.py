"""The recipe from the command line to the written text: runs, resumes bit for bit, exports, writes."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from ctxkv_lightning import ContextKVLM, pipeline
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.config import ModelConfig, RecipeConfig, TrainConfig, load_config
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.door import check_command_line, identity
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.export import export_run
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.sampling import Sampler
from ctxkv_lightning.resume import check_changes
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import read
from ctxkv_lightning.use import _model_of, open_trained
from ctxkv_lightning.write import Writer
from tests.small_run import small_run
from tests.test_resume import BASE, STEPS, Stop, assert_same_run, interrupted, rows, same

RECIPE = RecipeConfig(
    norm="pre",
    train_embedding=True,
    embedding_dropout=0.1,
    context_dropout=0.1,
    output_dropout=0.1,
    projection=True,
    pointer_heads=2,
    pointer_dim=8,
    pointer_window=30,
    pointer_values=True,
    read_current=True,
    ngram=True,
    apart=True,
)
TRAIN = TrainConfig(batch_tokens=3400, max_epochs=3, patience=9, schedule="linear", warmup_steps=4, lr=0.003)
MODELS = ["context_kv", "transformer", "sliding_window", "recurrence"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("best")


def best(root):
    return replace(BASE, cache_dir=str(root / "cache"), recipe=RECIPE, train=TRAIN)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_the_recipe_from_the_command_line(model):
    (config,) = check_command_line(["experiment=best", f"model={model}"])
    assert config.recipe.pointer_heads
    assert config.recipe.train_embedding
    assert "pretrain" not in config.unread  # the pointer reads contexts, whatever the model


def test_the_cascade_takes_no_recipe():
    with pytest.raises(UserError, match="cascade takes no recipe"):
        check_command_line(["experiment=best", "model=cascade"])


def test_what_nothing_reads_makes_no_other_experiment():
    plain, other = (
        check_command_line(["model=transformer", *more])[0] for more in ([], ["recipe.pointer_dim=8", "context_dim=64"])
    )
    assert plain.effective() == other.effective()
    pointed = ["model=transformer", "recipe.pointer_heads=2"]
    a, b = (check_command_line([*pointed, *more])[0] for more in ([], ["recipe.pointer_dim=8"]))
    assert a.effective() != b.effective()


def test_sweeps_begun_before_there_were_recipes_find_their_folders():
    """The hash of the default experiment as it was, and of a recipe before `apart` and `read_current` were in it."""
    assert identity(check_command_line([])[0]) == "8b46a0d288"
    assert identity(check_command_line(["recipe.pointer_heads=2"])[0]) == "a19517bec2"


def test_settings_without_effect_are_refused_or_make_no_other_experiment():
    with pytest.raises(UserError, match="pointer_values has no effect"):
        check_command_line(["recipe.pointer_values=true"])
    plain, other = (
        check_command_line(["model=transformer", *more])[0]
        for more in ([], ["recipe.context_dropout=0.1", "train.warmup_steps=5"])
    )
    assert identity(plain) == identity(other)
    alone, apart, counting, both = (
        identity(check_command_line(more)[0])
        for more in ([], ["recipe.apart=true"], ["recipe.ngram=true"], ["recipe.ngram=true", "recipe.apart=true"])
    )
    assert alone == apart
    assert counting != both


def test_how_long_a_schedule_is_cannot_change_on_the_way(tmp_path):
    run = RunFolder(tmp_path)
    for schedule in ("constant", "linear"):
        began = replace(BASE, train=replace(TRAIN, schedule=schedule))
        run.write_config(yaml.safe_dump(asdict(began)))
        longer = replace(began, train=replace(began.train, max_epochs=9))
        if schedule == "constant":
            check_changes(longer, run)
            continue
        with pytest.raises(UserError, match=r"train\.max_epochs: 3 -> 9"):
            check_changes(longer, run)


@pytest.mark.parametrize("model", MODELS)
def test_a_finished_run_says_what_it_keeps_exports_and_writes(model, tmp_path):
    run = small_run(tmp_path, model, recipe=RECIPE)
    metrics = json.loads((run / "metrics.json").read_text())
    kept = metrics["decode_state"]["tensors"]
    assert kept["followers"] == [1, 30]
    assert metrics["contexts"]["seam_error"] <= 1e-5
    assert metrics["parameters"]["output"] > 0
    assert metrics["ngram"]["bytes"] > 12 * metrics["ngram"]["trigrams"] > 12 * metrics["ngram"]["bigrams"] > 0
    assert f"{metrics['ngram']['trigrams']:,} trigrams of the training text" in (run / "report.md").read_text()
    trained = open_trained(run)
    exported = open_trained(export_run(run, tmp_path / "exported"))
    texts = [Writer(one, Sampler(seed=1), max_tokens=20).text("Zeile 1") for one in (trained, exported)]
    assert texts[0] == texts[1]
    assert texts[0][0]
    check_writing(trained)
    if model == "context_kv":
        check_attention(metrics, trained.model, run)


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[1:])])
def test_the_experiment_itself_runs_to_its_report(model, tmp_path):
    """With all that its file says, but sizes: local layers, a taught encoder and all."""
    small = (
        "samples=8 data.heldout_bytes=8000 tokenizer.vocab_size=400 embedding.dim=32 context_dim=16 model.ffn_dim=64 "
        "interval=[1,1,1,1,2,2,3,4] pretrain.max_iterations=2 pretrain.lm_epochs=1 train.max_epochs=1"
    )
    words = ["experiment=best", f"model={model}", *small.split(), f"cache_dir={tmp_path / 'cache'}"]
    pipeline.run_experiment(check_command_line(words)[0], tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["result"]["test_ppl"] > 1
    assert (tmp_path / "run" / "report.md").exists()


def check_writing(trained):
    """What is written is what a writing decoder gives, which is not pointed at its own words."""
    prompt = "Zeile 1 Zeile 1 Zeile 1"
    ids = trained.encode(prompt)[None]
    decoder, words = Decoder(trained.model, writing=True), []
    logits = decoder.read(ids)
    for _ in range(12):
        words.append(int(logits.argmax()))
        logits = decoder.step(torch.tensor(words[-1:]))
    writer = Writer(trained, Sampler(temperature=0), max_tokens=12)
    assert writer.text(prompt) == [trained.encoding.decode(words)]
    reader = Decoder(trained.model)
    assert not torch.equal(reader.read(ids), Decoder(trained.model, writing=True).read(ids))


def check_attention(metrics, model, run):
    """The report's slot weights are those of the trained embedding, not of the frozen one."""
    data = yaml.safe_load((run / "lightning.yaml").read_text())["data"]
    module = ContextDataModule(**data)
    module.setup("validate")
    windows = next(iter(module.val_dataloader()))
    own = windows.tokens[:, -windows.embeddings.shape[1] :]
    expected = model.slot_weights(model.embed(own), windows.memory, windows.first)
    torch.testing.assert_close(torch.tensor(metrics["attention"]["slot_weights"]), expected, atol=1e-4, rtol=0)


def test_weights_of_another_recipe_are_no_start(tmp_path):
    run = small_run(tmp_path, recipe=RecipeConfig(norm="pre", projection=True))
    config = load_config(RunFolder(run))
    for recipe in (RecipeConfig(), RecipeConfig(norm="pre")):
        with pytest.raises(UserError, match="does not fit this model"):
            pipeline.run_experiment(replace(config, recipe=recipe, init_from=str(run)), tmp_path / recipe.norm)
        assert not (tmp_path / recipe.norm).exists()


def test_weights_of_layers_that_read_something_else_are_no_start(tmp_path):
    """Which have the same names and sizes where a context is as wide as an embedding."""
    sizes = {"context_dim": 32, "train": replace(TRAIN, max_epochs=1)}
    layers = {"layers": 2, "ffn_dim": 64}
    run = small_run(tmp_path, **sizes)
    config = replace(load_config(RunFolder(run)), model=ModelConfig(**layers))
    pipeline.run_experiment(config, tmp_path / "first")
    local = replace(config, init_from=str(tmp_path / "first"), model=ModelConfig(**layers, local_window=4))
    with pytest.raises(UserError, match="read contexts in one, tokens in the other"):
        pipeline.run_experiment(local, tmp_path / "second")


def test_weights_of_other_heads_are_no_start(tmp_path):
    """Which have the same names and sizes."""
    run = small_run(tmp_path)
    config = load_config(RunFolder(run))
    other = replace(config, heads=1 if config.heads > 1 else 2, init_from=str(run))
    with pytest.raises(UserError, match=f"its heads are {config.heads}, not {other.heads}"):
        pipeline.run_experiment(other, tmp_path / "second")


def test_a_checkpoint_from_before_there_were_recipes_and_layers_still_opens(tmp_path):
    checkpoint = read(small_run(tmp_path) / "checkpoints" / "best.ckpt")
    for name in ("recipe", "layers"):
        del checkpoint["hyper_parameters"][name]
    assert isinstance(_model_of(checkpoint, tmp_path), ContextKVLM)


@pytest.mark.slow
@pytest.mark.parametrize("at", [STEPS + 3, 2 * STEPS])
def test_a_stopped_run_resumes_bit_for_bit(root, tmp_path, monkeypatch, at):
    """The schedule goes on where it was; trained embedding and pointer are as they were."""
    if not (root / "whole").exists():
        pipeline.run_experiment(best(root), root / "whole")
    assert interrupted(best(root), tmp_path / "run", Stop("ContextKVLMModule", at), monkeypatch) == 143
    pipeline.run_experiment(best(root), tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", root / "whole")
    one, other = (read(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path / "run", root / "whole"))
    assert same(one["lr_schedulers"], other["lr_schedulers"])


@pytest.mark.slow
def test_lightning_cli_resumes_it_too(root, tmp_path, monkeypatch):
    config = replace(best(root), trainer=replace(BASE.trainer, accelerator="cpu", precision="32-true"))
    for name in ("ours", "theirs"):
        interrupted(config, tmp_path / name, Stop("ContextKVLMModule", STEPS + 3), monkeypatch)
    pipeline.run_experiment(config, tmp_path / "ours", resume="strict")
    monkeypatch.setattr(sys, "argv", ["python -m ctxkv_lightning"])
    folder = tmp_path / "theirs"
    last = folder / "checkpoints" / "last.ckpt"
    assert main(["fit", "--config", str(folder / "lightning.yaml"), "--ckpt_path", str(last)]) == 0
    assert rows(tmp_path / "ours", "train") == rows(folder, "train")


@pytest.mark.slow
def test_a_new_run_starts_from_its_weights(root, tmp_path):
    """Not from the table that a trained embedding starts from otherwise."""
    if not (root / "whole").exists():
        pipeline.run_experiment(best(root), root / "whole")
    first = replace(best(root), init_from=str(root / "whole"), train=replace(TRAIN, max_epochs=1, lr=1e-8))
    pipeline.run_experiment(first, tmp_path / "next")
    before, after = (
        json.loads((folder / "metrics.json").read_text())["result"]["val_ppl"]
        for folder in (root / "whole", tmp_path / "next")
    )
    assert after == pytest.approx(before, rel=1e-3)
