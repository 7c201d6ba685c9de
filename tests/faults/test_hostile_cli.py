"""A file for LightningCLI that comes from a stranger imports nothing: a canary would tell."""

import sys
from argparse import ArgumentError

import lightning as L
import pytest
from lightning.pytorch.cli import LightningArgumentParser

from ctxkv_lightning.cli import run_lightning
from ctxkv_lightning.errors import UserError
from tests.faults.test_hostile import canary  # noqa: F401

LIGHTNING = {
    "class path": "trainer: {callbacks: [{class_path: evil.Boom}]}",
    "class path, disguised": 'trainer: {callbacks: [{"\\x63lass_path": evil.Boom}]}',
    "class path in any part": "model: {interval: {class_path: evil.Boom}}",
    "callback by its name": "trainer: {callbacks: evil.Boom}",
    "callbacks by their names": "trainer: {callbacks: [evil.Boom]}",
    "one more callback": "trainer: {callbacks+: evil.Boom}",
    "logger": "trainer: {logger: evil.Boom}",
    "plugin": "trainer: {plugins: [evil.Boom]}",
    "profiler": "trainer: {profiler: evil.Boom}",
    "dotted": "trainer.callbacks: evil.Boom",
    "another file": "trainer: other.yaml",
    "another file behind": "config: other.yaml",
    "python object": "seed_everything: !!python/object/apply:evil.boom []",
    "no mapping": "- evil.Boom",
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_a_file_for_lightning_cli_names_no_code(tmp_path, canary, name):  # noqa: F811
    (tmp_path / "lightning.yaml").write_text(LIGHTNING[name])
    (tmp_path / "other.yaml").write_text("callbacks: evil.Boom")
    with pytest.raises(UserError, match=r"names code to run|cannot be read") as error:
        run_lightning("validate", ["--config", str(tmp_path / "lightning.yaml")])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="takes no file"):
        run_lightning("validate", [f"--trainer={tmp_path / 'other.yaml'}"])


def test_a_name_in_a_trainers_settings_is_code_where_nobody_takes_care(tmp_path, monkeypatch):
    """The canary of the test above does sing."""
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sang')!r}).touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    with pytest.raises(ArgumentError):
        parser.parse_object({"trainer": {"callbacks": "evil.Boom"}})
    assert (tmp_path / "sang").exists()
    del sys.modules["evil"]
