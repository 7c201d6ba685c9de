import math

import lightning as L
import pytest
import torch
from torchmetrics.text import Perplexity as LogitPerplexity

from ctxkv_lightning.context import pretrain
from ctxkv_lightning.context.pretrain import OACDPretrainModule, load_encoder, save_encoder
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import MONITOR, ContextKVLMModule
from ctxkv_lightning.lm.perplexity import Perplexity
from ctxkv_lightning.store import get_or_build
from tests.oracles import convergence_from_formula, full_logit_loss
from tests.test_datamodule import C, D, V, opened, stores  # noqa: F401

SIZES = {
    "vocab_size": V,
    "embedding_dim": D,
    "context_dim": C,
    "heads": 2,
    "interval": 3,
    "max_contexts": 4,
    "ffn_dim": 16,
}


def trainer(tmp_path, **options):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def test_perplexity_equals_torchmetrics_on_logits():
    logits, targets = torch.randn(3, 20, 7), torch.randint(0, 7, (3, 20))
    ours, theirs = Perplexity(), LogitPerplexity()
    for row, target in zip(logits, targets, strict=True):
        ours.update(torch.nn.functional.cross_entropy(row, target, reduction="none"))
    theirs.update(logits, targets)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_perplexity_keeps_digits_that_fp32_would_lose():
    metric = Perplexity()
    for _ in range(3):
        metric.update(torch.full((1,), 3e7))
        metric.update(torch.full((1,), 1.0))
    assert float(metric.nll) == 9e7 + 3


def test_training_learns_freezes_and_logs(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=20)
    module = ContextKVLMModule(**SIZES, lr=0.01)
    run = trainer(tmp_path, max_epochs=40)
    run.fit(module, datamodule=data)
    logged = run.callback_metrics
    assert float(logged["train/ppl"]) < 0.8 * V
    assert {MONITOR, "val/accuracy", "train/ppl"} <= set(logged)
    assert torch.equal(module.model.embedding.weight, data.table)
    assert torch.equal(module.model.encoder.linear.weight, data.encoders()[0].linear.weight)


class StopAt(L.Callback):
    """Ends training after a step of an epoch that has more of them."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.current_epoch == 1 and batch_idx == 0


def test_an_epoch_that_is_stopped_half_way_has_a_train_ppl_too(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=5)
    module = ContextKVLMModule(**SIZES)
    run = trainer(tmp_path, max_epochs=4, callbacks=[StopAt()])
    run.fit(module, datamodule=data)
    assert run.global_step == len(data.train_dataloader()) + 1
    assert float(run.callback_metrics["train/ppl"]) > 1
    again = trainer(tmp_path, max_epochs=1)
    again.fit(module, datamodule=data)
    assert "train/ppl" in again.callback_metrics


@pytest.mark.parametrize("recipe", [None, {"projection": True, "pointer_heads": 1, "pointer_window": 5, "apart": True}])
def test_a_rank_without_windows_takes_its_step_all_the_same(stores, tmp_path, recipe):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=20)
    module, loader = ContextKVLMModule(**SIZES, recipe=recipe), data._windows("train")
    batch = loader.batch(torch.tensor([], dtype=torch.long), 20, torch.tensor([0]))
    hidden, asked = module._hidden(batch)
    total, nll = module.model.loss(hidden, asked)
    total.backward()
    assert (float(total.detach()), len(nll)) == (0, 0)
    assert float(module.model.attention.query.weight.grad.abs().max()) == 0
    assert [len(found) for found in module.model.score(hidden, asked)] == [0, 0]


def test_validation_is_the_stream_scored_once_with_full_logits(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=5)
    module = ContextKVLMModule(**SIZES)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    stream = data.streams["validation"]
    with torch.no_grad():
        hidden = module.model.eval()(stream.embeddings[stream.rows][None], stream.contexts[0][None])[0, :-1]
        expected = full_logit_loss(hidden, module.model.embedding.weight, stream.tokens[1:])
        right = (module.model.logits(hidden).argmax(-1) == stream.tokens[1:]).float().mean()
    assert float(run.callback_metrics[MONITOR]) == pytest.approx(math.exp(expected.double().mean()), rel=1e-5)
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(float(right))


def test_a_loss_that_becomes_nan_stops_before_the_update(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=20)
    module = ContextKVLMModule(**SIZES)

    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 2:
                self.before = [p.clone() for p in module.model.ffn.up.parameters()]
                batch.embeddings[0, 0, 0] = float("nan")

    poison = Poison()
    with pytest.raises(UserError, match=r"became nan at step 3 of epoch 1.*train\.lr"):
        trainer(tmp_path, max_epochs=2, callbacks=[poison]).fit(module, datamodule=data)
    assert all(torch.equal(a, b) for a, b in zip(poison.before, module.model.ffn.up.parameters(), strict=True))


def test_where_looking_is_costly_a_nan_still_updates_nothing(stores, tmp_path, monkeypatch):  # noqa: F811
    """The loss is NaN from step 3 on and nobody looks before the epoch's end, as on a GPU."""
    data = opened(stores, tmp_path, history=9, batch_tokens=8)
    module = ContextKVLMModule(**SIZES)
    monkeypatch.setattr(module, "_looks", lambda index: module.trainer.is_last_batch)
    seen = []

    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append([p.clone() for p in module.model.ffn.up.parameters()])
            if index >= 2:
                batch.embeddings[0, 0, 0] = float("nan")

    with pytest.raises(UserError, match="became nan"):
        trainer(tmp_path, max_epochs=2, callbacks=[Poison()]).fit(module, datamodule=data)
    assert len(seen) == len(data.train_dataloader()) > 4
    assert not torch.equal(seen[1][0], seen[2][0])
    assert all(torch.equal(seen[2][0], later[0]) for later in seen[3:])
    assert torch.equal(seen[2][0], module.model.ffn.up.weight)


def test_a_nan_in_validation_stops_too(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9)
    data.streams["validation"].contexts[0][3] = float("nan")
    with pytest.raises(UserError, match="validation PPL of epoch 1 is nan"):
        trainer(tmp_path, max_epochs=2).fit(ContextKVLMModule(**SIZES), datamodule=data)


def test_checkpoints_load_without_pickle(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(ContextKVLMModule(**SIZES), datamodule=data)
    run.save_checkpoint(tmp_path / "m.ckpt")
    torch.load(tmp_path / "m.ckpt", weights_only=True)
    again = ContextKVLMModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert again.hparams["interval"] == 3


def test_phase_one_takes_one_averaged_step_per_epoch(stores, tmp_path):  # noqa: F811
    stores.pop("encoders")
    data = opened(stores, tmp_path, pretrain_batch_tokens=25)
    module = OACDPretrainModule(C, D, noise=0.0)
    gradients = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients.append([p.grad.clone() for p in module.encoder.parameters()])

    torch.manual_seed(5)
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[Watch()])
    start = [p.clone() for p in module.encoder.parameters()]
    run.fit(module, datamodule=data)
    assert run.global_step == len(gradients) == 1
    # The same, written out: the random start shifted right by one, three batches, the mean of their gradients.
    torch.manual_seed(5)
    previous = torch.cat([torch.zeros(1, C), torch.randn(61, C) * 0.01])
    twin = OACDPretrainModule(C, D).encoder
    for parameter, value in zip(twin.parameters(), start, strict=True):
        parameter.data.copy_(value)
    from ctxkv_lightning.context.oacd import oacd_loss

    embeddings = torch.nn.functional.layer_norm(data.table, (D,))[
        torch.from_numpy(data.token_store.array("train")).long()
    ]
    for rows in (slice(0, 25), slice(25, 50), slice(50, 61)):
        (oacd_loss(twin(previous[:-1][rows], embeddings[rows])) / 3).backward()
    for ours, parameter in zip(gradients[0], twin.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-4)


def test_phase_one_iterations_are_jacobi_sweeps(stores, tmp_path):  # noqa: F811
    """Overwriting the contexts batch by batch gives what two buffers would: every context from the last iteration's."""
    stores.pop("encoders")
    data = opened(stores, tmp_path, pretrain_batch_tokens=7)
    module = OACDPretrainModule(C, D, lr=0.0, noise=0.0)
    torch.manual_seed(5)
    run = trainer(tmp_path, max_epochs=3, accumulate_grad_batches=9, limit_val_batches=0)
    run.fit(module, datamodule=data)
    torch.manual_seed(5)
    contexts = torch.randn(61, C) * 0.01
    table = torch.nn.functional.layer_norm(data.table, (D,))
    embeddings = table[torch.from_numpy(data.token_store.array("train")).long()]
    rates = []
    for _ in range(3):
        shifted = torch.cat([torch.zeros(1, C), contexts[:-1]])
        before, contexts = contexts, module.encoder(shifted, embeddings).detach()
        rates.append(convergence_from_formula(contexts, before, 0.03))
    torch.testing.assert_close(module.contexts, contexts, atol=1e-5, rtol=0)
    assert [row["convergence_rate"] for row in module.history] == pytest.approx(rates)


def test_large_iterations_live_in_a_file_and_give_the_same_numbers(stores, tmp_path, monkeypatch):  # noqa: F811
    stores.pop("encoders")
    data = opened(stores, tmp_path)
    weights = []
    for limit in (1 << 30, 1):
        monkeypatch.setattr(pretrain, "FILE_BACKED", limit)
        torch.manual_seed(5)
        module = OACDPretrainModule(C, D)
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
        weights.append(module.encoder.linear.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("target_rate", [0.9, 1.0])
def test_phase_one_stops_at_the_target_and_reports(stores, tmp_path, target_rate):  # noqa: F811
    stores.pop("encoders")
    data = opened(stores, tmp_path)
    module = OACDPretrainModule(C, D, target_rate=target_rate, move_threshold=1e9)
    trainer(tmp_path, max_epochs=50, limit_val_batches=0).fit(module, datamodule=data)
    summary = module.summary()
    assert summary["iterations"] == 1
    assert summary["stopped_by"] == "target"
    assert summary["convergence_rate"] == 1
    assert 0 < summary["effective_rank"] <= 1
    assert len(summary["singular_values"]) == C


def test_phase_one_stops_on_a_plateau(stores, tmp_path, monkeypatch):  # noqa: F811
    stores.pop("encoders")
    data = opened(stores, tmp_path)
    rates = iter([0.3, 0.6, 0.8, 0.8, 0.8, 0.9])  # one batch an epoch
    monkeypatch.setattr(pretrain, "still_positions", lambda now, *_: torch.tensor(round(next(rates) * len(now))))
    module = OACDPretrainModule(C, D)
    trainer(tmp_path, max_epochs=50, limit_val_batches=0).fit(module, datamodule=data)
    assert module.summary()["iterations"] == 5
    assert module.stopped_by == "plateau"


def test_the_encoder_comes_back_from_its_store_bit_for_bit(tmp_path):
    module = OACDPretrainModule(C, D)
    built = get_or_build(tmp_path, "encoder", {}, lambda folder: save_encoder(module.encoder, folder))
    again = load_encoder(built)
    assert not any(p.requires_grad for p in again.parameters())
    for ours, theirs in zip(module.encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
