"""The encoder as a recurrent language model: losses, gradients, what is carried on, what it learns."""

import json
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning import phase_one, pipeline
from ctxkv_lightning.config import Config, ContextsConfig
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.oacd import effective_rank
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.door import identity
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm import head
from ctxkv_lightning.lm.recurrent import RecurrentLMModule
from ctxkv_lightning.run.saved import read
from ctxkv_lightning.windows import RowLoader, Rows
from tests.context.test_solve import normalised
from tests.oracles import contexts_step_by_step, recurrent_lm_losses
from tests.test_pipeline import SMALL, read_metrics

V, D, C = 13, 6, 4


def module(seed=0, C=C, D=D, **options):
    torch.manual_seed(seed)
    counts = torch.arange(V).float()
    return RecurrentLMModule(ContextEncoder(C, D), normalised(V, D), counts, **{"dropout": 0.0, **options})


@settings(deadline=None, max_examples=30)
@given(B=st.integers(1, 4), n=st.integers(1, 7), at_a_time=st.integers(1, 9), seed=st.integers(0, 99))
def test_losses_and_gradients_are_those_of_the_loop(B, n, at_a_time, seed):
    lm = module(seed=seed)
    tokens, targets = torch.randint(V, (2, B, n))
    state = torch.randn(B, C)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK", at_a_time)
        total, losses, last = lm.losses(Rows(tokens, targets), state)
        found = torch.autograd.grad(total, list(lm.parameters()))
    expected, end = recurrent_lm_losses(lm.encoder, lm.projection, lm.bias, lm.table, tokens, targets, state)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), list(lm.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_recurrent_weights_is_left_out_of_a_whole_batch_and_put_back():
    lm = module(weight_dropout=0.5)
    tokens, targets = torch.randint(V, (2, 3, 6))
    state, kept = torch.randn(3, C), lm.encoder.recurrent_weight.clone()
    torch.manual_seed(7)
    _, losses, _ = lm.losses(Rows(tokens, targets), state)
    torch.manual_seed(7)
    left = torch.nn.functional.dropout(kept, 0.5)
    assert 0 < (left == 0).sum() < left.numel()
    assert torch.equal(lm.encoder.recurrent_weight, kept)
    parts = lm.projection, lm.bias, lm.table, tokens, targets, state
    with torch.no_grad():
        lm.encoder.recurrent_weight.copy_(left)
        torch.testing.assert_close(losses, recurrent_lm_losses(lm.encoder, *parts)[0])
        lm.encoder.recurrent_weight.copy_(kept)
        whole = lm.eval().losses(Rows(tokens, targets), state)[1]
        torch.testing.assert_close(whole, recurrent_lm_losses(lm.encoder, *parts)[0])


@settings(deadline=None, max_examples=60)
@given(N=st.integers(2, 400), steps=st.integers(1, 60))
def test_rows_go_through_the_stream_side_by_side(N, steps):
    stream = torch.arange(N)
    loader = RowLoader(stream, steps)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(batch.tokens.shape[1] == steps for batch in batches[:-1])
    tokens, targets = (torch.cat(parts, dim=1) for parts in zip(*batches, strict=True))
    assert torch.equal(tokens.flatten(), stream[: tokens.numel()])
    assert torch.equal(targets, tokens + 1)
    assert 0 <= N - 1 - tokens.numel() < len(tokens) <= RowLoader.ROWS


class Steps(L.Callback):
    """What each step of an epoch cost, and that the module goes on where the step before it ended."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.states.append(pl_module._state)
        assert not pl_module._state.requires_grad


class Fixed(L.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


def trained(lm, stream, root, epochs=1, steps=5, callbacks=()):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        **options, max_epochs=epochs, default_root_dir=root, enable_model_summary=False, callbacks=list(callbacks)
    )
    trainer.fit(lm, datamodule=Fixed(RowLoader(stream, steps)))
    return lm


def test_contexts_are_carried_from_batch_to_batch_and_begin_anew_with_the_epoch(tmp_path):
    lm, seen = module(lr=0.0), Steps()
    stream = torch.randint(V, (65,), generator=torch.Generator().manual_seed(3))
    trained(lm, stream, tmp_path, epochs=2, callbacks=[seen])
    (row,) = RowLoader(stream, 65).tokens
    rows = RowLoader(stream, 5).tokens
    assert len(rows) > 1
    for epoch in (seen.states[: len(seen.states) // 2], seen.states[len(seen.states) // 2 :]):
        for number, state in enumerate(epoch):
            read = rows[:, : 5 * (number + 1)]
            expected = torch.stack([contexts_step_by_step(lm.encoder, lm.table[one])[-1] for one in read])
            torch.testing.assert_close(state, expected.detach())
    assert len(row) == 64


def test_what_can_be_predicted_is_learnt(tmp_path):
    """Each token of a cycle tells the next one; guessing by frequency alone would stay at a perplexity of 13."""
    lm = module(C=16, D=16, lr=0.05)
    trained(lm, torch.arange(2600) % V, tmp_path, epochs=6)
    perplexities = [row["train_ppl"] for row in lm.history]
    assert perplexities[0] > perplexities[-1]
    assert perplexities[-1] < 3


def test_a_perplexity_that_is_not_finite_is_refused(tmp_path):
    lm = module()
    lm.bias.data[0] = math.nan
    with pytest.raises(UserError, match="perplexity became nan in epoch 1"):
        trained(lm, torch.arange(60) % V, tmp_path)


def test_folders_and_stores_of_before_are_found_where_no_epoch_is_asked_for():
    plain = Config()
    asked = replace(plain, pretrain=replace(plain.pretrain, lm_epochs=1))
    assert identity(plain) == "542db32459"
    assert identity(asked) != identity(plain)


@pytest.mark.parametrize("model", ["context_kv", "cascade"])
def test_a_run_trains_stores_and_reports_it(tmp_path, monkeypatch, model):
    config = replace(
        SMALL,
        cache_dir=str(tmp_path / "cache"),
        model=replace(SMALL.model, name=model),
        trainer=replace(SMALL.trainer, precision="32-true"),
    )
    asked = replace(config, pretrain=replace(config.pretrain, lm_epochs=2))
    pipeline.run_experiment(config, tmp_path / "plain")
    monkeypatch.setattr(phase_one, "OACDPretrainModule", lambda *_, **__: pytest.fail("OACD ran again"))
    pipeline.run_experiment(asked, tmp_path / "run")
    left_out = replace(asked, pretrain=replace(asked.pretrain, lm_weight_dropout=0.5))
    pipeline.run_experiment(left_out, tmp_path / "left-out")
    monkeypatch.setattr(phase_one, "RecurrentLMModule", lambda *_, **__: pytest.fail("the encoder was trained again"))
    pipeline.run_experiment(asked, tmp_path / "again")
    plain, run, left_out, again = (
        read(tmp_path / name / "checkpoints" / "best.ckpt")["state_dict"]
        for name in ("plain", "run", "left-out", "again")
    )
    encoders = [name for name in plain if ".encoder." in name or ".blocks." in name]
    assert encoders
    for name in encoders:
        assert torch.equal(run[name], again[name])
        assert not torch.equal(run[name], plain[name])
        assert not torch.equal(run[name], left_out[name])
    keys = [json.loads(file.read_text())["key"] for file in (tmp_path / "cache" / "encoder").glob("*/manifest.json")]
    recipes = [key["recipe"] for key in keys if "recipe" in key]
    assert sorted(recipe.get("weight_dropout", 0) for recipe in recipes) == sorted([0, 0.5] * (len(recipes) // 2))
    before, after = (read_metrics(tmp_path / name)["pretrain"] for name in ("plain", "run"))
    each = zip(before.get("encoders", [before]), after.get("encoders", [after]), strict=True)
    for plain, learnt in each:
        assert learnt["history"] == plain["history"]
        assert learnt["seconds"] == pytest.approx(
            plain["seconds"] + sum(row["seconds"] for row in learnt["lm_history"])
        )
        assert [row["epoch"] for row in learnt["lm_history"]] == [1, 2]
        assert learnt["lm_history"][1]["train_ppl"] < learnt["lm_history"][0]["train_ppl"]
    phases = ["pretrain-lm"] if model == "context_kv" else ["pretrain-1-lm", "pretrain-2-lm"]
    for phase in phases:
        assert (tmp_path / "run" / phase / "metrics.csv").read_text().count("\n") == 3
    assert "as a language model" in (tmp_path / "run" / "report.md").read_text()
    assert "as a language model" not in (tmp_path / "plain" / "report.md").read_text()


def test_contexts_of_such_an_encoder_are_exact(tmp_path):
    """Its spectrum is that of the contexts which are read, not of those that OACD ended with."""
    config = replace(SMALL, cache_dir=str(tmp_path / "cache"), pretrain=replace(SMALL.pretrain, lm_epochs=2))
    pipeline.run_experiment(config, tmp_path / "run")
    data = ContextDataModule(**yaml.safe_load((tmp_path / "run" / "lightning.yaml").read_text())["data"])
    data.setup("fit")
    stream, encoder = data.streams["train"], data.encoders()[0]
    n = 700
    truth = contexts_step_by_step(encoder, data.normalised_table[stream.tokens[:n]])
    torch.testing.assert_close(stream.contexts[0][:n], truth, atol=1e-4, rtol=0)
    found = read_metrics(tmp_path / "run")["pretrain"]["effective_rank"]
    assert found == pytest.approx(effective_rank(stream.contexts[0]), rel=1e-4)
    weights = read(tmp_path / "run" / "checkpoints" / "best.ckpt")["state_dict"]
    assert torch.equal(weights["model.encoder.linear.weight"], encoder.linear.weight)


@pytest.mark.parametrize("embeddings", ["table", "tokens"])
def test_it_is_the_same_encoder_whatever_contexts_and_embeddings_are_stored_in(tmp_path, embeddings):
    """And whatever precision goes on with the run: it is not trained again under weights that know another one."""
    config = replace(
        SMALL,
        cache_dir=str(tmp_path / "cache"),
        pretrain=replace(SMALL.pretrain, lm_epochs=1),
        contexts=ContextsConfig(dtype="bfloat16"),
        embeddings=embeddings,
        trainer=replace(SMALL.trainer, precision="32-true"),
    )
    pipeline.run_experiment(config, tmp_path / "run")
    longer = replace(
        config, train=replace(config.train, max_epochs=3), trainer=replace(config.trainer, precision="bf16-mixed")
    )
    pipeline.run_experiment(longer, tmp_path / "run", resume="strict")
    data = ContextDataModule(**yaml.safe_load((tmp_path / "run" / "lightning.yaml").read_text())["data"])
    weights = read(tmp_path / "run" / "checkpoints" / "best.ckpt")["state_dict"]
    assert torch.equal(weights["model.encoder.linear.weight"], data.encoders()[0].linear.weight)


def test_an_encoder_needs_something_to_predict():
    with pytest.raises(UserError, match="at least 2 tokens for each encoder"):
        phase_one.pretrain_as_lm(
            replace(SMALL, pretrain=replace(SMALL.pretrain, lm_epochs=1)), None, OneToken(), None, None, "pretrain-lm"
        )


class OneToken:
    """What is asked of a data module before anything is trained."""

    pretrain_rows = slice(0, 1)

    def pretrain_on(self, rows, in_rows):
        assert in_rows

    def pretrain_ids(self):
        return torch.zeros(1, dtype=torch.long)
