"""GPT-2's embedding table: which tensor of which file, and what is said where there is none."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import embedding, hub
from ctxkv_lightning.text.embedding import gpt2_table

V, D = 7, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(embedding, "GPT2_SHAPE", (V, D))


@pytest.fixture
def table():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that is out of reach, and an empty cache of it."""
    import huggingface_hub

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nand more")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    return monkeypatch


def saved(path, **tensors):
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize("name", ["wte__weight", "transformer__wte__weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_table_is_read_as_it_is(tmp_path, table, name, dtype):
    path = saved(tmp_path / "a.safetensors", **{name: table.to(dtype), "wpe__weight": torch.zeros(3, D)})
    read = gpt2_table(path)
    assert read.dtype == torch.float32
    assert torch.equal(read, table.to(dtype).float())


def test_no_other_tensor_is_read(tmp_path, table):
    path = saved(tmp_path / "a.safetensors", wte__weight=table, zzz=torch.zeros(1000))
    asked = []

    class Watched:
        def __init__(self, *arguments, **options):
            self.file = embedding_open(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *reason):
            return self.file.__exit__(*reason)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            asked.append(name)
            return self.file.get_tensor(name)

    embedding_open = embedding.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "safe_open", Watched)
        assert torch.equal(gpt2_table(path), table)
    assert asked == ["wte.weight"]


def test_home_is_expanded(tmp_path, monkeypatch, table):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "a.safetensors", wte__weight=table)
    assert torch.equal(gpt2_table("~/a.safetensors"), table)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"wpe__weight": torch.zeros(V, D)}, r"has no tensor wte\.weight or transformer\.wte\.weight"),
        ({"wte__weight": torch.zeros(V + 1, D)}, r"wte\.weight of shape \(8, 4\), but embedding=gpt2 needs \(7, 4\)"),
        ({"wte__weight": torch.zeros(V * D)}, r"of shape \(28,\)"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        gpt2_table(saved(tmp_path / "a.safetensors", **tensors))
    assert "embedding.file=" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 100])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin is not a readable safetensors file") as caught:
        gpt2_table(str(tmp_path / "a.bin"))
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused(tmp_path, table):
    path = tmp_path / "a.safetensors"
    saved(path, wte__weight=table)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        gpt2_table(str(path))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.safetensors does not exist: 'python -m ctxkv_lightning fetch FOLDER'"):
        gpt2_table(str(tmp_path / "no.safetensors"))
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        gpt2_table(str(tmp_path))


def test_without_a_file_it_comes_from_the_hub(tmp_path, no_hub, table):
    path = saved(tmp_path / "a.safetensors", wte__weight=table)
    asked = []
    no_hub.setattr("huggingface_hub.hf_hub_download", lambda *what: asked.append(what) or path)
    assert torch.equal(gpt2_table(), table)
    assert asked == [(hub.GPT2, "model.safetensors")]


def test_what_the_cache_holds_needs_no_hub(tmp_path, no_hub, table):
    path = saved(tmp_path / "a.safetensors", wte__weight=table)
    no_hub.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: path)
    assert torch.equal(gpt2_table(None), table)


def test_out_of_reach_is_one_sentence_with_the_command_that_fetches(no_hub):
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    with pytest.raises(UserError, match=r"model\.safetensors of .* cannot be had .*LocalEntryNotFoundError") as caught:
        gpt2_table()
    assert "\n" not in str(caught.value)
    assert "'python -m ctxkv_lightning fetch FOLDER'" in str(caught.value)
    assert logging.get_verbosity() == before


def test_the_table_can_be_handed_to_numpy(tmp_path, table):
    read = gpt2_table(saved(tmp_path / "a.safetensors", wte__weight=table))
    np.testing.assert_array_equal(read.numpy(), table.numpy())
