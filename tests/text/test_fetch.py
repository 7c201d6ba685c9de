"""What a machine without network needs, fetched once."""

import json
import os
import shlex

import pytest
import tiktoken
import torch
from safetensors import safe_open

from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import fetch
from ctxkv_lightning.text.tokenizer import load_encoding
from tests.conftest import SHARED_DATA
from tests.text.stand_ins import Network, conversation

pytestmark = pytest.mark.skipif(not SHARED_DATA.exists(), reason="GPT-2's tokenizer of shared/data is not here")
ORIGIN = {"dataset": "a/b", "split": "train"}


@pytest.fixture
def network(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "somewhere/else")
    return Network(tmp_path / "hub", monkeypatch)


def arguments_of(line):
    """The command line's environment variable, and its arguments as a shell hands them on."""
    variable, python, script, *arguments = shlex.split(line)
    assert (python, script) == ("python", "train.py")
    return variable.split("=", 1), arguments


def test_all_three_are_fetched_once(tmp_path, network):
    folder = tmp_path / "all"
    lines = fetch.fetch(folder, **ORIGIN, records=60)
    assert network.fetched == ["data", "table", "tokenizer", "tokenizer"]
    assert len((folder / "ultrachat.jsonl").read_text().splitlines()) == 60
    assert json.loads((folder / "ultrachat.jsonl").read_text().splitlines()[59]) == conversation(59)
    with safe_open(folder / "gpt2.safetensors", "pt") as table, safe_open(network.weights, "pt") as weights:
        assert list(table.keys()) == ["wte.weight"]
        assert torch.equal(table.get_tensor("wte.weight"), weights.get_tensor("wte.weight"))
    for name in os.listdir(SHARED_DATA / "tiktoken_cache"):
        assert (folder / "tiktoken" / name).read_bytes() == (SHARED_DATA / "tiktoken_cache" / name).read_bytes()
    expected = ["fetched.json", "gpt2.safetensors", "tiktoken", "ultrachat.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "somewhere/else"
    assert fetch.fetch(folder, **ORIGIN, records=60) == lines
    assert len(network.fetched) == 4


@pytest.mark.parametrize(
    ("name", "again"),
    [("ultrachat.jsonl", ["data"]), ("gpt2.safetensors", ["table"]), ("fetched.json", ["data", "table"])],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_is_damaged_or_missing_is_fetched_again(tmp_path, network, name, again, damage):
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    network.fetched.clear()
    path = tmp_path / "all" / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[:-3])
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    assert network.fetched == again
    assert path.read_bytes() == content


def test_a_damaged_file_of_the_tokenizer_is_fetched_again(tmp_path, network):
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    network.fetched.clear()
    path = next((tmp_path / "all" / "tiktoken").iterdir())
    path.write_bytes(b"x")
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    assert network.fetched == ["tokenizer"]


@pytest.mark.parametrize("other", [{"records": 21}, {"split": "test"}, {"dataset": "c/d"}])
def test_other_conversations_are_fetched_anew(tmp_path, network, other):
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    network.fetched.clear()
    fetch.fetch(tmp_path / "all", **{**ORIGIN, "records": 20, **other})
    assert network.fetched == ["data"]


@pytest.mark.parametrize("what", ["data", "table", "tokenizer"])
def test_without_a_network_each_failure_is_one_sentence_and_goes_on_later(tmp_path, network, what):
    network.down = {what}
    with pytest.raises(UserError) as caught:
        fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    assert "\n" not in str(caught.value)
    assert "'python -m ctxkv_lightning fetch FOLDER'" in str(caught.value)
    assert not [path for path in (tmp_path / "all").rglob(".*") if path.is_file()]
    assert (tmp_path / "all").exists() == (what != "data"), "what was fetched stays, an empty folder does not"
    done, network.down = len(network.fetched), set()
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    assert len(network.fetched) == 4 >= done


def test_fewer_records_than_asked_for_are_refused(tmp_path, network):
    with pytest.raises(UserError, match=r"a/b, data\.split=train has 200 records, 201 were asked for"):
        fetch.fetch(tmp_path / "all", **ORIGIN, records=201)
    assert not (tmp_path / "all" / "ultrachat.jsonl").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, network):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/all cannot be written .*name another folder"):
        fetch.fetch(tmp_path / "file" / "all", **ORIGIN)


@pytest.mark.parametrize("name", ["plain", "two words", "it's, [odd] {a} ☃", 'with "quotes"', "~tilde=1"])
def test_the_command_survives_a_shell_and_hydra(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (name_of, value), arguments = arguments_of(fetch.command(tmp_path / name))
    assert (name_of, value) == ("TIKTOKEN_CACHE_DIR", str(tmp_path / name / "tiktoken"))
    (config,) = check_command_line(arguments)
    assert config.data.files == [str(tmp_path / name / "ultrachat.jsonl")]
    assert config.embedding.file == str(tmp_path / name / "gpt2.safetensors")
    assert (config.data.source, config.embedding.source, config.tokenizer.name) == ("jsonl", "gpt2", "gpt2")
    assert (config.data.validation, config.data.test) == ([50_000, 50_020], [50_020, 50_040])


def test_of_fewer_records_the_command_holds_the_last_ones_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = check_command_line(arguments_of(fetch.command(tmp_path, 60))[1])
    assert (config.data.validation, config.data.test) == ([48, 54], [54, 60])


def test_a_relative_folder_is_named_in_full(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fetch.fetch(fetch.Path("all"), **ORIGIN, records=20)[-1]
    assert f"data.files=[{tmp_path}/all/ultrachat.jsonl]" in arguments_of(line)[1]
    assert fetch.RECORDS == 50_040


def test_the_tokenizer_in_the_folder_is_gpt2s(tmp_path, network, monkeypatch):
    fetch.fetch(tmp_path / "all", **ORIGIN, records=20)
    network.down = {"tokenizer"}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "all" / "tiktoken"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert load_encoding("gpt2").encode_ordinary("Hello world") == [15496, 995]
