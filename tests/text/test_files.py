"""The user's own files in, documents out."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import files
from ctxkv_lightning.text.corpus import Document, split
from ctxkv_lightning.text.files import read_files
from tests.conftest import SHARED_DATA


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, an empty home, and no network."""
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)

    def refuse(*_):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return work


def write(path: Path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_become_documents_in_a_fixed_order(here, capfd):
    write(here / "b.txt", "\ufeffB\r\n\r\n\r\nb\rend")
    write(here / "a.md", "A\n")
    write(here / "deep/er/c.TXT", "naïve ☃\u2028x")
    write(here / "odd [1] ☃.txt", "odd")
    write(here / "blank.txt", " \n\n")
    write(
        here / "d.jsonl",
        '{"text": "one"}\n\n{"messages": [{"role": "user", "content": "hi", "n": 1}], "id": 3}\n{"text": ""}',
    )
    documents = read_files(["*.txt", "**/*.TXT", "a.*", "*.md", "d.jsonl", "odd [1] ☃.txt", str(here / "b.txt")])
    assert documents == [
        Document("b.txt", "B\n\n\nb\nend"),
        Document("odd [1] ☃.txt", "odd"),
        Document("deep/er/c.TXT".replace("/", os.sep), "naïve ☃\u2028x"),
        Document("a.md", "A\n"),
        Document("d.jsonl:1", "one"),
        Document("d.jsonl:3", "hi"),
    ]
    assert capfd.readouterr() == ("", "")
    assert not list((here.parent / "home").rglob("*"))


def test_reading_tells_nobody(here, monkeypatch):
    import datasets.load

    calls = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", lambda: calls.append("session"))
    write(here / "a.txt", "mine")
    read_files(["a.txt"])
    assert calls == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_home_is_expanded(here):
    write(here.parent / "home/notes/n.txt", "mine")
    assert [document.text for document in read_files(["~/notes/*.txt"])] == ["mine"]


def test_many_files_stay_whole_and_in_order(here, capfd):
    for i in range(40):
        write(here / f"{i:02d}.txt", f"{i}\n\npart two\n")
    assert [document.text for document in read_files(["*.txt"])] == [f"{i}\n\npart two\n" for i in range(40)]
    assert capfd.readouterr() == ("", "")


def test_messages_are_joined_by_one_newline(here):
    write(here / "a.jsonl", json.dumps({"messages": [{"role": r, "content": c} for r, c in ("ua", "ab")]}) + "\n")
    assert read_files(["a.jsonl"])[0].text == "a\nb"


def test_records_may_differ_in_shape(here):
    records = [{"text": "x", "k": 1}, {"text": "y", "k": [1, {"z": None}]}, {"k": "s", "text": "z"}]
    records.append({"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"content": "w"}]})
    write(here / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert [document.text for document in read_files(["a.jsonl"])] == ["x", "y", "z", "w"]


@pytest.mark.parametrize(("errors", "text"), [("replace", "ab\ufffdc"), ("ignore", "abc")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_errors_says_what_becomes_of_invalid_bytes(here, errors, text, name):
    write(here / name, b"ab\xffc" if name == "a.txt" else b'{"text": "ab\xffc"}\n')
    assert read_files([name], errors)[0].text == text


def test_half_a_surrogate_pair_is_an_invalid_byte_too(here):
    write(here / "a.jsonl", '{"text": "ok"}\n{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 .*surrogate.*data\.errors=replace"):
        read_files(["a.jsonl"])
    assert read_files(["a.jsonl"], "replace")[1].text == "a\ufffdb 😀"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.pdf", b"x", r"a\.pdf is not a \.txt, \.md or \.jsonl file"),
        ("a.txt", b"good \xff", r"a\.txt is not valid UTF-8 at byte 5: .*data\.errors=replace"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not valid UTF-8 at byte 10"),
        ("a.txt", b" \n\t\n", r"holds no text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3 is not JSON \(Expecting value\)"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2 has neither a `text` nor `messages`"),
        ("a.jsonl", b'{"text": 3}', r"line 1 has neither"),
        ("a.jsonl", b'["x"]', r"line 1 has neither"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"line 1 has a message whose `content` is not text"),
        ("a.jsonl", b'{"messages": ["hello"]}', r"line 1 has a message whose `content` is not text"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(here, name, content, message):
    write(here / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_files([name])
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(here):
    write(here / "folder/a.txt", "x")
    for pattern, message in [
        ("no.txt", "no file matches no.txt"),
        ("no/**/*.md", "no file matches no/"),
        ("folder", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message.replace("*", r"\*")):
            read_files(["folder/a.txt", pattern])
    with pytest.raises(UserError, match="holds no text"):
        read_files([])


def test_what_datasets_raises_becomes_a_sentence(here, monkeypatch):
    import datasets

    write(here / "a.txt", "x")
    was_quiet = datasets.are_progress_bars_disabled()

    def fail(*_, **__):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"datasets cannot read a\.txt") as caught:
        read_files(["a.txt"])
    assert "\n" not in str(caught.value)
    assert datasets.are_progress_bars_disabled() == was_quiet


@pytest.mark.skipif(not (SHARED_DATA / "ultrachat_sample.jsonl").exists(), reason="shared/data is not here")
def test_ultrachat_conversations():
    path = SHARED_DATA / "ultrachat_sample.jsonl"
    documents = read_files([str(path)])
    assert len(documents) == 1000
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[122])
    assert documents[122].text == "\n".join(message["content"] for message in record["messages"])
    parts = split(documents, 100_000)
    held = [sum(len(document.text.encode()) for document in part) for part in (parts.validation, parts.test)]
    assert all(90_000 <= size <= 110_000 for size in held)
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 1000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=8).map(str.encode), st.binary(max_size=4), st.integers(1, 5))
def test_the_first_invalid_byte_is_found_whatever_the_blocks(tmp_path, monkeypatch, good, doubtful, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    content = good + doubtful + good
    try:
        expected = content.decode() and None
    except UnicodeDecodeError as error:
        expected = error.start
    write(tmp_path / "a.txt", content)
    assert files._invalid_byte(tmp_path / "a.txt") == (expected if expected != "" else None)


def test_lines_are_read_as_they_are_asked_for(here):
    write(here / "a.jsonl", '\n{"text": "one"}\n{broken\n')
    lines = files.record_lines(Path("a.jsonl"), "strict")
    assert next(lines) == (Path("a.jsonl"), 2, '{"text": "one"}')
    assert files.parse_record(Path("a.jsonl"), 2, '{"text": "one"}', "strict") == Document("a.jsonl:2", "one")
    lines.close()
