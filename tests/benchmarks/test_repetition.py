"""The benchmark of repetition counts what it says it counts, and runs."""

import json

import torch

from benchmarks import repetition
from tests.small_run import small_run


def test_shares_are_of_the_tokens_before_in_prompt_and_text():
    prompts = torch.tensor([[9, 1, 2, 3, 4], [9, 5, 6, 7, 8]])
    written = torch.tensor([[4, 1, 1, 9], [9, 8, 8, 1]])
    assert repetition.shares(prompts, written) == {"again": 3 / 8, "among_last": 4 / 8, "distinct": 6 / 8}


def test_it_runs(tmp_path):
    run = small_run(tmp_path)
    result = repetition.main([str(run), "--quick", "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "repetition.json").read_text())
    assert record["result"] == json.loads(json.dumps(result))
    assert str(run) not in json.dumps(record)
    assert len(result["runs"][0]["settings"]) == 3
