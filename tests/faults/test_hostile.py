"""Files and words from strangers run nothing and write nothing outside: a canary would tell."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf

from ctxkv_lightning.door import check_command_line, read_command_line
from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.resume import load_config
from ctxkv_lightning.run.checkpoint import VerifiedCheckpointIO
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import manifest_of, newest_intact, read
from tests.conftest import ROOT
from tests.faults.injections import vouch_for


class Gadget:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Where the canary sings; importing `evil`, or calling anything in it, makes it sing."""
    song = tmp_path / "canary"
    code = f"import pathlib\nsong = pathlib.Path({str(song)!r})\nsong.touch()\ndef boom(*a, **k): song.touch()\n"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    yield song
    assert not song.exists(), "somebody's code was run"
    assert "evil" not in sys.modules


def test_the_canary_sings(tmp_path):
    """The gadgets below do work where nobody takes care."""
    torch.save(Gadget(tmp_path / "sang"), tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert (tmp_path / "sang").is_dir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "nested"])
def test_a_gadget_in_a_checkpoint_with_a_right_manifest_is_not_read(tmp_path, canary, form):
    path = tmp_path / "last.ckpt"
    content = {"global_step": 1, "state_dict": {"weight": torch.zeros(2)}}
    if form == "nested":
        content["callbacks"] = {"x": [{"y": Gadget(canary)}]}
    else:
        content["z"] = Gadget(canary)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    vouch_for(path)
    for load in (read, VerifiedCheckpointIO().load_checkpoint):
        with pytest.raises(UserError, match=r"last\.ckpt holds more than tensors and plain values.*not read"):
            load(path)
    with pytest.raises(UserError, match="not read"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert newest_intact(tmp_path)[0] == path  # its bytes are those that were vouched for: reading is what refuses


@pytest.mark.parametrize("thing", [OmegaConf.create({"lr": 1}), OmegaConf.create([1]), Path("x"), Path, os.system])
def test_objects_of_other_packages_are_not_read(tmp_path, canary, thing):
    torch.save({"global_step": 1, "hyper_parameters": thing}, tmp_path / "x.ckpt")
    vouch_for(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not read"):
        read(tmp_path / "x.ckpt")


HOSTILE = [
    {"_instantiator": "evil.boom"},
    {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "evil.Boom"},
    {"_class_path": "evil.Boom"},
    {"_target_": "evil.boom"},
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_in_hyper_parameters_are_neither_imported_nor_called(tmp_path, canary, hostile):
    path = tmp_path / "last.ckpt"
    fit(tmp_path, steps=2)
    tamper(path, hyper_parameters=hostile, datamodule_hyper_parameters=hostile)
    fit(tmp_path, steps=4, resumed=path)
    assert read(path)["global_step"] == 4
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ContextKVLMModule.load_from_checkpoint(path, weights_only=True)


def fit(folder, steps, resumed=None):
    """A small training with our CheckpointIO that keeps the last, and the best of all."""
    best = ModelCheckpoint(folder, "best-{step}", monitor="train_loss", save_last=True, every_n_train_steps=1)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        plugins=[VerifiedCheckpointIO()],
        callbacks=[best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on so small a training
        trainer.fit(Model(), ckpt_path=resumed, weights_only=True)


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", -float(self.global_step))  # each is better than all before
        return loss


def tamper(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    vouch_for(path)


def test_a_checkpoint_deletes_nothing_outside(tmp_path):
    """Lightning deletes the best one's predecessor, whose path it takes from the checkpoint."""
    victim, folder = tmp_path / "victim.ckpt", tmp_path / "run"
    fit(folder, steps=2)
    victim.write_text("mine")
    manifest_of(victim).write_text("mine too")
    content = read(folder / "last.ckpt")
    name = next(name for name in content["callbacks"] if name.startswith("ModelCheckpoint"))
    path = f"{folder}/../victim.ckpt"
    state = {**content["callbacks"][name], "best_k_models": {path: torch.tensor(5.0)}, "kth_best_model_path": path}
    tamper(folder / "last.ckpt", callbacks={**content["callbacks"], name: {**state, "kth_value": torch.tensor(5.0)}})
    with pytest.raises(UserError, match="is no checkpoint of this run and is not removed"):
        fit(folder, steps=4, resumed=folder / "last.ckpt")
    assert victim.read_text() == "mine"
    assert manifest_of(victim).exists()


RUN_FOLDERS = {
    "target": ("model:\n  _target_: evil.boom\n", "_target_"),
    "target at the root": ("_target_: evil.boom\n", "_target_"),
    "python object": ("interval: !!python/object/apply:evil.boom []\n", "cannot be read"),
    "python name": ("interval: !!python/name:evil.boom ''\n", "cannot be read"),
    "environment": ("cache_dir: ${oc.env:PATH}\n", "interpolation"),
    "resolver": ("cache_dir: ${oc.decode:'1'}\n", "interpolation"),
    "hydra": ("hydra:\n  callbacks:\n    x:\n      _target_: evil.boom\n", "hydra"),
    "no mapping": ("- evil.boom\n", "config.yaml"),
    "text": ("evil.boom\n", "config.yaml"),
    "nothing": ("", "config.yaml"),
    "too deep": ("[" * 5000, "cannot be read"),
    "wrong type": ("interval: evil.boom\n", "interval"),
}


@pytest.mark.parametrize("name", RUN_FOLDERS)
def test_a_run_folders_configuration_is_plain_values_or_refused(tmp_path, canary, name):
    text, told = RUN_FOLDERS[name]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load_config(RunFolder(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert os.environ["PATH"] not in str(error.value)


COMMANDS = {
    "new target": "+x._target_=evil.boom",
    "target in a section": "model._target_=evil.boom",
    "forced": "++train._target_=evil.boom",
    "callback": "+hydra.callbacks.x._target_=evil.boom",
    "callback through ours": "+hydra.callbacks.x={_target_:ctxkv_lightning.builders.os.mkdir,path:CANARY}",
    "none of Hydra's own": "+hydra.callbacks.x={_target_:hydra.experimental.callbacks.Path.touch,self:CANARY}",
    "environment": "cache_dir=${oc.env:PATH}",
    "rerun": "--experimental-rerun=CANARY",
    "configuration from elsewhere": "--config-dir=CANARY",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_names_no_code(tmp_path, canary, name):
    words = COMMANDS[name].replace("CANARY", str(canary))
    with pytest.raises(UserError) as error:
        check_command_line([words])
    assert "\n" not in str(error.value)
    done = train(tmp_path, words)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", f"error: {error.value}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules"]


def train(folder, *words):
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


FILES = {
    "target": "train:\n  _target_: evil.boom",
    "callback": "hydra:\n  callbacks:\n    x:\n      _target_: evil.boom",
    "callback through ours": "hydra:\n  callbacks:\n    x:\n      _target_: ctxkv_lightning.store.os.abort",
    "logging factory": "hydra:\n  job_logging:\n    root: {handlers: [x]}\n    handlers: {x: {(): evil.boom}}",
    "logging class": "hydra:\n  job_logging:\n    root: {handlers: [x]}\n    handlers: {x: {class: evil.boom}}",
    "logging stream": "hydra:\n  hydra_logging:\n    handlers: {x: {class: logging.StreamHandler, stream: 'ext://evil.boom'}}",
    "python object": "interval: !!python/object/apply:evil.boom []",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: /tmp/evil.so}}}",
    "search path": "hydra: {searchpath: ['pkg://evil']}",
    "hydra's own folder": "hydra: {output_subdir: ../canary}",
    "hydra's own folder, disguised": "hydra: {output_subdir: '${oc.decode:../canary}'}",
    "run folder": "hydra: {run: {dir: CANARY}}",
    "run folder that climbs": "hydra: {run: {dir: outputs/../canary}}",
    "log file": "hydra:\n  job_logging:\n    root: {handlers: [x]}\n"
    "    handlers: {x: {class: logging.FileHandler, filename: CANARY}}",
    "log file by its name": "hydra: {job: {name: ../canary}}",
    "in the launcher": "hydra: {launcher: {x: {_target_: evil.boom}}}",
    "in the sweeper": "hydra: {sweeper: {params: {interval: {_target_: evil.boom}}}}",
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_file_from_elsewhere_names_no_code(tmp_path, canary, monkeypatch, name):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    text = FILES[name].replace("CANARY", str(canary))
    (own / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    words = [f"hydra.searchpath=[file://{tmp_path / 'own'}]", "experiment=mine"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        check_command_line(words)
    assert "\n" not in str(error.value)
    done = train(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "", f"error: {error.value}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules", "own"]


LAUNCHERS = {
    "setup": "setup: [touch CANARY]",
    "by reference": "comment: ${oc.env:PATH}",
    "parameters": "additional_parameters: {export: 'LD_PRELOAD=CANARY'}",
    "a line too many": 'comment: "x\\ntouch CANARY"',
    "a folder": "submitit_folder: elsewhere",
    "a program": "comment: CANARY",
    "in disguise": "additional_parameters: {x: {_target_: evil.boom}}",
}


def foreign(folder, text, launcher=None):
    """The words that choose an experiment from elsewhere, and with it a launcher from there."""
    own = folder / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "hydra" / "launcher").mkdir(parents=True)
    if launcher is not None:
        (own / "hydra" / "launcher" / "theirs.yaml").write_text(launcher)
        text = f"defaults: [{{override /hydra/launcher: theirs}}]\n{text}"
    (own / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"hydra.searchpath=[file://{own}]", "experiment=mine"]


@pytest.mark.parametrize("base", ["submitit_slurm", "submitit_local", None])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_from_elsewhere_runs_no_command(tmp_path, canary, name, base):
    begin = f"defaults: [{base}]\n" if base else "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n"
    words = foreign(tmp_path, "interval: 3", begin + LAUNCHERS[name].replace("CANARY", str(canary)))
    with pytest.raises(UserError) as error:
        check_command_line(["-m", *words, "heads=2,4"])
    told = ("would run foreign code", "could be a command to run", "Key ")  # submitit_local has no such keys
    assert any(words in str(error.value) for words in told[: 3 if base == "submitit_local" else 2]), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["environment", "logging factory", "log file", "hydra's own folder"])
def test_a_file_that_is_one_of_several_values_is_looked_into_too(tmp_path, canary, name):
    words = foreign(tmp_path, FILES[name].replace("CANARY", str(canary)))
    (tmp_path / "own" / "experiment" / "other.yaml").write_text("# @package _global_\ninterval: 7\n")
    with pytest.raises(UserError, match="mine"):
        check_command_line(["-m", words[0], "experiment=other,mine"])


def test_what_the_user_types_or_what_is_harmless_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cluster = "defaults: [submitit_slurm]\npartition: gpu\ntimeout_min: 90\nmem_gb: 32\n"
    words = foreign(tmp_path, "hydra: {run: {dir: outputs/mine}}", cluster)
    typed = [
        "hydra.launcher.setup=[module load cuda]",
        "+hydra.launcher.additional_parameters={mail-user: me}",
        "+hydra.job.env_set.OMP_NUM_THREADS='2'",
        f"hydra.sweep.dir={tmp_path / 'anywhere'}",
    ]
    asked = read_command_line(["-m", *words, *typed, "interval=2,3"]).hydra
    assert asked.launcher.setup == ["module load cuda"]
    assert (asked.launcher.partition, asked.launcher.additional_parameters) == ("gpu", {"mail-user": "me"})
    assert asked.job.env_set == {"OMP_NUM_THREADS": "2"}
    assert read_command_line(words).named_folder == "outputs/mine"


def test_what_is_no_checkpoint_is_not_replaced_by_one(tmp_path):
    (tmp_path / ".profile").write_text("mine")
    with pytest.raises(UserError, match="is not written"):
        VerifiedCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / ".profile")
    assert (tmp_path / ".profile").read_text() == "mine"


def test_the_users_own_word_may_name_any_folder_and_a_name_that_climbs_is_still_claimed(tmp_path):
    """`hydra.run.dir=../x` is where the user wants the run; nobody else has a say in where it goes."""
    (tmp_path / "here").mkdir()
    run = RunFolder.claim(tmp_path / "here" / ".." / "x")
    assert (tmp_path / "x" / "checkpoints").is_dir()
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.claim(tmp_path / "x")
    assert run.config.resolve() == tmp_path / "x" / "config.yaml"


def test_a_store_manifest_that_names_files_elsewhere_reads_none(tmp_path):
    from ctxkv_lightning.store import FORMAT, Store, _digest, _sha256_of_json

    (tmp_path / "secret").write_text("x")
    manifest = {
        "format": FORMAT,
        "kind": "k",
        "key": {},
        "facts": {},
        "files": {"../../secret": {"bytes": 1, "sha256": ""}},
    }
    path = tmp_path / "k" / _digest(FORMAT, "k", {})
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": _sha256_of_json(manifest)}))
    with pytest.raises(UserError, match="secret is missing"):
        Store.open(path)


def test_an_array_of_objects_in_a_store_is_not_unpickled(tmp_path, canary):
    import numpy as np

    from ctxkv_lightning.store import get_or_build

    def build(folder):
        np.save(folder / "x.npy", np.array([Gadget(canary)], dtype=object), allow_pickle=True)

    store = get_or_build(tmp_path / "cache", "thing", {}, build)
    with pytest.raises(ValueError, match="Python objects"):
        store.array("x")


def test_yaml_is_read_by_the_safe_loader():
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.getcwd []")
