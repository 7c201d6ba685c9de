"""Two processes train as one does."""

import csv
import json
import os
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


def train(folder, *words, **variables):
    """A process of its own, begun."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *words],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    """What it printed; it has to end well."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path):
    """The same steps, losses and metrics to 1e-5, in one folder, written once."""
    for name, devices in (("one", 1), ("two", 2)):
        said = ended(train(tmp_path, f"trainer.devices={devices}", f"hydra.run.dir={name}"))
        assert said.count("epoch  2") == 1  # only the first process tells
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) > 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    results = [json.loads((tmp_path / name / "metrics.json").read_text())["result"] for name in ("one", "two")]
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "outputs", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "last"])
def test_two_processes_go_on_with_the_same_run(tmp_path, name):
    """The second is started by the first, with its words, when `auto` and `last` may already mean another run."""
    words, run = ["trainer.devices=2", "trainer.strategy=ddp"], tmp_path / "outputs" / "run"
    ended(train(tmp_path, *words, "train.max_epochs=1", "hydra.run.dir=outputs/run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_epochs: 1", "max_epochs: 2"))  # as if stopped in the second
    said = ended(train(tmp_path, *words, f"resume={name}"))
    assert "epoch  2" in said
    assert "epoch  1" not in said
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["cache", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["resume=auto", "hydra.run.dir=outputs/2/job"]])
def test_processes_that_a_cluster_starts_are_one_run(tmp_path, more):
    """Each composes its own command line, and names its folder where none is given; one of them counts."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "job", "SLURM_NODEID": "0"}
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    place = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "localhost"}
    words = ["trainer.devices=2", "trainer.strategy=ddp", "train.max_epochs=1", *more]
    both = [train(tmp_path, *words, **job, **tasks, **place, SLURM_PROCID=n, SLURM_LOCALID=n) for n in "01"]
    first, second = map(ended, both)
    assert ("starting a new one" in first) == bool(more)
    assert second == ""
    (run,) = (tmp_path / "outputs").glob("2*/*")
    assert (run / "metrics.json").exists()
