"""Two processes train as one does."""

import csv
import json
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SMALL = shlex.split(
    "interval=5 max_contexts=4 context_dim=16 samples=8 tokenizer.vocab_size=400 embedding.dim=32 model.ffn_dim=64 "
    "data.heldout_bytes=8000 pretrain.max_iterations=3 train.max_epochs=2 train.batch_tokens=3400 heads=2 "
    "model.dropout=0 trainer=cpu trainer.precision=32-true"
)


def rows(folder):
    with (folder / "train" / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path):
    """The same steps, losses and metrics to 1e-5, in one folder, written once."""
    for name, devices in (("one", 1), ("two", 2)):
        words = [*SMALL, f"trainer.devices={devices}", f"hydra.run.dir={name}"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch  2") == 1  # only the first process tells
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) > 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    results = [json.loads((tmp_path / name / "metrics.json").read_text())["result"] for name in ("one", "two")]
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "outputs", "two"]
