"""Shared by all tests: fixed seeds, and fresh memory that is never zero by luck."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

from ctxkv_lightning import build

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors, and so do the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds torch; deterministic mode fills torch.empty with NaN, so reading unwritten memory shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _offline():
    """No test may reach for a hub."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _documentation_is_parsed_once():
    """Most tests have a cache of their own, and a process need not parse the standard library for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "read_pydocs", cache(build.read_pydocs))
        yield
