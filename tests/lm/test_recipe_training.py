"""Every model trains with the recipe, is scored as the whole text at once, and what is trained is what it says."""

import math

import lightning as L
import pytest
import torch

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import LAST_RATE, MONITOR, ContextKVLMModule
from ctxkv_lightning.lm.scoring import memory_of, score_tokens
from tests.lm.test_module import SIZES, trainer
from tests.test_datamodule import V, opened, stores  # noqa: F401

RECIPE = {
    "norm": "pre",
    "train_embedding": True,
    "embedding_dropout": 0.1,
    "context_dropout": 0.1,
    "output_dropout": 0.1,
    "projection": True,
    "pointer_heads": 2,
    "pointer_dim": 4,
    "pointer_window": 6,
    "pointer_values": True,
    "ngram": True,
    "read_current": True,
    "apart": False,
}
MODELS = ["context_kv", "transformer", "sliding_window", "recurrence"]


def fitted(stores, tmp_path, name, recipe=RECIPE, epochs=12, **changed):  # noqa: F811
    history = {"context_kv": 9, "transformer": 1110, "sliding_window": 6, "recurrence": 6}[name]
    data = opened(stores, tmp_path, history=history, batch_tokens=20, ngram=recipe.get("ngram", False))
    options = {"schedule": "linear", "warmup_steps": 3, "lr": 0.01, "window_tokens": 5, **changed}
    module = ContextKVLMModule(**SIZES, model=name, recipe=recipe, **options)
    run = trainer(tmp_path, max_epochs=epochs)
    run.fit(module, datamodule=data)
    return module, data, run


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_and_is_scored_as_the_whole_text_at_once(stores, tmp_path, name):  # noqa: F811
    module, data, run = fitted(stores, tmp_path, name)
    assert float(run.callback_metrics["train/ppl"]) < 0.8 * V
    model, stream = module.model.eval(), data.streams["validation"]
    memory = memory_of(model, stream.tokens)[None]
    with torch.no_grad():
        hidden = model.states(stream.tokens[None], memory, len(stream.tokens))
        parts = model.output.log_probabilities(hidden, model.table, memory, stream.tokens[None], None)
        p = torch.cat([part for _, part in parts], dim=1)[0, :-1].exp()
    right = p.gather(1, stream.tokens[1:, None])[:, 0]
    assert float(run.callback_metrics[MONITOR]) == pytest.approx(math.exp(-right.log().double().mean()), rel=1e-4)
    hits = (p.argmax(dim=1) == stream.tokens[1:]).float().mean()
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(float(hits), abs=0.02)
    losses, _ = score_tokens(model, stream.tokens)
    torch.testing.assert_close(losses, -right.log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_stays_and_what_is_trained_moves(stores, tmp_path, name):  # noqa: F811
    module, data, _ = fitted(stores, tmp_path, name, epochs=1)
    assert torch.equal(module.model.embedding.weight, data.table)
    assert torch.equal(module.model.encoder.linear.weight, data.encoders()[0].linear.weight)
    fresh = ContextKVLMModule(**SIZES, model=name, recipe=RECIPE, window_tokens=5).model
    fresh.load_frozen(data.table, data.encoders())
    fresh.load_start(data.unigram_counts())
    for part in ("trained_embedding.weight", "output.bias", "output.projection.weight", "output.gate.linear.weight"):
        assert not torch.equal(module.model.get_parameter(part), fresh.get_parameter(part)), part


@pytest.mark.parametrize("part", RECIPE)
def test_each_part_of_the_recipe_trains_alone(stores, tmp_path, part):  # noqa: F811
    module, _, run = fitted(stores, tmp_path, "context_kv", {part: RECIPE[part]}, epochs=2)
    assert math.isfinite(float(run.callback_metrics[MONITOR]))
    assert (module.model.trained_embedding is not None) == (part == "train_embedding")


def test_the_learning_rate_rises_and_falls_in_lines_and_only_matrices_decay(stores, tmp_path):  # noqa: F811
    module, _, run = fitted(stores, tmp_path, "context_kv", epochs=2)
    steps = run.global_step
    rates = [module._rate(step, steps) for step in range(steps)]
    assert rates[:3] == pytest.approx([(k + 1) / 3 * (1 - k / steps) for k in range(3)])
    assert rates[-1] == pytest.approx(max(LAST_RATE, 1 / steps))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * LAST_RATE)
    decaying, still = run.optimizers[0].param_groups
    assert decaying["weight_decay"] > 0 == still["weight_decay"]
    assert not any(p is module.model.table for p in decaying["params"])
    together = {*map(id, decaying["params"]), *map(id, still["params"])}
    assert together == {id(p) for p in module.parameters() if p.requires_grad}


class Gates(L.Callback):
    """The gate's parameters at the end of every epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append([p.detach().clone() for p in pl_module.model.output.gate.parameters()])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("apart", [False, True])
def test_apart_shares_are_learnt_in_the_first_epoch_alone(stores, tmp_path, schedule, apart):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=20, ngram=True)
    module = ContextKVLMModule(**SIZES, recipe={**RECIPE, "apart": apart}, schedule=schedule, lr=0.01)
    gates = Gates()
    gates.seen.append([p.detach().clone() for p in module.model.output.gate.parameters()])
    run = trainer(tmp_path, max_epochs=3, callbacks=[gates])
    run.fit(module, datamodule=data)
    start, first, *later = gates.seen
    assert not any(torch.equal(one, other) for one, other in zip(start, first, strict=True))
    assert len(later) == 2
    for seen in later:
        still = [torch.equal(one, other) for one, other in zip(first, seen, strict=True)]
        assert all(still) if apart else not any(still)
    groups = [{id(p) for p in group["params"]} for group in run.optimizers[0].param_groups]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set().union(*groups) == {id(p) for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_linear_schedule_does_not_go_on_as_a_longer_one(stores, tmp_path, schedule):  # noqa: F811
    _, data, run = fitted(stores, tmp_path, "context_kv", epochs=1, schedule=schedule)
    run.save_checkpoint(tmp_path / "x.ckpt")
    module = ContextKVLMModule(**SIZES, recipe=RECIPE, schedule=schedule, warmup_steps=3, lr=0.01, window_tokens=5)
    longer = trainer(tmp_path, max_epochs=2)
    if schedule == "linear":
        steps = run.global_step
        with pytest.raises(UserError, match=f"falls over {steps} steps, and would jump with {2 * steps}"):
            longer.fit(module, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    else:
        longer.fit(module, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert longer.global_step == run.global_step * (1 if schedule == "linear" else 2)
    anew = trainer(tmp_path, max_epochs=2)
    anew.fit(ContextKVLMModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True), datamodule=data)
    assert anew.global_step == 2 * run.global_step


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_training_may_be_bounded_by_steps_alone(stores, tmp_path, schedule):  # noqa: F811
    """Then Lightning has not counted the batches of an epoch when the optimizer is made."""
    data = opened(stores, tmp_path, history=9, batch_tokens=20, ngram=True)
    module = ContextKVLMModule(**SIZES, recipe={**RECIPE, "apart": True}, schedule=schedule, lr=0.01)
    gates = Gates()
    run = trainer(tmp_path, max_steps=40, callbacks=[gates])
    run.fit(module, datamodule=data)
    assert run.global_step == 40
    first, *later = gates.seen
    assert later
    assert all(torch.equal(one, other) for seen in later for one, other in zip(first, seen, strict=True))


def test_weights_that_are_given_are_not_overwritten_by_a_start(stores, tmp_path):  # noqa: F811
    data = opened(stores, tmp_path, history=9, batch_tokens=20, ngram=True)
    module = ContextKVLMModule(**SIZES, recipe=RECIPE, lr=1e-9)
    module.model.trained_embedding.weight.data.fill_(0.5)
    module.starts_fresh = False
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    torch.testing.assert_close(module.model.table, torch.full_like(module.model.table, 0.5), atol=1e-4, rtol=0)
