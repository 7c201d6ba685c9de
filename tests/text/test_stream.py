"""Text from tokens: no character is cut, no stop string slips through, wherever the tokens end."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctxkv_lightning.text.stream import TextStream

BYTES = [bytes([byte]) for byte in range(256)]


def streamed(tokens, pieces, stops=()):
    """The pieces that a stream gives of these tokens, the held-back rest as the last."""
    stream = TextStream(pieces, stops)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream


def cut_anywhere(text, seed):
    """The text's bytes as tokens of 1 to 4 bytes, and the pieces."""
    chosen, data, tokens = random.Random(seed), text.encode(), []
    while data:
        size = chosen.randint(1, 4)
        tokens.append(data[:size])
        data = data[size:]
    return range(len(tokens)), tokens


def until(text, stops):
    """The text before the stop string that is complete first, the longest that ends there, by trying every place."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if stop and text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))]
    return text


@given(st.text(), st.integers())
def test_pieces_are_the_text_and_each_is_whole_characters(text, seed):
    found, _ = streamed(*cut_anywhere(text, seed))
    assert "".join(found) == text
    assert "".join(piece.encode().decode() for piece in found) == text


@given(st.text("ab€🙂", max_size=40), st.lists(st.text("ab€🙂", max_size=4), max_size=3), st.integers())
@example("a€a", ["€", "a€a"], 0)
@example("a€a", ["€a", "a€a"], 0)
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops, seed):
    found, stream = streamed(*cut_anywhere(text, seed), stops)
    assert "".join(found) == until(text, stops)
    assert stream.stopped


def test_a_character_comes_when_its_last_byte_does():
    found, _ = streamed("a€b".encode(), BYTES)
    assert found == ["a", "", "", "€", "b", ""]


def test_what_may_begin_a_stop_string_waits_and_comes_if_it_did_not():
    found, stream = streamed(b"xENx END!", BYTES, ["END"])
    assert found == ["x", "", "", "ENx", " ", "", "", "", "", ""]
    assert stream.stopped
    assert streamed(b"xEN", BYTES, ["END"])[0] == ["x", "", "", "EN"]


def test_nothing_comes_after_a_stop():
    stream = TextStream(BYTES, ["."])
    assert [stream.push(byte) for byte in b"a.bc"] == ["a", "", "", ""]
    assert stream.finish() == ""


@pytest.mark.parametrize(("data", "text"), [(b"a\xffb", "a\ufffdb"), (b"\xe2\x82A", "\ufffdA"), (b"ok\xe2\x82", "ok")])
def test_bytes_that_are_no_utf8_are_marked_and_a_begun_character_is_left_out(data, text):
    assert "".join(streamed(data, BYTES)[0]) == text
