"""An exported folder is the model, for anyone: loaded through the hub's mixin, and nothing in it is run."""

import copy
import json
import pickle
import stat

import pytest
import safetensors.torch
import torch

from ctxkv_lightning import ContextKVLM
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.export import export_run, model_card
from ctxkv_lightning.lm.rivals import CascadeLM, RecurrenceLM, TransformerLM
from ctxkv_lightning.lm.sampling import Sampler
from ctxkv_lightning.use import open_trained
from ctxkv_lightning.write import Writer
from tests.lm.test_generate import MODELS, made
from tests.small_run import small_run

CLASSES = {
    "context_kv": ContextKVLM,
    "cascade": CascadeLM,
    "recurrence": RecurrenceLM,
    "transformer": TransformerLM,
    "sliding_window": TransformerLM,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return small_run(tmp_path_factory.mktemp("run"), interval=[3, 5])


@pytest.fixture
def exported(run, tmp_path):
    """The folder of its export."""
    return export_run(run, tmp_path / "exported")


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_it_has_the_files_and_nothing_else(exported):
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "config.json", "model.safetensors", "tokenizer/encoding.json", "tokenizer/ranks.tiktoken",
    }  # fmt: skip
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]
    modes = {stat.S_IMODE((exported / name).stat().st_mode) for name in ("README.md", "model.safetensors")}
    assert len(modes) == 1


def test_from_pretrained_gives_the_runs_model(run, exported, capsys):
    model = ContextKVLM.from_pretrained(exported)
    assert capsys.readouterr().out == ""
    trained = open_trained(run)
    assert same_weights(model, trained.model)
    assert model.attention.intervals == (3, 5)
    assert not model.training
    tokens = torch.randint(0, 100, (1, 50))
    contexts = torch.randn(1, 50, 16)
    assert torch.equal(model(model.embed(tokens), contexts), trained.model(trained.model.embed(tokens), contexts))


def test_an_export_is_written_with_like_its_run(run, exported):
    for prompt in ("Zeile 1", "die Größe 🙂"):
        texts = [
            Writer(open_trained(folder), Sampler(seed=1), max_tokens=20).text(prompt) for folder in (run, exported)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", CLASSES)
def test_every_model_survives(name, tmp_path):
    run = small_run(tmp_path, name)
    folder = export_run(run, tmp_path / "exported")
    model = CLASSES[name].from_pretrained(str(folder))
    assert same_weights(model, open_trained(run).model)
    assert type(open_trained(folder).model) is CLASSES[name]


@pytest.mark.parametrize("name", MODELS)
def test_constructor_arguments_survive_saving(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_weights(model, again)
    for part in ("intervals", "selection", "max_contexts", "window"):
        if hasattr(model, "attention"):
            assert getattr(again.attention, part, None) == getattr(model.attention, part, None)
    assert same_weights(copy.deepcopy(model), model)


def test_a_tuple_of_intervals_survives_and_the_signature_is_what_it_was(tmp_path):
    ContextKVLM(50, 32, 16, 2, (3, 5), max_contexts=2).save_pretrained(tmp_path)
    assert ContextKVLM.from_pretrained(tmp_path).attention.intervals == (3, 5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert next(iter(config)) == "architecture"
    assert {key: config[key] for key in ("vocab_size", "embedding_dim", "interval", "max_contexts", "dropout")} == {
        "vocab_size": 50, "embedding_dim": 32, "interval": [3, 5], "max_contexts": 2, "dropout": 0.1,
    }  # fmt: skip


def test_a_card_says_what_the_text_was(run):
    trained = open_trained(run)
    for source, words in (("mqar", "tokens of an associative recall task"), ("hub", "tokens of the data set some/set")):
        trained.metrics["config"]["data"] |= {"source": source, "dataset": "some/set"}
        assert words in model_card(trained, "exported")


def test_the_card_says_what_the_run_measured(run, exported):
    card, metrics = (exported / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    assert card == model_card(open_trained(run), "exported")
    assert f"{metrics['result']['val_ppl']:,.1f}" in card
    assert f"{metrics['footing']['kneser_ney_cache_ppl']:,.1f}" in card
    assert f"{metrics['parameters']['total']:,} parameters" in card
    assert f"keeps {(3 * 5 + 1) * 16 * 4:,} bytes, however long" in card
    assert 'ContextKVLM.from_pretrained("exported")' in card


class Gadget:
    def __reduce__(self):
        return print, ("code ran",)


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Gadget()))


def weights_without(name):
    def damage(folder):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        del weights[name]
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return damage


def config_with(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (only_a_pickle, "model.safetensors"),
        (weights_without("ffn.up.bias"), r"ffn\.up\.bias"),
        (config_with(context_dim=8), "size mismatch"),
        (config_with(interval="often"), "cannot be loaded"),
        (config_with(architecture="Popen"), "names the model 'Popen'"),
        (config_with(architecture="TransformerLM"), "cannot be loaded as TransformerLM"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not that of an export"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "cannot be loaded"),
    ],
)
def test_what_is_not_whole_is_refused_and_nothing_in_it_is_run(damage, message, exported, capsys):
    damage(exported)
    with pytest.raises(UserError, match=message):
        open_trained(exported)
    assert capsys.readouterr().out == ""


def test_another_class_refuses_it(exported):
    with pytest.raises(UserError, match=r"is no exported TransformerLM: .* names ContextKVLM"):
        TransformerLM.from_pretrained(exported)
    (exported / "config.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        ContextKVLM.from_pretrained(exported)


def test_the_command_writes_a_new_folder_only(run, tmp_path, capsys):
    folder = tmp_path / "deep" / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    before = (folder / "config.json").stat().st_mtime_ns
    assert main(["export", str(run), str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {folder} is there already: name a folder that is not\n"
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "x")]) == 2
    assert "is an export, which is no run: name the run that it was made of" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_disk_that_refuses_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ctxkv_lightning.export.model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match="No space"):
        export_run(run, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
