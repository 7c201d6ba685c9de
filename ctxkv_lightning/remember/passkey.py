"""Passkey retrieval: a number is told somewhere in a text and asked for at its end.

After Mohtashami & Jaggi, "Landmark Attention" (2023). Small models write no numbers, so the question is
which of some keys the model finds likeliest.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.remember.recall import LEAD, Answer, Recall, answer, at_lag, fillers, likeliest, planted

SAID, TAIL, ASKED = "\n\nThe pass key is", ". Remember it.\n\n", "\n\nThe pass key is"
"""What stands before the key, behind it, and at the end of the text."""

DISTANCES = (30, 100, 300, 600, 1000, 2000)
"""Tokens between the key's last one and the end of the question."""

DIGITS = 5

CANDIDATES = 10

TRIALS = 20

Encode = Callable[[str], Tensor]


def passkey_suite(
    model: TiedLM,
    encode: Encode,
    stream: Tensor,
    distances: Sequence[int] = DISTANCES,
    seed: int = 42,
    trials: int = TRIALS,
) -> Recall:
    """Recall of the key among `CANDIDATES` of as many digits, at each distance, in a filler from the stream (N,).

    Raises ValueError for a distance shorter than what stands between key and question.
    """
    asked, tail, shortest = encode(ASKED), encode(TAIL), shortest_distance(encode)
    if min(distances, default=0) < shortest:
        raise ValueError(f"distances must be at least {shortest} tokens, for so many are no filler")
    length = max(distances) + LEAD + len(encode(SAID)) + DIGITS + 1
    found: dict[int, list[Answer]] = {distance: [] for distance in sorted(distances)}
    never = []
    for number in range(trials):
        rng = np.random.default_rng([seed, number])
        keys = [encode(f" {key}") for key in drawn_keys(rng)]
        said = torch.cat([encode(SAID), keys[0], tail])
        filler = torch.cat([fillers(stream, length - len(asked), rng), asked])
        before = key_losses(model, filler, keys)
        never.append(likeliest(before))
        for distance in distances:
            text = planted(filler, said, distance - len(tail))
            found[distance].append(answer(key_losses(model, text, keys), before))
    return Recall(1 / CANDIDATES, length, [at_lag(distance, answers, never) for distance, answers in found.items()])


def shortest_distance(encode: Encode) -> int:
    """Tokens of what always stands between key and question's end."""
    return len(encode(ASKED)) + len(encode(TAIL))


def drawn_keys(rng: np.random.Generator) -> list[int]:
    """The keys, all different and of `DIGITS` digits, the right one first."""
    low = 10 ** (DIGITS - 1)
    return [int(key) for key in low + rng.choice(9 * low, CANDIDATES, replace=False)]


def key_losses(model: TiedLM, prompt: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Nats (K,) that the tokens of each key, together, cost after a prompt (N,), which is read once for all of them."""
    device = model.embedding.weight.device
    rows, lengths = torch.arange(len(keys)), torch.tensor([len(key) for key in keys])
    padded, losses = pad_sequence(list(keys), batch_first=True), torch.zeros(len(keys), dtype=torch.float64)
    decoder = Decoder(model, batch=len(keys))
    logits = decoder.read(prompt.to(device).expand(len(keys), -1))
    for place, tokens in enumerate(padded.T):
        logits = logits if place == 0 else decoder.step(padded[:, place - 1].to(device))
        cost = -torch.log_softmax(logits.double(), dim=-1).cpu()[rows, tokens]
        losses += cost * (place < lengths)
    return losses
