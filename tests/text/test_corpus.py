"""Documents in; training, validation and test documents out."""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import corpus
from ctxkv_lightning.text.corpus import Corpus, Document, pydocs_state, read_pydocs, split

LOREM = "It was a bright cold day in April, and the clocks were striking thirteen.\n"


def size(documents):
    return sum(len(document.text.encode()) for document in documents)


def book(count, bytes_each=100):
    """`count` different documents of `bytes_each` bytes."""
    return [Document(f"d{i}", f"{i:06d} ".ljust(bytes_each - 1, "x") + "\n") for i in range(count)]


def streams(parts: Corpus):
    return parts.train, parts.validation, parts.test


@pytest.fixture(scope="module")
def pydocs():
    return read_pydocs()


def test_pydocs_are_about_600_documents_of_english(pydocs):
    assert 400 <= len(pydocs) <= 800
    assert 1_500_000 <= size(pydocs) <= 3_000_000
    assert sum(document.name.startswith("topic ") for document in pydocs) > 60
    words = " ".join(document.text for document in pydocs).split()
    assert words.count("the") / len(words) > 0.03


def test_pydocs_hold_each_text_once_and_leave_tests_and_vendored_code_out(pydocs):
    names = [document.name for document in pydocs]
    assert len(set(names)) == len({document.text for document in pydocs}) == len(pydocs)
    forbidden = {"test", "tests", "idle_test", "_bundled", "_vendor", "pip", "pytest", "numpy"}
    assert not [name for name in names if forbidden & set(name.split("."))]
    assert all(document.text == document.text.strip() for document in pydocs)
    assert {"json.decoder", "argparse", "topic assert"} <= set(names)


def test_pydocs_are_always_the_same_and_import_nothing(pydocs):
    loaded = set(sys.modules)
    assert read_pydocs() == pydocs
    assert not (set(sys.modules) - loaded) & {document.name for document in pydocs}
    assert "antigravity" not in sys.modules


def test_modules_are_those_that_a_look_at_every_path_finds():
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "turtledemo", "_bundled", "encodings", "pydoc_data"}
    expected = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and not left_out & set(parts):
            expected.append((path, ".".join(parts).removesuffix(".__init__")))
    assert corpus._stdlib_modules(root) == expected


def test_the_state_of_pydocs_changes_with_any_file_that_is_read_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    files = ["pydoc_data/topics.py", "a.py", "package/b.py", "test/c.py", "site-packages/d.py", "no-name.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""About {name}."""')
    assert [name for _, name in corpus._stdlib_modules(tmp_path)] == ["a", "package.b"]
    told = []
    for name in files:
        before = pydocs_state()
        os.utime(tmp_path / name, ns=(1, 1))
        told.append(pydocs_state() != before)
    assert told == [True, True, True, False, False, False]
    before = pydocs_state()
    assert pydocs_state() == before
    (tmp_path / "new.py").touch()
    assert pydocs_state() != before
    monkeypatch.setattr(corpus.sys, "version", "4.0")
    assert pydocs_state()["python"] == "4.0"


def test_docstrings_stand_under_headings_in_source_order_once(tmp_path):
    source = tmp_path / "m.py"
    source.write_text(
        '"""About m."""\n'
        "def first(a, *, b=1):\n    '''One.\n\n        Indented.\n    '''\n"
        "if True:\n    class Box(dict):\n        '''A box.'''\n"
        "        async def open(self):\n            '''Opens.'''\n"
        "def silent(): pass\n"
        "def again():\n    '''A box.'''\n"
    )
    text = corpus._docstrings(source, "m", seen := set())
    assert text.split("\n\n") == [
        *("m", "About m.", "first(a, *, b=1)", "One.", "Indented."),
        *("class Box(dict)", "A box.", "Box.open(self)", "Opens."),
    ]
    assert corpus._docstrings(source, "copy", seen) == ""


def test_broken_source_has_no_documentation(tmp_path):
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "bytes.py").write_bytes(b"'''\xff'''")
    assert corpus._docstrings(tmp_path / "bad.py", "bad", set()) == ""
    assert corpus._docstrings(tmp_path / "bytes.py", "bytes", set()) == ""


def test_heldout_streams_have_the_size_asked_for(pydocs):
    parts = split(pydocs, 100_000)
    assert 90_000 <= size(parts.validation) <= 110_000
    assert 90_000 <= size(parts.test) <= 110_000
    assert sorted(sum(streams(parts), ())) == pydocs


def test_heldout_streams_are_a_tenth_at_most():
    parts = split(book(200), 10**9)
    # Filled in order up to the tolerance, then left alone: no hunting for small documents that still fit.
    assert size(parts.validation) == size(parts.test) == 1_800


def test_split_ignores_order_names_and_samples():
    documents = book(300)
    parts = split(documents, 1_000)
    assert split(reversed(documents), 1_000) == parts
    moved = split([Document("/elsewhere/" + name, text) for name, text in documents], 1_000)
    assert [[document.text for document in stream] for stream in streams(moved)] == [
        [document.text for document in stream] for stream in streams(parts)
    ]
    assert parts.first(7) == parts.first(None)[:7] == parts.train[:7]
    assert parts.first(None) == parts.train
    assert [document.name for document in parts.train] != sorted(document.name for document in parts.train)


def test_documents_come_in_the_order_of_their_sha256():
    parts = split(book(30), 10**9)
    order = sorted(book(30), key=lambda document: hashlib.sha256(document.text.encode()).hexdigest())
    assert list(parts.validation + parts.test + parts.train) == order


def test_a_text_that_occurs_twice_cannot_be_both_trained_on_and_held_out():
    documents = book(40) + [Document("copy of " + name, text) for name, text in book(40)]
    parts = split(documents, 400)
    texts = [document.text for document in sum(streams(parts), ())]
    assert sorted(texts) == sorted(document.text for document in book(40))


def test_more_samples_than_documents_names_both_counts():
    parts = split(book(100), 500)
    available = len(parts.train)
    assert len(parts.first(available)) == available
    with pytest.raises(
        UserError, match=rf"samples={available + 1}, but .* {available} training .*samples={available} "
    ):
        parts.first(available + 1)


def test_documents_larger_than_the_target_still_give_every_stream_one():
    documents = [*book(30, 5_000), Document("small", "s" * 900), Document("smaller", "t" * 800)]
    parts = split(documents, 100)
    assert [document.name for document in parts.validation + parts.test] == ["smaller", "small"]


def test_one_book_is_cut_at_line_ends():
    text = "".join(f"{i} {LOREM}" for i in range(1_000))
    parts = split([Document("book", text)], 100_000)
    pieces = sorted(sum(streams(parts), ()), key=lambda document: int(document.name.split("#")[1]))
    assert [document.name for document in pieces] == [f"book#{i}" for i in range(1, 21)]
    assert "".join(document.text for document in pieces) == text
    assert all(document.text.endswith("\n") for document in pieces)
    assert max(map(len, (document.text for document in pieces))) < 1.1 * len(text) / 20
    assert [len(stream) for stream in (parts.validation, parts.test)] == [2, 2]


def test_a_line_without_end_is_cut_between_words_or_anywhere():
    words = split([Document("words", "word " * 2_000)], 10**9)
    assert all(document.text.endswith("word ") for document in sum(streams(words), ()))
    letters = split([Document("letters", "é" * 5_000)], 10**9)
    assert sorted(len(document.text) for document in sum(streams(letters), ())) == [250] * 20


def test_few_documents_are_cut_in_proportion():
    documents = [Document("long", LOREM * 300), Document("short", "Only a line.\n")]
    names = [document.name for document in sum(streams(split(documents, 10**9)), ())]
    assert "short" in names
    assert 15 <= sum(name.startswith("long#") for name in names) <= 25


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["ab"], ["a", "a", "a"]])
def test_too_little_text_for_three_streams(texts):
    with pytest.raises(UserError, match="too little for training, validation and test"):
        split([Document(str(i), text) for i, text in enumerate(texts)], 100)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=30, unique=True), st.integers(2, 500))
def test_nothing_is_lost_and_no_stream_is_empty(texts, heldout_bytes):
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    try:
        parts = split(documents, heldout_bytes)
    except UserError:
        assert len("".join(texts)) < 20
        return
    assert all(streams(parts))
    whole: dict[str, str] = {}
    for name, text in sorted(sum(streams(parts), ()), key=lambda document: int((document.name + "#0").split("#")[1])):
        assert text
        whole[name.split("#")[0]] = whole.get(name.split("#")[0], "") + text
    assert whole == {name: text for name, text in documents if text}
