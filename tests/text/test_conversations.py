"""Conversations in the order of their data set."""

import itertools
import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.store import Store
from ctxkv_lightning.text.conversations import from_files, from_hub, records_needed
from tests.text.stand_ins import DataSet, conversation, text


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(corpus):
    return [[document.text for document in part] for part in (corpus.train, corpus.validation, corpus.test)]


@pytest.fixture
def hub(monkeypatch):
    import datasets

    local = datasets.load_dataset

    def put(*arguments):
        stand_in = DataSet(local, *arguments)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        return stand_in

    return put


@pytest.mark.parametrize("samples", [1, 3, 4, 5, 9, None])
@pytest.mark.parametrize(("validation", "test"), [([4, 6], [6, 7]), ([0, 2], [8, 9]), ([7, 8], [1, 4])])
def test_ranges_are_held_out_and_the_first_others_train(tmp_path, samples, validation, test):
    files = [write(tmp_path / "b.jsonl", map(conversation, range(5)))]
    files += [write(tmp_path / "a.jsonl", map(conversation, range(5, 14)))]
    corpus = from_files(files, samples, validation, test)
    others = [n for n in range(14) if n not in range(*validation) and n not in range(*test)]
    expected = [others if samples is None else others[:samples], range(*validation), range(*test)]
    assert texts(corpus) == [[text(number) for number in part] for part in expected]
    assert corpus.train_separator == ""
    assert corpus.train[0].name.startswith(files[0] + ":")


@settings(max_examples=300, deadline=None)
@given(st.none() | st.integers(1, 12), *[st.tuples(st.integers(0, 9), st.integers(1, 5))] * 2)
def test_records_needed_is_the_smallest_prefix_that_holds_all(samples, one, other):
    validation, test = ([first, first + width] for first, width in (one, other))
    held = {*range(*validation), *range(*test)}
    assume(len(held) == one[1] + other[1])
    if samples is None:
        assert records_needed(samples, validation, test) is None
        return
    enough = (
        n for n in itertools.count() if held <= set(range(n)) and len(set(range(n)) - held) >= samples
    )  # fmt: skip
    assert records_needed(samples, validation, test) == next(enough)


def test_lines_that_are_not_needed_may_be_broken(tmp_path):
    lines = [json.dumps(conversation(number)) for number in range(8)]
    lines[3] = lines[7] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(from_files([str(tmp_path / "a.jsonl")], 3, [4, 5], [5, 7]))[0] == [text(n) for n in range(3)]
    with pytest.raises(UserError, match=r"a\.jsonl, line 4 is not JSON"):
        from_files([str(tmp_path / "a.jsonl")], 4, [4, 5], [5, 7])


def test_blank_lines_are_no_records_but_blank_conversations_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n \n{"text": "b"}\n{"text": "c"}\n{"text": "d"}')
    assert texts(from_files([str(tmp_path / "*.jsonl")], 2, [2, 3], [3, 4])) == [["a", ""], ["b"], ["c"]]


@pytest.mark.parametrize("count", [3, 14, 300])
def test_too_few_records_are_counted_and_ranges_that_fit_are_named(tmp_path, count):
    files = [write(tmp_path / "a.jsonl", map(conversation, range(count)))]
    with pytest.raises(UserError, match=rf"data\.files has {count} records, too few for data\.validation=") as caught:
        from_files(files, 1, [50_000, 50_020], [50_020, 50_040])
    assert "\n" not in str(caught.value)
    named = dict(re.findall(r"data\.(validation|test)=(\[\d+,\d+\])", str(caught.value)))
    validation, test = (json.loads(named[name]) for name in ("validation", "test"))
    corpus = from_files(files, 1, validation, test)
    assert 1 <= len(corpus.validation) == len(corpus.test) <= 20


@pytest.mark.parametrize(
    ("count", "validation", "test"), [(2, [0, 1], [1, 2]), (2, [1, 2], [2, 3]), (4, [0, 2], [2, 4])]
)
def test_something_must_be_left_to_train_on(tmp_path, count, validation, test):
    with pytest.raises(UserError, match=r"too few for .* something left to train on: .*add records"):
        from_files([write(tmp_path / "a.jsonl", map(conversation, range(count)))], 1, validation, test)


def test_only_jsonl_files_have_records(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is not a \.jsonl file: choose data=text"):
        from_files([str(tmp_path / "a.txt")], 1, [1, 2], [2, 3])
    with pytest.raises(UserError, match=r"no file matches no\.jsonl"):
        from_files(["no.jsonl"], 1, [1, 2], [2, 3])


@pytest.mark.parametrize(
    ("samples", "read"), [(100, 5_040), (4_999, 5_040), (5_000, 5_040), (5_001, 5_041), (6_000, 6_040), (None, 7_000)]
)
def test_of_a_data_set_no_more_is_read_than_needed(tmp_path, hub, samples, read):
    stand_in = hub(7_000)
    corpus = from_hub("a/b", "train", samples, [5_000, 5_020], [5_020, 5_040], cache_dir=tmp_path)
    assert stand_in.calls == [(("a/b",), {"split": "train", "streaming": True})]
    assert stand_in.read == read
    train = [n for n in range(7_000) if not 5_000 <= n < 5_040][:samples]
    assert texts(corpus) == [[text(n) for n in part] for part in (train, range(5_000, 5_020), range(5_020, 5_040))]


def test_a_data_set_is_downloaded_once(tmp_path, hub):
    ranges = ([50, 52], [52, 54])
    first = from_hub("a/b", "train", 10, *ranges, cache_dir=tmp_path)
    again = hub(0)
    assert from_hub("a/b", "train", 10, *ranges, cache_dir=tmp_path) == first
    assert len(from_hub("a/b", "train", 30, *ranges, cache_dir=tmp_path).train) == 30
    assert again.calls == []
    with pytest.raises(UserError, match=r"data\.dataset=a/b, data\.split=test has no records"):
        from_hub("a/b", "test", 10, *ranges, cache_dir=tmp_path)


@pytest.fixture(autouse=True)
def _some_hub(hub):
    """No test may reach for the real one."""
    hub(100)


def test_what_a_data_set_gives_is_what_files_of_it_give(tmp_path):
    online = from_hub("a/b", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path)
    path = write(tmp_path / "a.jsonl", map(conversation, range(60)))
    assert texts(online) == texts(from_files([path], 10, [50, 52], [52, 54]))


def test_a_data_set_with_too_few_records_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.dataset=a/b has 100 records, too few for .*data\.test=\[90,100\]"):
        from_hub("a/b", "train", 1, [100, 120], [120, 140], cache_dir=tmp_path)


@pytest.mark.parametrize("fails_at", [0, 30])
def test_out_of_reach_is_one_sentence_and_leaves_no_store(tmp_path, hub, fails_at):
    hub(100, fails_at)
    with pytest.raises(
        UserError,
        match=r"data\.dataset=a/b, data\.split=train cannot be had .*ConnectionError: Couldn't reach it\).*fetch",
    ) as caught:
        from_hub("a/b", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "ctxkv_lightning fetch FOLDER" in str(caught.value)
    assert not list(tmp_path.rglob("*.jsonl"))
    hub(100)
    assert len(from_hub("a/b", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path).train) == 10


def test_without_a_network_datasets_itself_becomes_a_sentence(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing.* cannot be had .*fetch FOLDER"):
        from_hub("nobody/nothing", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path)


def test_records_of_another_shape_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [conversation(0), {"prompt": "p"}])
    with pytest.raises(UserError, match=r"data\.dataset=a/b, record 1 has neither a `text` nor `messages`"):
        from_hub("a/b", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path)


def test_the_store_keeps_what_is_read_and_nothing_else(tmp_path):
    from_hub("a/b", "train", 10, [50, 52], [52, 54], cache_dir=tmp_path)
    (path,) = tmp_path.glob("conversations/*/conversations.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [conversation(n) for n in range(54)]
    assert Store.open(path.parent).facts == {"records": 54}
