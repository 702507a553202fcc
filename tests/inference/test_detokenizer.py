"""Streamed text equals the whole text, in whole characters, and stops where it should, however it is split."""

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamita.inference.detokenizer import IncrementalDetokenizer, StopMatcher
from llamita.text.tokenizer import Tokenizer

ids_of_any_kind = st.lists(st.integers(min_value=0, max_value=2**31), max_size=40)


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "llama2-tokenizer" / "tokenizer.model")


def pieces_of(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, context or [])
    return [*(stream.feed(token_id) for token_id in ids), stream.finish()]


class RawBytes:
    """A vocabulary of the 256 bytes, for arbitrary byte sequences."""

    vocab_size = 256
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@given(st.binary(max_size=24))
@example(b"\xf0\x9f\xa6")
@example(b"\xed\xa0\x80a")
@example(b"\xf0\x90A\xe2\x82")
def test_any_bytes_come_out_as_python_decodes_them(data: bytes) -> None:
    stream = IncrementalDetokenizer(RawBytes())
    pieces = [*(stream.feed(byte) for byte in data), stream.finish()]
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=12))
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    stream = IncrementalDetokenizer(RawBytes())
    for character in text:
        *first, last = character.encode()
        assert [stream.feed(byte) for byte in first] == [""] * len(first)
        assert stream.feed(last) == character
    assert stream.finish() == ""


@given(ids=ids_of_any_kind)
def test_pieces_join_to_the_whole_text_byte_level(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=ids_of_any_kind)
def test_pieces_join_to_the_whole_text_sentencepiece(llama2: Tokenizer, ids: list[int]) -> None:
    ids = [token_id % llama2.vocab_size for token_id in ids]
    assert "".join(pieces_of(llama2, ids)) == llama2.decode(ids)


@given(text=st.text(max_size=30))
def test_real_encodings_come_back_sentencepiece(llama2: Tokenizer, text: str) -> None:
    ids = llama2.encode(text, bos=True)
    assert "".join(pieces_of(llama2, ids)) == llama2.decode(ids)


@given(context=ids_of_any_kind, ids=ids_of_any_kind)
@settings(max_examples=200)
def test_text_after_a_context_is_what_the_context_lacks(llama2: Tokenizer, context: list[int], ids: list[int]) -> None:
    context = [token_id % llama2.vocab_size for token_id in context]
    ids = [token_id % llama2.vocab_size for token_id in ids]
    before = "".join(pieces_of(llama2, context)[:-1])  # without the replacement of an unfinished character
    assert before + "".join(pieces_of(llama2, ids, context)) == llama2.decode(context + ids)


def test_a_word_keeps_its_space_only_after_text(llama2: Tokenizer) -> None:
    once = llama2.encode("Once")
    assert llama2.token_bytes(once[0]).startswith(b" ")
    assert "".join(pieces_of(llama2, once)) == "Once"
    assert "".join(pieces_of(llama2, once, context=[llama2.bos_id])) == "Once"
    assert "".join(pieces_of(llama2, once, context=llama2.encode("Well.", bos=True))) == " Once"


def test_an_id_of_a_padded_vocabulary_has_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(pieces_of(tokenizer, [tokenizer.vocab_size, *tokenizer.encode("fox"), 10**9])) == "fox"


# --- stop strings ---------------------------------------------------------------------------------------------------


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The slow, obvious version: look at every prefix of the text, shortest first."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text(alphabet="ab", max_size=14)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@given(text=letters, stops=stop_lists, cuts=st.lists(st.integers(0, 14), max_size=6))
@settings(max_examples=500)
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    matcher = StopMatcher(stops)
    out = "".join(matcher.feed(text[a:b]) for a, b in itertools.pairwise(borders))
    out += matcher.finish()
    assert (out, matcher.matched) == cut_at_first_stop(text, stops)


@given(text=letters, stops=stop_lists)
def test_only_the_longest_suffix_that_begins_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for seen in range(1, len(text) + 1):
        out += matcher.feed(text[seen - 1])
        if matcher.matched is not None:
            break
        begins = [s for s in range(seen) if any(stop.startswith(text[s:seen]) for stop in stops)]
        assert out == text[: min(begins, default=seen)]


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.feed("one\n") == "one"
    assert matcher.feed("\ntwo") == ""
    assert matcher.matched == "\n\n"
    assert matcher.feed("three") == ""
    assert matcher.finish() == ""


def test_what_was_held_back_in_vain_comes_out() -> None:
    matcher = StopMatcher(["<end>"])
    assert [matcher.feed("a<e"), matcher.feed("n"), matcher.feed("t"), matcher.feed("<")] == ["a", "", "<ent", ""]
    assert matcher.finish() == "<"
