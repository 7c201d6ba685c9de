"""The recall task's documents are what the task says, by reading them symbol by symbol."""

import numpy as np
import pytest

from ctxkv_lightning.text.corpus import SEPARATOR
from ctxkv_lightning.text.mqar import BLANK, Task, answers, gap_shares, lags, read_mqar, symbol_encoding
from ctxkv_lightning.text.tokenizer import encode_documents

TASKS = [Task(pairs=4, length=32, keys=16, values=20, heldout=30), Task(1, 4, 1, 1, 3), Task(5, 20, 5, 5, 10)]


def is_key(symbol):
    return "一" <= symbol < "가"


def is_value(symbol):
    return symbol >= "가"


def asked(text, task):
    """Of each query in a document, its place, and the place of its key among the pairs; checks the whole document."""
    head, rest = text[: 2 * task.pairs], text[2 * task.pairs :]
    keys, values = head[::2], head[1::2]
    assert all(map(is_key, keys))
    assert all(map(is_value, values))
    assert len(set(keys)) == len(set(values)) == task.pairs
    found, i = [], 0
    while i < len(rest):
        if rest[i] == BLANK:
            i += 1
            continue
        pair = keys.index(rest[i])
        assert rest[i + 1] == values[pair]
        found.append((2 * task.pairs + i, 2 * pair))
        i += 2
    assert sorted(pair for _, pair in found) == list(range(0, 2 * task.pairs, 2))
    return found


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_every_pair_is_asked_for_once_and_its_answer_follows_from_it(task):
    corpus = read_mqar(task, seed=1, samples=40)
    for document in (*corpus.train, *corpus.validation, *corpus.test):
        assert len(document.text) == task.length
        assert len(asked(document.text, task)) == task.pairs


def test_a_seed_gives_its_documents_and_what_is_held_out_is_the_same_for_all():
    task = TASKS[0]
    one, again, other = (read_mqar(task, seed, 50) for seed in (1, 1, 2))
    assert one == again
    assert (one.validation, one.test) == (other.validation, other.test)
    texts = [document.text for part in (one.train, other.train, one.validation, one.test) for document in part]
    assert len(set(texts)) == len(texts) == 160
    assert read_mqar(task, 1, 80).train[:50] == one.train


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_and_lags_are_those_of_reading_on(task):
    corpus = read_mqar(task, seed=1, samples=1)
    texts = [document.text for document in corpus.validation]
    ids = encode_documents(symbol_encoding(task), texts)
    places, distances = [], []
    for number, text in enumerate(texts):
        start = number * (task.length + len(SEPARATOR))
        for query, pair in sorted(asked(text, task)):
            places.append(start + query + 1)
            distances.append(query - (pair + 1))
    assert answers(task, ids).nonzero()[0].tolist() == places
    assert lags(task, ids).tolist() == distances
    assert min(distances) >= 1


def test_every_symbol_is_a_token_and_any_text_comes_back():
    task = TASKS[0]
    encoding = symbol_encoding(task)
    text = read_mqar(task, 1, 1).train[0].text
    ids = encoding.encode_ordinary(text)
    assert len(ids) == task.length
    assert encoding.n_vocab == 256 + task.keys + task.values
    assert encoding.decode(ids) == text
    assert encoding.decode(encoding.encode_ordinary("Größe\n🙂")) == "Größe\n🙂"
    assert min(each for each in ids if each >= 256) < 256 + task.keys <= max(ids)


def test_queries_come_soon_as_often_as_the_power_law_says():
    task = Task(pairs=1, length=42, keys=1, values=1)
    queries = [asked(document.text, task)[0][0] for document in read_mqar(task, 3, 4000).train]
    counted = np.bincount((np.array(queries) - 2) // 2, minlength=20) / 4000
    expected = np.array([g**-0.99 for g in range(1, 21)])
    np.testing.assert_allclose(gap_shares(task), expected / expected.sum())
    np.testing.assert_allclose(counted, expected / expected.sum(), atol=0.03)
