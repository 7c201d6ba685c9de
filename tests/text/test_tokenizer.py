"""Text to ids and back."""

import base64
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import tokenizer
from ctxkv_lightning.text.corpus import SEPARATOR, read_pydocs
from ctxkv_lightning.text.tokenizer import (
    encode_documents,
    fingerprint,
    learn_bpe,
    load_encoding,
    load_ranks,
    save_ranks,
)

CACHE = Path(__file__).parents[3] / "shared" / "data" / "tiktoken_cache"


@pytest.fixture(scope="module")
def pydocs():
    return [document.text for document in read_pydocs()]


@pytest.fixture(scope="module")
def texts(pydocs):
    return pydocs[:120]


@pytest.fixture(scope="module")
def learnt(texts):
    return learn_bpe(texts, 2_000)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty tiktoken cache, nothing loaded yet, and no network."""

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def test_ids_are_contiguous_bytes_first(learnt):
    assert learnt.n_vocab == 2_000
    tokens = [learnt.decode_single_token_bytes(i) for i in range(2_000)]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens)) == 2_000
    assert b" the" in tokens
    assert learnt.special_tokens_set == set()


def test_every_merge_joins_two_earlier_tokens(learnt):
    rank = learnt._mergeable_ranks
    for token, position in rank.items():
        if len(token) > 1:
            splits = ((rank.get(token[:i]), rank.get(token[i:])) for i in range(1, len(token)))
            assert any(a is not None and b is not None and max(a, b) < position for a, b in splits), token


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_round_trip(learnt, content):
    assert learnt.decode_bytes(learnt._encode_bytes(content)) == content
    assert learnt.decode_bytes([learnt.encode_single_token(bytes([byte])) for byte in content]) == content


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_round_trips(learnt, text):
    ids = learnt.encode_ordinary(text)
    assert learnt.decode_bytes(ids) == text.encode()
    assert learnt.decode(ids) == text


def test_the_same_texts_give_the_same_encoding(texts, learnt):
    assert fingerprint(learn_bpe(iter(texts), 2_000)) == fingerprint(learnt)
    assert fingerprint(learn_bpe(texts[1:], 2_000)) != fingerprint(learnt)


def test_tiktoken_cuts_as_the_library_that_learnt(pydocs, texts, learnt):
    theirs, byte_of = tokenizer._train(texts, 2_000), tokenizer._byte_alphabet()
    for text in [*texts[:40], *pydocs[400:440], "I'm naïve: 1234 ☃☃\n\n\t  x   \n", "ＦＵＬＬ　ｗｉｄｔｈ 中文 עברית"]:
        expected = [bytes(map(byte_of.__getitem__, token)) for token in theirs.encode(text).tokens]
        assert learnt.decode_tokens_bytes(learnt.encode_ordinary(text)) == expected


def test_byte_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(tokenizer._byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(tokenizer._byte_alphabet().values()) == list(range(256))
    shown = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\x00 \n\x7f\xadé")[0][0]
    assert bytes(map(tokenizer._byte_alphabet().__getitem__, shown)) == "\x00 \n\x7f\xadé".encode()


def test_a_token_made_by_two_merges_has_the_rank_of_the_first():
    ranks = tokenizer._ranks([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("abc", "d")])
    assert list(ranks.items())[256:] == [(b"bc", 256), (b"ab", 257), (b"abc", 258), (b"abcd", 259)]


@pytest.mark.parametrize("small", [[], [""], ["abc"], ["aa aa"]])
def test_small_texts_give_fewer_tokens(small):
    encoding = learn_bpe(small, 1_000)
    assert 256 <= encoding.n_vocab < 260
    assert encoding.decode(encoding.encode_ordinary("naïve ☃")) == "naïve ☃"


def test_learning_prints_nothing(texts, capfd):
    learn_bpe(texts[:5], 300)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not CACHE.is_dir(), reason="shared/data/tiktoken_cache is not here")
def test_gpt2(offline, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    gpt2 = load_encoding("gpt2")
    assert gpt2.n_vocab == 50_257
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    # Text that looks like a special token is text.
    assert list(encode_documents(gpt2, ["<|endoftext|>"])) == [27, 91, 437, 1659, 5239, 91, 29]
    with pytest.raises(ValueError, match="not learnt"):
        save_ranks(gpt2, offline / "gpt2.tiktoken")


@pytest.mark.parametrize(("name", "guess"), [("gpt3", "gpt2"), ("cl100k", "cl100k_base"), ("o200kbase", "o200k_base")])
def test_unknown_name_is_answered_with_the_nearest(name, guess):
    with pytest.raises(UserError, match=rf"{name} is not an .*did you mean {guess}\?.*: it has .*r50k_base"):
        load_encoding(name)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(UserError, match=r"zzz is not an encoding of tiktoken: it has gpt2, "):
        load_encoding("zzz")


@pytest.mark.parametrize("name", ["gpt2", "p50k_base"])
def test_without_files_or_network_the_folder_is_named(offline, name):
    start = time.monotonic()
    with pytest.raises(
        UserError, match=rf"encoding {name} are not in TIKTOKEN_CACHE_DIR={offline}.*ConnectionError"
    ) as caught:
        load_encoding(name)
    assert time.monotonic() - start < 5
    assert "http" not in str(caught.value)


def test_without_a_folder_the_variable_is_named(offline, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(offline))
    with pytest.raises(
        UserError, match=r"TIKTOKEN_CACHE_DIR, which is not set, .*set TIKTOKEN_CACHE_DIR to the folder"
    ):
        load_encoding("r50k_base")


def test_a_download_that_hangs_is_given_up(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(tokenizer, "FETCH_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: release.wait(10))
    with pytest.raises(UserError, match="TimeoutError"):
        load_encoding("gpt2")
    release.set()


def test_saved_ranks_are_tiktokens_own_format(learnt, tmp_path):
    from tiktoken.load import load_tiktoken_bpe

    path = tmp_path / "learnt.tiktoken"
    save_ranks(learnt, path)
    first, last = path.read_text().splitlines()[0], path.read_text().splitlines()[-1]
    assert first == "AA== 0"
    assert base64.b64decode(last.split()[0]) == learnt.decode_single_token_bytes(1_999)
    assert load_tiktoken_bpe(str(path)) == learnt._mergeable_ranks
    loaded = load_ranks(path)
    assert fingerprint(loaded) == fingerprint(learnt)
    assert loaded.encode_ordinary("The standard library.") == learnt.encode_ordinary("The standard library.")


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:100],
        lambda lines: [*lines[:-1], lines[-1][:-9]],
        lambda lines: [*lines[:300], *lines[301:]],
        lambda lines: [*lines[:255], "!! 255", *lines[256:]],
        lambda lines: ["AAAA 0", *lines[1:]],
    ],
)
def test_damaged_ranks_are_refused(learnt, tmp_path, damage):
    path = tmp_path / "learnt.tiktoken"
    save_ranks(learnt, path)
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=r"learnt\.tiktoken is"):
        load_ranks(path)


def test_missing_ranks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no\.tiktoken is not a readable"):
        load_ranks(tmp_path / "no.tiktoken")


def test_fingerprint_knows_ranks_pattern_and_specials_but_no_name(learnt):
    parts = {"pat_str": learnt._pat_str, "mergeable_ranks": learnt._mergeable_ranks, "special_tokens": {}}
    assert fingerprint(tiktoken.Encoding("other", **parts)) == fingerprint(learnt)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(learnt))
    changed = [
        {"pat_str": r"\S+|\s+"},
        {"special_tokens": {"<|x|>": 2_000}},
        {"mergeable_ranks": {token: rank for token, rank in learnt._mergeable_ranks.items() if rank < 1_999}},
    ]
    assert (
        len({fingerprint(tiktoken.Encoding("other", **parts | change)) for change in changed} - {fingerprint(learnt)})
        == 3
    )


def test_a_stream_is_its_documents_with_separators_between(texts, learnt):
    stream = encode_documents(learnt, texts)
    assert stream.dtype == np.int32
    assert stream.ndim == 1
    assert learnt.decode(stream.tolist()) == SEPARATOR.join(texts)
    assert len(stream) < 0.5 * len(SEPARATOR.join(texts))


def test_each_document_is_encoded_by_itself(learnt):
    one, two = "It ends\n", "\n  and begins"
    expected = learnt.encode_ordinary(one + SEPARATOR) + learnt.encode_ordinary(two)
    assert encode_documents(learnt, [one, two]).tolist() == expected


@pytest.mark.parametrize("few", [[], [""], ["one"]])
def test_few_documents_have_no_separator(learnt, few):
    stream = encode_documents(learnt, few)
    assert stream.dtype == np.int32
    assert learnt.decode(stream.tolist()) == "".join(few)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_a_million_blanks_do_not_overflow_the_stack(learnt, blank):
    text = "a" + blank * 1_000_001 + "b"
    assert learnt.decode(encode_documents(learnt, [text, text]).tolist()) == text + SEPARATOR + text


def test_only_endless_blanks_are_cut(texts):
    run = " " * (tokenizer.MAX_BLANK_RUN - 1)
    assert list(tokenizer._pieces(f"a{run}b\nc")) == [f"a{run}b\nc"]
    assert [len(piece) for piece in tokenizer._pieces(f"a {run} b")] == [tokenizer.MAX_BLANK_RUN + 1, 2]
    assert all(list(tokenizer._pieces(text)) == [text] for text in texts)
