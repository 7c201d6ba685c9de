"""The compiled step computes what the decoder's own does, and README says what compiling it is worth, as measured."""

import json

import pytest
import torch

from benchmarks import compile_step, generate
from benchmarks.workload import QUICK
from ctxkv_lightning.lm.generate import Decoder
from tests.conftest import ROOT


def test_what_is_compiled_is_the_step(monkeypatch):
    """Not compiled here, for that takes a compiler: the same arithmetic, twice around the ring."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    eager = Decoder(generate.build("context_kv", 50, QUICK))
    eager.read(torch.randint(50, (1, QUICK.interval * QUICK.max_contexts)))
    other = compile_step.CompiledDecoder(eager.model, eager)
    for token in torch.randint(50, (2 * QUICK.history + 3, 1)):
        assert compile_step.difference(eager.step(token), other.step(token)) < 1e-5


@pytest.mark.parametrize(
    ("first", "eager", "compiled", "expected"),
    [(10.0, 0.005, 0.004, 9996), (10.0, 0.004, 0.004, None), (10.0, 0.004, 0.005, None), (0.5, 0.5, 0.25, 1)],
)
def test_compiling_is_earned_back_after_as_many_tokens_as_it_takes(first, eager, compiled, expected):
    """With 9,996 tokens, 10 s and 9,995 compiled steps take as long as 9,996 eager ones of 5 ms."""
    found = compile_step.tokens_to_earn_back(first, eager, compiled)
    assert found == expected
    if found:
        assert first + (found - 1) * compiled == pytest.approx(found * eager, abs=eager)


def test_readme_says_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "compile_step.json").read_text())["result"]
    words = " ".join((ROOT / "README.md").read_text().split())
    for name in compile_step.TIMES:
        assert f"{measured[name]['ratio']['median']:.2f} × as fast" in words
        earned = measured[name]["tokens_to_earn_back"]
        assert f"{earned:,} tokens" in words
        assert earned > 2000  # else decoding should be compiled
        assert measured[name]["largest_difference"] < 1e-5


@pytest.mark.slow
def test_it_compiles(tmp_path):
    result = compile_step.main(["--quick", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "compile_step.json").read_text())
    assert record["result"] == json.loads(json.dumps(result))
    assert all(result[name]["compile_seconds"] > 0 for name in compile_step.TIMES)
