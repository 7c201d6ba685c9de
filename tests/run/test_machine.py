import pytest
import torch

from ctxkv_lightning.run import machine


@pytest.mark.parametrize(
    ("asked", "gpu", "steps", "expected"),
    [
        ("auto", False, 10**9, False),
        ("auto", True, machine.COMPILE_PAYS - 1, False),
        ("auto", True, machine.COMPILE_PAYS, True),
        ("on", False, 1, True),
        ("off", True, 10**9, False),
    ],
)
def test_compiling_must_earn_itself_back(monkeypatch, asked, gpu, steps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert machine.compile_pays(asked, "auto", steps) is expected
    assert machine.compile_mode("auto") == ("reduce-overhead" if gpu else None)
    assert machine.compile_mode("cpu") is None


@pytest.mark.parametrize(
    ("asked", "accelerator", "cpu_bf16", "expected"),
    [
        ("auto", "cpu", True, "bf16-mixed"),
        ("auto", "auto", True, "bf16-mixed"),
        ("auto", "cpu", False, "32-true"),
        ("32-true", "cpu", True, "32-true"),
        ("bf16-mixed", "cpu", False, "bf16-mixed"),
    ],
)
def test_auto_precision_is_bf16_where_the_processor_has_it(monkeypatch, asked, accelerator, cpu_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_multiplies_bf16", lambda: cpu_bf16)
    assert machine.resolve_precision(asked, accelerator) == expected


def test_keeping_freed_memory_changes_no_number():
    before = torch.arange(1000.0).sum()
    machine.keep_freed_memory()
    assert torch.arange(1000.0).sum() == before


def test_versions_name_what_changes_numbers():
    versions = machine.describe_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "lightning", "ctxkv_lightning"} <= set(versions)
