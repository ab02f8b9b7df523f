"""Ids become text piece by piece; stop strings are found across pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.text import StopSearch, TextPieces

from fastlora.checkpoints.hub import DEMO
from fastlora.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(DEMO)
assert TOKENIZER is not None


def pieces_of(ids: list[int], sizes: list[int]) -> list[str]:
    pieces, out, at = TextPieces(TOKENIZER.decode), [], 0
    for size in [*sizes, len(ids)]:
        out.append(pieces.push(ids[at : at + size]))
        at += size
    return [*out, pieces.finish()]


@given(st.lists(st.integers(0, 4095), max_size=300), st.lists(st.integers(0, 40), max_size=20))
def test_pieces_of_any_ids_make_the_text_of_all_ids(ids, sizes):
    assert "".join(pieces_of(ids, sizes)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_whole():
    text = "naïve → 🙂🙃 " * 40
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = pieces_of(ids, [1] * len(ids))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_work_for_a_token_does_not_grow_with_the_reply():
    lengths = []
    pieces = TextPieces(lambda ids: lengths.append(len(ids)) or TOKENIZER.decode(ids))
    for i in range(2000):
        pieces.push([10 + i % 50])
    assert max(lengths) < 80


def search(text: str, stops: list[str], sizes: list[int]) -> tuple[str, bool]:
    stop, out, at = StopSearch(stops), "", 0
    for size in [*sizes, len(text)]:
        out += stop.push(text[at : at + size])
        at += size
    return out + stop.finish(), stop.found


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), max_size=10),
)
def test_text_ends_before_a_stop_string_for_any_split(text, stops, sizes):
    out, found = search(text, stops, sizes)
    assert found == any(stop in text for stop in stops)
    assert not any(stop in out for stop in stops)
    assert out == text if not found else any(text.startswith(out + stop) for stop in stops)


@pytest.mark.parametrize("sizes", [[], [1] * 11, [7, 1]])
def test_one_stop_string_cuts_at_its_first_place(sizes):
    assert search("one END two END", ["END"], sizes) == ("one ", True)


def test_text_that_cannot_be_a_stop_string_is_passed_on_at_once():
    stop = StopSearch(["END"])
    assert [stop.push(x) for x in ("abc", "E", "x", "EN", "EN", "DE")] == [
        "abc", "", "Ex", "", "EN", "",
    ]  # fmt: skip
    assert stop.found
