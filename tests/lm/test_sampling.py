"""What is drawn has the probabilities it should have, whatever stands in the rows beside it."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm import sampling
from ctxkv_lightning.lm.sampling import Sampler

NOTHING = torch.zeros(3, 0, dtype=torch.long)


def allowed(logits, temperature, top_k, top_p):
    """{token: probability} by the definition, slowly: cut to top_k, then to the fewest that sum to top_p."""
    weights = {token: math.exp((x - max(logits)) / temperature) for token, x in enumerate(logits)}
    kept = dict(sorted(weights.items(), key=lambda item: -item[1])[: top_k or len(weights)])
    total, chosen, mass = sum(kept.values()), {}, 0.0
    for token, weight in kept.items():
        if mass < top_p:
            chosen[token] = weight
            mass += weight / total
    return {token: weight / sum(chosen.values()) for token, weight in chosen.items()}


SETTINGS = [
    (1.0, None, 1.0), (0.5, None, 1.0), (3.0, None, 1.0), (1.0, 1, 1.0), (1.0, 3, 1.0), (1.0, 99, 1.0),
    (1.0, None, 0.5), (0.7, None, 0.9), (1.3, 4, 0.6), (1.0, None, 1e-9), (1e-4, None, 1.0),
    (1e-310, None, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("sorted_at_first", [1, 3, 1024])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_definition(temperature, top_k, top_p, sorted_at_first, monkeypatch):
    monkeypatch.setattr(sampling, "SORTED", sorted_at_first)
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0, 0.4])
    expected = allowed(logits.tolist(), temperature, top_k, top_p)
    probabilities, tokens = Sampler(temperature, top_k, top_p).candidates(logits[None])
    found = dict(zip(range(8) if tokens is None else tokens[0].tolist(), probabilities[0].tolist(), strict=False))
    total = sum(found.values())
    assert {token: p / total for token, p in found.items() if p} == pytest.approx(expected, abs=1e-9)

    sampler, draws = Sampler(temperature, top_k, top_p, seed=7), 4000
    counts = Counter(int(sampler(logits[None], NOTHING[:1])) for _ in range(draws))
    assert set(counts) <= set(expected)
    for token, p in expected.items():  # five standard deviations
        assert abs(counts[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-9, token


def test_zero_is_the_likeliest_token_and_draws_no_number():
    sampler = Sampler(0.0, batch=2)
    logits = torch.randn(2, 50)
    assert sampler(logits, NOTHING).tolist() == logits.argmax(-1).tolist()
    assert torch.equal(sampler.generators[0].get_state(), Sampler(0.0).generators[0].get_state())


def penalised(logits, last, penalty):
    """By the definition, slowly: as much less for each token that is among the last four, however often."""
    return [x - penalty * (token in last[-sampling.PENALISED :]) for token, x in enumerate(logits)]


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.5, 3.0]),
)
def test_a_penalty_is_for_the_last_tokens_of_each_row(rows, length, penalty):
    last, logits = torch.tensor(rows)[:, :length], torch.randn(len(rows), 9)
    found = Sampler(presence_penalty=penalty).penalised(logits, last)
    for row, before, told in zip(logits.tolist(), last.tolist(), found.tolist(), strict=True):
        assert told == pytest.approx(penalised(row, before, penalty), abs=1e-6)


def test_a_penalty_comes_before_all_else():
    logits, last = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert int(Sampler(0.0, presence_penalty=2.5)(logits, last)) == 0
    assert int(Sampler(0.0, presence_penalty=2.5)(logits, last.flip(1))) == 2
    assert {int(Sampler(1.0, top_k=1, presence_penalty=5.0, seed=s)(logits, last.flip(1))) for s in range(9)} == {2}


def test_a_seed_repeats_and_another_does_not():
    logits = torch.zeros(1, 1000)
    first, again, other = (
        [int(s(logits, NOTHING[:1])) for _ in range(20)] for s in (Sampler(seed=1), Sampler(seed=1), Sampler(seed=2))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}])
def test_a_row_draws_the_same_whatever_its_neighbours(options):
    logits = torch.randn(30, 3, 100)
    together, alone = Sampler(seed=5, batch=3, **options), Sampler(seed=6, **options)
    drawn = [together(step, NOTHING) for step in logits]
    assert [int(row[1]) for row in drawn] == [int(alone(step[1:2], NOTHING[:1])) for step in logits]
    assert len({tuple(int(row[b]) for row in drawn) for b in range(3)}) == 3


def test_the_last_token_can_be_drawn_and_none_beyond_it():
    logits = torch.full((1, 4), -math.inf)
    logits[0, 3] = 0.0
    sampler = Sampler()
    assert {int(sampler(logits, NOTHING[:1])) for _ in range(50)} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0 must be above 0"),
        ({"top_p": 1.1}, r"top_p=1\.1 .* at most 1"),
        ({"presence_penalty": -1.0}, "presence_penalty=-1 must be a finite number of at least 0"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(**options)
