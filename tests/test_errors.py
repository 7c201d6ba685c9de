"""What is no bug and no mistake in a word either: a machine that has not enough memory."""

import numpy as np
import pytest
import torch

import train
from ctxkv_lightning import pipeline
from ctxkv_lightning.config import Config
from ctxkv_lightning.errors import UserError


def on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize(
    ("fail", "wanted"),
    [
        (lambda: torch.empty(10**17), "400000000000000000 bytes"),
        (lambda: np.zeros(10**17), r"[0-9.]+ PiB"),
        (on_a_gpu, "2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_sentence(monkeypatch, tmp_path, fail, wanted):
    monkeypatch.setattr(pipeline, "run_experiment", lambda *_: fail())
    with pytest.raises(UserError, match=f"there is not enough memory for {wanted} more: lower train.batch") as error:
        train.run(Config(), tmp_path)
    assert "\n" not in str(error.value)


def test_other_errors_stay_what_they_are(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pipeline, "run_experiment", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.run(Config(), tmp_path)
