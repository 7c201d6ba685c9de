"""Multi-query associative recall, of models that were trained on it (`data=mqar`)."""

import math

import numpy as np
from torch import Tensor

from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.remember.estimates import mean, share
from ctxkv_lightning.remember.recall import AtLag, Recall, losses_of
from ctxkv_lightning.text.mqar import Task, answers, lags


def mqar_suite(model: TiedLM, task: Task, stream: Tensor) -> Recall:
    """Share of the answers in a stream of documents (N,) that are the likeliest token, by lags that double.

    The stream is read as one text. Chance is one in `values`; the gain is over a model that knows just as much.
    """
    losses, hits = losses_of(model, stream)
    ids = stream.numpy()
    places = answers(task, ids).nonzero()[0] - 1
    octave = np.log2(lags(task, ids)).astype(int)
    found = []
    for number in sorted(set(octave.tolist())):
        own = places[octave == number]
        gains = math.log(task.values) - losses[own]
        found.append(
            AtLag(2**number, 2 ** (number + 1) - 1, share(hits[own].astype(float).tolist()), None, mean(gains))
        )
    return Recall(1 / task.values, len(stream), found)
