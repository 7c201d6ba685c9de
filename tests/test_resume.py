"""A run that is stopped and resumed is the run that was not stopped: weights, optimizer, order, dropout, metrics."""

import csv
import errno
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from lightning import Callback

from ctxkv_lightning import build, phase_one, pipeline, store
from ctxkv_lightning.config import TrainConfig
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.resume import check_changes
from ctxkv_lightning.run import checkpoint, interruption
from ctxkv_lightning.run.folder import RunFolder, alone_in
from ctxkv_lightning.run.interruption import Interrupted
from ctxkv_lightning.run.saved import read
from ctxkv_lightning.store import Store
from tests.faults.injections import FORK
from tests.test_pipeline import SMALL

# Small steps, so that an epoch has several; dropout is on.
BASE = replace(SMALL, train=TrainConfig(batch_tokens=3400, max_epochs=3, patience=9))


class Stop(Callback):
    """Sends a signal to this process at a step of Phase 2, or after an iteration of Phase 1."""

    def __init__(self, phase, at, number=signal.SIGTERM):
        self.phase, self.at, self.number = phase, at, number

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if type(pl_module).__name__ == self.phase and trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


def interrupted(config, folder, stop, monkeypatch, resume="no"):
    """Runs until the signal; the exit code that the run asks for."""
    make = pipeline.make_trainer
    with monkeypatch.context() as patch:
        for module in (pipeline, phase_one):
            patch.setattr(
                module,
                "make_trainer",
                lambda *args, callbacks, **options: make(*args, callbacks=[stop, *callbacks], **options),
            )
        with pytest.raises(Interrupted) as raised:
            pipeline.run_experiment(config, folder, resume)
    return raised.value.code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    root = tmp_path_factory.mktemp("whole")
    config = replace(BASE, cache_dir=str(root / "cache"))
    pipeline.run_experiment(config, root / "run")
    return root / "run"


def rows(folder, phase):
    with (folder / phase / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def numbers(folder):
    """metrics.json without what a clock or the cache decides."""
    metrics = json.loads((folder / "metrics.json").read_text())
    epochs = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
        for row in metrics["train"]["epochs"]
    ]
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in metrics["pretrain"]["history"]]
    return epochs, history, metrics["result"], metrics["train"]["best_epoch"], metrics["attention"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(resumed, whole, phases=("train",)):
    assert numbers(resumed) == numbers(whole)
    for phase in phases:
        assert rows(resumed, phase) == rows(whole, phase)
    for name in ("best.ckpt", "last.ckpt"):
        one, other = (read(folder / "checkpoints" / name) for folder in (resumed, whole))
        for part in ("state_dict", "optimizer_states", "global_step", "epoch", "loops"):
            assert same(one[part], other[part]), (name, part)
        randomness = [checkpoint["callbacks"]["RandomState"]["cpu"] for checkpoint in (one, other)]
        assert torch.equal(*randomness)


STEPS = 7  # in an epoch of BASE; the first test below checks it


def test_an_epoch_has_several_steps(whole):
    assert read(whole / "checkpoints" / "last.ckpt")["global_step"] == 3 * STEPS


@pytest.fixture
def shared(whole):
    """The same settings, with what comes before Phase 2 at hand."""
    return replace(BASE, cache_dir=str(whole.parent / "cache"))


@pytest.mark.parametrize(
    "at",
    [
        STEPS + 3,  # mid-epoch
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2 * STEPS, marks=pytest.mark.slow),  # at an epoch's end
    ],
)
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(whole, shared, tmp_path, monkeypatch, at):
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", at), monkeypatch) == 143
    torch.manual_seed(12345)  # another process would begin with other random numbers
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


def times(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["seconds"], metrics["train"]["epochs"]


@pytest.mark.slow
def test_times_count_what_was_spent_before_a_resume(shared, tmp_path, monkeypatch):
    class Slow(Stop):
        """An epoch whose time is spent before the signal."""

        def on_train_batch_start(self, trainer, pl_module, *rest):
            if type(pl_module).__name__ == self.phase and trainer.global_step == STEPS + 1:
                time.sleep(3)

    config, run = shared, tmp_path / "run"
    assert interrupted(config, run, Slow("ContextKVLMModule", STEPS + 3), monkeypatch) == 143
    pipeline.run_experiment(config, run, resume="strict")
    seconds, epochs = times(run)
    half = epochs[1]
    assert half["seconds"] > 3
    assert half["tokens_per_second"] < epochs[0]["tokens_per_second"] * epochs[0]["seconds"] / 3
    pipeline.run_experiment(config, run, resume="strict")  # it is finished
    again, same_epochs = times(run)
    assert same_epochs == epochs
    for spent in (seconds, again):
        assert spent["train"] > sum(row["seconds"] for row in epochs)
        assert spent["total"] == pytest.approx(sum(value for name, value in spent.items() if name != "total"))


@pytest.mark.slow
def test_times_of_phase_one_count_what_was_spent_before_a_resume(tmp_path, monkeypatch):
    class Slow(Stop):
        def on_train_batch_start(self, trainer, pl_module, *rest):
            if type(pl_module).__name__ == self.phase and trainer.global_step == self.at - 1:
                time.sleep(3)

    config = replace(BASE, cache_dir=str(tmp_path / "cache"))
    assert interrupted(config, tmp_path / "run", Slow("OACDPretrainModule", 2), monkeypatch) == 143
    assert interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", 3), monkeypatch, resume="strict") == 143
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert times(tmp_path / "run")[0]["pretrain"] > 3


@pytest.mark.slow
def test_a_signal_during_the_last_save_is_not_lost(whole, shared, tmp_path, monkeypatch):
    """It comes after the run has looked for one, and before it gives the signals back."""

    class Late(Stop):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if type(pl_module).__name__ == self.phase and trainer.global_step == self.at:
                os.kill(os.getpid(), self.number)

        def on_train_batch_end(self, trainer, pl_module, *rest):
            pass

    late = Late("ContextKVLMModule", 3 * STEPS)  # twice, for two files are saved
    assert interrupted(shared, tmp_path / "run", late, monkeypatch) == 143
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_other_signals_save_at_the_next_step_too(shared, tmp_path, monkeypatch, number, code):
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", 2, number), monkeypatch) == code
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_ctrl_c_twice_quits_at_once(tmp_path):
    def run():
        guard = interruption.Safeguard(tmp_path / "last.ckpt")
        signal.signal(signal.SIGINT, guard._receive)
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "still here").touch()
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "never reached").touch()

    child = FORK.Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGINT
    assert [path.name for path in tmp_path.iterdir()] == ["still here"]


@pytest.mark.parametrize("error", [RuntimeError("reentrant call"), BrokenPipeError(), ValueError("closed file")])
def test_a_ctrl_c_is_noted_where_it_cannot_be_told(tmp_path, monkeypatch, error):
    def write(_):
        raise error

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    guard = interruption.Safeguard(tmp_path / "last.ckpt")
    guard._receive(signal.SIGINT, None)
    assert guard._received == signal.SIGINT


@pytest.mark.slow
def test_phase_one_stopped_by_a_signal_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    config = replace(BASE, cache_dir=str(tmp_path / "cache"))
    assert interrupted(config, tmp_path / "run", Stop("OACDPretrainModule", 2), monkeypatch) == 143
    torch.manual_seed(12345)
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole, ("pretrain", "train"))
    assert not (tmp_path / "run" / "pretrain.ckpt").exists()


@pytest.mark.slow
def test_an_encoder_stopped_while_it_learns_to_predict_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = replace(BASE, pretrain=replace(BASE.pretrain, lm_epochs=3), cache_dir=str(tmp_path / "cache"))
    pipeline.run_experiment(replace(config, cache_dir=str(tmp_path / "other cache")), tmp_path / "whole")
    stop = Stop("RecurrentLMModule", 2)
    assert interrupted(config, tmp_path / "run", stop, monkeypatch) == 143
    assert read(tmp_path / "run" / "pretrain-lm.ckpt")["global_step"] == 2, "in the middle of an epoch"
    torch.manual_seed(12345)
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", tmp_path / "whole", ("pretrain", "pretrain-lm", "train"))
    assert len(rows(tmp_path / "run", "pretrain-lm")) == 3
    assert not list((tmp_path / "run").glob("pretrain*.ckpt"))


@pytest.mark.slow
def test_phase_one_of_a_later_encoder_is_not_taken_for_that_of_the_first(tmp_path, monkeypatch):
    """The cache is empty when the run goes on: the first encoder, finished before, is trained again."""

    class StopSecond(Stop):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if trainer.logger.version == "pretrain-2":
                super().on_train_batch_end(trainer, pl_module, *rest)

    config = replace(BASE, model=replace(BASE.model, name="cascade"), cache_dir=str(tmp_path / "cache"))
    whole = tmp_path / "whole"
    pipeline.run_experiment(replace(config, cache_dir=str(tmp_path / "other cache")), whole)
    assert interrupted(config, tmp_path / "run", StopSecond("OACDPretrainModule", 2), monkeypatch) == 143
    shutil.rmtree(tmp_path / "cache")
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole, ("pretrain-1", "pretrain-2", "train"))
    assert not list((tmp_path / "run").glob("pretrain*.ckpt"))


@pytest.mark.slow
def test_a_run_killed_between_two_checkpoints_resumes_bit_for_bit(whole, shared, tmp_path, monkeypatch):
    """An exception at a step stands for the kill: nothing is saved, and what was logged since is logged once."""
    config = shared

    class Killed(BaseException):
        pass

    class Kill(Stop):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if type(pl_module).__name__ == self.phase and trainer.global_step == self.at:
                raise Killed

    make = pipeline.make_trainer
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline,
            "make_trainer",
            lambda *args, callbacks, **options: make(
                *args, callbacks=[Kill("ContextKVLMModule", 2 * STEPS + 4), *callbacks], **options
            ),
        )
        with pytest.raises(Killed):
            pipeline.run_experiment(config, tmp_path / "run")
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_killed_after_its_last_epoch_trains_no_further(whole, shared, tmp_path, monkeypatch):
    config = shared
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_footing", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run_experiment(config, tmp_path / "run")
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_checkpoints_are_saved_within_an_epoch_as_time_goes_by(shared, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(interruption.Safeguard.__init__, "__defaults__", ("steps", 0.0))
    make = pipeline.make_trainer

    class Look(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(trainer.global_step)

    monkeypatch.setattr(
        pipeline,
        "make_trainer",
        lambda *args, callbacks, **options: make(*args, callbacks=[Look(), *callbacks], **options),
    )
    config = replace(shared, train=replace(BASE.train, max_epochs=1))
    pipeline.run_experiment(config, tmp_path / "run")
    assert set(range(1, STEPS)) <= set(saved)


@pytest.mark.slow
def test_epochs_too_short_for_a_checkpoint_are_saved_at_the_end_all_the_same(shared, tmp_path, monkeypatch):
    saved, save = [], L.Trainer.save_checkpoint

    def note(trainer, path, *rest, **options):
        saved.append((os.path.basename(path), trainer.global_step))
        save(trainer, path, *rest, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", note)
    monkeypatch.setattr(checkpoint, "PACE", 1e-3)  # bytes a second
    pipeline.run_experiment(shared, tmp_path / "run")
    steps = STEPS * BASE.train.max_epochs
    assert [entry for entry in saved if entry[0] == "last.ckpt"] == [("last.ckpt", steps)]
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == steps


def never(since, took, weights):
    return False


def best_written(monkeypatch):
    """A best checkpoint is never worth writing before the end; the names of what is written."""
    written, replace_ = [], checkpoint._replace
    monkeypatch.setattr(checkpoint, "worth_saving", never)
    monkeypatch.setattr(
        checkpoint, "_replace", lambda path, content: written.append(path.name) or replace_(path, content)
    )
    return written


@pytest.mark.slow
def test_a_best_checkpoint_that_waits_is_there_in_the_end(whole, shared, tmp_path, monkeypatch):
    written = best_written(monkeypatch)
    monkeypatch.setattr(interruption, "worth_saving", never)
    pipeline.run_experiment(shared, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert written.count("best.ckpt") == written.count("last.ckpt") == 1


@pytest.mark.slow
@pytest.mark.parametrize("at", [STEPS + 3, 2 * STEPS + 3])
def test_a_run_stopped_while_its_best_checkpoint_waits_resumes_bit_for_bit(whole, shared, tmp_path, monkeypatch, at):
    written = best_written(monkeypatch)
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", at), monkeypatch) == 143
    epochs = at // STEPS
    assert read(tmp_path / "run" / "checkpoints" / "best.ckpt")["global_step"] == epochs * STEPS
    assert written.count("best.ckpt") == epochs
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


def elsewhere(patch):
    """What makes an encoder come out otherwise, as on another machine: by a hundredth, which is no rounding."""
    save = phase_one.save_encoder

    def moved(encoder, folder):
        with torch.no_grad():
            encoder.linear.weight *= 1.01
        save(encoder, folder)

    patch.setattr(phase_one, "save_encoder", moved)


def test_a_run_that_goes_on_without_its_cache_has_its_own_encoder(whole, shared, tmp_path, monkeypatch):
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", STEPS + 3), monkeypatch) == 143
    elsewhere(monkeypatch)
    anew = replace(shared, cache_dir=str(tmp_path / "cache"))
    pipeline.run_experiment(anew, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)
    assert "Phase 1 as " in (tmp_path / "run" / "train.log").read_text()
    stored, before = (
        {Store.open(path.parent).content for path in Path(cache).glob("encoder/*/encoder.pt")}
        for cache in (anew.cache_dir, shared.cache_dir)
    )
    assert stored == before, "its contexts are found, too, where they are"


@pytest.mark.parametrize("part", ["embedding table", "encoder"])
def test_a_run_does_not_go_on_with_contexts_of_another_encoder(whole, shared, tmp_path, monkeypatch, part):
    """Of a run that noted nothing of its encoder, as older versions; or with another table."""
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", STEPS + 3), monkeypatch) == 143
    if part == "encoder":
        (tmp_path / "run" / "encoders.json").unlink()
    kept = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    anew = replace(shared, cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        if part == "encoder":
            elsewhere(patch)
        else:
            made = build.embedding.svd_table
            patch.setattr(build.embedding, "svd_table", lambda *args, **rest: -made(*args, **rest))
        with pytest.raises(UserError, match=f"{part}.* is not the one that"):
            pipeline.run_experiment(anew, tmp_path / "run", resume="strict")
    if part == "embedding table":
        assert str(shared.cache_dir) in (tmp_path / "run" / "config.yaml").read_text(), "nothing was written yet"
    assert same(read(tmp_path / "run" / "checkpoints" / "last.ckpt"), kept)
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_changed_settings_are_refused_but_for_the_harmless_ones(whole, shared, tmp_path, monkeypatch):
    config = shared
    interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", 3), monkeypatch)
    changed = replace(config, interval=6, train=replace(config.train, lr=0.5))
    with pytest.raises(UserError, match=r"interval: 5 -> 6; train.lr: 0.001 -> 0.5\): .*init_from="):
        pipeline.run_experiment(changed, tmp_path / "run", resume="strict")
    longer = replace(config, train=replace(config.train, max_epochs=1, patience=2))
    pipeline.run_experiment(longer, tmp_path / "run", resume="strict")
    assert len(numbers(tmp_path / "run")[0]) == 1
    states = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["callbacks"]
    assert [state["patience"] for name, state in states.items() if name.startswith("EarlyStopping")] == [2]


def test_what_nothing_reads_may_differ(tmp_path):
    """Trials of a sweep that are one experiment share a folder: the second may resume what the first began."""
    began, asked = (replace(BASE, model=replace(BASE.model, name="recurrence"), interval=number) for number in (2, 3))
    run = RunFolder(tmp_path)
    run.write_config(yaml.safe_dump(asdict(began)))
    check_changes(asked, run)
    check_changes(replace(asked, train=replace(asked.train, max_epochs=9)), run)
    with pytest.raises(UserError, match="interval: 2 -> 3; seed"):
        check_changes(replace(asked, seed=7), run)


@pytest.mark.slow
def test_fewer_epochs_than_are_done_are_refused_before_anything_is_written(shared, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(shared, run, Stop("ContextKVLMModule", 2 * STEPS + 3), monkeypatch)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "lightning.yaml", "train.log")}
    shorter = replace(shared, train=replace(shared.train, max_epochs=1))
    with pytest.raises(UserError, match=r"2 epochs behind it, more than train\.max_epochs=1: give at least 2"):
        pipeline.run_experiment(shorter, run, resume="strict")
    assert before == {name: (run / name).read_bytes() for name in before}
    pipeline.run_experiment(replace(shared, train=replace(shared.train, max_epochs=2)), run, resume="strict")
    assert len(numbers(run)[0]) == 2


@pytest.mark.slow
def test_a_changed_text_is_refused_with_both_hashes(shared, tmp_path, monkeypatch):
    config = shared
    interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", 3), monkeypatch)
    began = json.loads((tmp_path / "run" / "data.json").read_text())
    documents = build.read_pydocs()
    monkeypatch.setattr(build, "pydocs_state", lambda: {"python": "another"})
    monkeypatch.setattr(build, "read_pydocs", lambda: [doc._replace(text=doc.text + ".") for doc in documents])
    for name in ("text", "tokenizer"):  # a learnt tokenizer changes with its text
        (tmp_path / "run" / "data.json").write_text(json.dumps({name: began[name]}))
        with pytest.raises(UserError, match=f"the {name} has changed.*{began[name]}, is [0-9a-f]{{64}}"):
            pipeline.run_experiment(config, tmp_path / "run", resume="strict")


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_refused_or_passed_over(shared, tmp_path, monkeypatch, capsys):
    config = shared
    interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", 2 * STEPS + 3), monkeypatch)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged.*resume=auto"):
        pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    pipeline.run_experiment(config, tmp_path / "run", resume="forgiving")
    assert "best.ckpt instead" in capsys.readouterr().out
    assert len(numbers(tmp_path / "run")[0]) == 3


@pytest.mark.slow
def test_a_run_killed_after_stopping_early_trains_no_further(shared, tmp_path, monkeypatch):
    """Early stopping acts after the epoch's history row is written; the checkpoint must know it all the same."""
    train = replace(BASE.train, max_epochs=9, patience=1, lr=0.05)
    config = replace(shared, train=train)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_footing", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run_experiment(config, tmp_path / "run")
    before = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert before < 9 * STEPS
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == before
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["stopped_early"]


@pytest.mark.slow
def test_a_run_that_stopped_early_goes_on_with_more_patience(shared, tmp_path):
    """As far as a run that had this patience from the start, though not one that has no more than was waited."""
    config = replace(shared, train=replace(BASE.train, max_epochs=8, patience=1, lr=0.05))
    run, patient = tmp_path / "run", replace(config, train=replace(config.train, patience=50))
    pipeline.run_experiment(config, run)
    stopped = len(numbers(run)[0])
    assert stopped < 8, "the test shows nothing"
    pipeline.run_experiment(config, run, resume="strict")
    assert len(numbers(run)[0]) == stopped
    pipeline.run_experiment(patient, run, resume="strict")
    pipeline.run_experiment(patient, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")
    assert not json.loads((run / "metrics.json").read_text())["train"]["stopped_early"]


@pytest.mark.slow
def test_a_new_run_may_start_from_the_weights_of_another(whole, shared, tmp_path):
    config = replace(shared, init_from=str(whole))
    pipeline.run_experiment(replace(config, train=replace(BASE.train, max_epochs=1)), tmp_path / "run")
    first, best = numbers(tmp_path / "run")[0][0], min(row["val_ppl"] for row in numbers(whole)[0])
    assert first["val_ppl"] < best  # it goes on from there, not from random weights
    with pytest.raises(UserError, match="another embedding table"):
        pipeline.run_experiment(replace(config, samples=5), tmp_path / "other")
    with pytest.raises(UserError, match="does not fit this model"):
        pipeline.run_experiment(replace(config, model=replace(config.model, ffn_dim=32)), tmp_path / "third")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_while_it_is_tested_says_so_and_is_finished_by_a_resume(
    whole, shared, tmp_path, monkeypatch, number
):
    """Lightning ends such a run with exit code 0, and under SLURM leaves a checkpoint that it prefers to the best."""

    class Late(Callback):
        def on_test_start(self, trainer, pl_module):
            os.kill(os.getpid(), number)

    assert interrupted(shared, tmp_path / "run", Late(), monkeypatch) == 143
    assert not (tmp_path / "run" / "metrics.json").exists()
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_somebody_is_at_is_left_alone(shared, tmp_path, monkeypatch):
    """What its process had half-written was removed before the lock was asked for, and that process died of it."""
    assert interrupted(shared, tmp_path / "run", Stop("ContextKVLMModule", 2), monkeypatch) == 143
    run = RunFolder(tmp_path / "run")
    half = run.checkpoints / f"{checkpoint.ASIDE}last.ckpt-1"
    half.touch()
    with alone_in(run), pytest.raises(UserError, match="another process is at the run"):
        pipeline.run_experiment(shared, run.path, resume="strict")
    assert half.exists()


def test_a_run_that_was_started_from_another_needs_that_no_more(whole, shared, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "first")
    config = replace(shared, init_from=str(tmp_path / "first"))
    assert interrupted(config, tmp_path / "run", Stop("ContextKVLMModule", 2), monkeypatch) == 143
    shutil.rmtree(tmp_path / "first")
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert len(numbers(tmp_path / "run")[0]) == BASE.train.max_epochs


def test_a_run_goes_on_where_the_cache_may_only_be_read(whole, shared, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(shared.cache_dir, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "encoder")
    make, config = store._make, replace(shared, cache_dir=str(tmp_path / "cache"))

    def refuse(folder, root):
        if root == config.cache_dir:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(folder, root)

    monkeypatch.setattr(store, "_make", refuse)
    pipeline.run_experiment(config, tmp_path / "run", resume="strict")
    assert_same_run(tmp_path / "run", whole)
    assert [path.name for path in (tmp_path / "run" / "cache").iterdir()] == ["encoder"]


def test_a_checkpoint_of_slurms_requeueing_is_not_what_is_tested(whole, shared, tmp_path, monkeypatch):
    """Lightning prefers it, under SLURM, where no checkpoint is named: the test PPL was that of its weights."""
    shutil.copytree(whole, tmp_path / "run")
    other = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    for weight in other["state_dict"].values():
        weight.zero_()
    checkpoint.VerifiedCheckpointIO().save_checkpoint(other, tmp_path / "run" / "hpc_ckpt_1.ckpt")
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", lambda: True)
    pipeline.run_experiment(shared, tmp_path / "run", resume="strict")
    assert numbers(tmp_path / "run")[2] == numbers(whole)[2]
