"""The benchmark of decoding: its baseline computes what a step does, and it runs."""

import json

import torch

from benchmarks import generate
from benchmarks.workload import QUICK
from ctxkv_lightning.config import Config, ModelConfig
from ctxkv_lightning.lm.generate import Decoder


def test_recomputing_gives_the_logits_of_a_step():
    model = generate.build("context_kv", 50, QUICK).eval()
    tokens = torch.randint(50, (QUICK.interval * QUICK.max_contexts,))
    torch.testing.assert_close(
        generate.last_logits(model, tokens), Decoder(model).read(tokens[None])[0], atol=1e-4, rtol=0
    )


def test_the_sliding_window_keeps_what_the_contexts_keep():
    config = Config(model=ModelConfig(name="sliding_window"))
    assert config.window_tokens == generate.WINDOW_TOKENS


def test_it_runs_and_says_what_is_constant(tmp_path):
    result = generate.main(["--quick", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "generate.json").read_text())["result"] == json.loads(json.dumps(result))
    for name, lengths in result["systems"].items():
        few, many = (lengths[N]["state_bytes"] for N in ("20", "60"))
        assert (few == many) == (name in generate.CONSTANT)
    assert result["prompt"]["ratio"] > 0
