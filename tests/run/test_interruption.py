"""Signals outside of training, and those of a launcher that has the job run again."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from ctxkv_lightning.run.ctrl_c import heard
from ctxkv_lightning.run.interruption import REQUEUED, Interrupted, Safeguard, stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_nothing_is_trained_ends_the_run_with_a_code(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as raised, stopping():
        os.kill(os.getpid(), number)
    assert raised.value.code == 143
    assert signal.getsignal(number) == before


def test_who_is_stopping_is_not_stopped_again(tmp_path):
    def stop():
        try:
            raise Interrupted(130)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "what waited").touch()

    with stopping(), pytest.raises(Interrupted) as raised:
        stop()
    assert raised.value.code == 130
    assert (tmp_path / "what waited").exists()


class Garbage:
    """As it is freed, SIGTERM arrives."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # Python looks for signals between two of its own instructions


def test_a_signal_in_a_finalizer_is_sent_again():
    def freed():
        garbage = Garbage()
        del garbage
        time.sleep(5)

    with heard(), stopping(), pytest.raises(Interrupted) as raised:
        freed()
    assert raised.value.code == 143


@pytest.mark.skipif(REQUEUED is None, reason="this system has no SIGUSR2")
@pytest.mark.parametrize("then", [None, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_train_end"])
def test_a_job_that_is_to_run_again_saves_before_its_launcher_hears(tmp_path, moment, then):
    happened = []

    def requeue(number, frame):
        happened.append("requeued")
        raise SystemExit(-1)

    trainer = SimpleNamespace(
        is_last_batch=False, world_size=1, global_step=3, save_checkpoint=lambda path: happened.append(path.name)
    )
    before = signal.signal(REQUEUED, requeue)
    try:
        guard = Safeguard(tmp_path / "last.ckpt")
        guard.on_train_start(trainer, None)
        os.kill(os.getpid(), REQUEUED)
        if then is not None:
            os.kill(os.getpid(), then)
        assert happened == []
        with pytest.raises(SystemExit):
            getattr(guard, moment)(trainer, None)
        assert happened == [*(["last.ckpt"] if moment == "on_train_batch_end" else []), "requeued"]
        assert signal.getsignal(REQUEUED) == requeue
    finally:
        signal.signal(REQUEUED, before)


@pytest.mark.skipif(REQUEUED is None, reason="this system has no SIGUSR2")
def test_a_signal_that_no_launcher_listens_to_is_left_alone(tmp_path):
    guard = Safeguard(tmp_path / "last.ckpt")
    guard.on_train_start(SimpleNamespace(), None)
    try:
        assert signal.getsignal(REQUEUED) == signal.SIG_DFL
    finally:
        guard._give_back()
