"""A tokenizer that is kept comes back the same, or not at all."""

import json

import pytest
import tiktoken

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text.encoding import open_encoding, save_encoding, token_bytes
from ctxkv_lightning.text.tokenizer import fingerprint, learn_bpe

TEXT = "The quick brown fox, naïve and 🙂, jumps over the lazy dog; the dog does not mind the fox.\n" * 3


@pytest.fixture
def learnt():
    return learn_bpe([TEXT], 300)


def with_specials():
    """An encoding as tiktoken's own are: special tokens, a gap between the ids, another pattern."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("own", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|end|>": 260})


@pytest.mark.parametrize("kind", ["learnt", "specials"])
def test_it_comes_back_as_it_was(kind, learnt, tmp_path):
    encoding = learnt if kind == "learnt" else with_specials()
    save_encoding(encoding, tmp_path / "tokenizer")
    again = open_encoding(tmp_path / "tokenizer")
    assert fingerprint(again) == fingerprint(encoding)
    assert (again.n_vocab, again.name) == (encoding.n_vocab, encoding.name)
    assert again.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["encoding.json", "ranks.tiktoken", "tokenizer"]


def test_one_that_is_there_stays(learnt, tmp_path):
    save_encoding(learnt, tmp_path / "tokenizer")
    save_encoding(with_specials(), tmp_path / "tokenizer")
    assert fingerprint(open_encoding(tmp_path / "tokenizer")) == fingerprint(learnt)


def test_bytes_of_every_token(learnt):
    pieces = token_bytes(learnt)
    assert pieces == [learnt.decode_single_token_bytes(token) for token in range(learnt.n_vocab)]
    gaps = token_bytes(with_specials())
    assert gaps[255:] == [b"\xff", b"", b"", b"", b"", b"<|end|>"]


def damage(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ranks.tiktoken", lambda text: text.rsplit("\n", 2)[0] + "\n", "damaged"),
        ("ranks.tiktoken", lambda text: "x y z\n" + text, "cannot be read"),
        ("ranks.tiktoken", lambda text: "é" + text, "cannot be read"),
        ("encoding.json", lambda text: text[:-5], "cannot be read"),
        ("encoding.json", lambda text: "[]", "cannot be read"),
        ("encoding.json", lambda text: json.dumps({**json.loads(text), "pattern": "("}), "cannot be read"),
        ("encoding.json", lambda text: json.dumps({**json.loads(text), "pattern": "x"}), "damaged"),
        ("encoding.json", lambda text: json.dumps({**json.loads(text), "special_tokens": {"a": 999}}), "damaged"),
    ],
)
def test_a_damaged_one_is_refused(name, change, message, learnt, tmp_path):
    save_encoding(learnt, tmp_path / "tokenizer")
    damage(tmp_path / "tokenizer", name, change)
    with pytest.raises(UserError, match=message):
        open_encoding(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["ranks.tiktoken", "encoding.json"])
def test_a_missing_one_is_named(name, learnt, tmp_path):
    save_encoding(learnt, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).unlink()
    with pytest.raises(UserError, match=f"no tokenizer in .*{name} is missing"):
        open_encoding(tmp_path / "tokenizer")


def test_a_folder_that_cannot_be_written_is_one_sentence(learnt, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        save_encoding(learnt, tmp_path / "file" / "tokenizer")
