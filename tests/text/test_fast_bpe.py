"""The fast path gives the ids of `tokenizers`, or stands aside."""

import json
import re
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from llamita.text import fast_bpe

LOREM = "It's the cat's hat; we'll see 1,234 things -- they'd've said: 'no'!\n\n  café naïve 漢字 😀\t\t end   \n" * 20


def train(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def spec_of(tokenizer: tokenizers.Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def fast_of(tokenizer: tokenizers.Tokenizer) -> fast_bpe.FastBpe:
    found = fast_bpe.fast_bpe(tokenizer, spec_of(tokenizer))
    assert found is not None
    return found


def slow_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


SLOW = train(LOREM, 480)
FAST = fast_of(SLOW)

PIECES = st.sampled_from(
    ["'", "s", "'ll", "'S", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85"]
)
PARTS = st.one_of(
    PIECES, st.sampled_from(LOREM.split(" ")), st.text(max_size=3), st.sampled_from("19²½٣四é\u0301<>!漢")
)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(PARTS, max_size=30).map("".join))
@example("")
@example("   a   ")
@example(" \n \n")
@example("</s><unk> <s>")
def test_same_ids_on_text_made_to_be_difficult(text: str) -> None:
    assert FAST.encode(text) == slow_ids(SLOW, text)


def test_same_ids_on_real_text(shared_data: Path) -> None:
    shakespeare = (shared_data / "tinyshakespeare" / "input.txt").read_text("utf-8")
    wikitext = (shared_data / "wikitext-2" / "valid.txt").read_text("utf-8")
    slow = train(shakespeare, 2000)
    fast = fast_of(slow)
    for text in (shakespeare[:400_000], wikitext[:400_000]):
        assert fast.encode(text) == slow_ids(slow, text)


# --- the conditions of the proof -------------------------------------------------------------------------------------


def test_a_token_that_its_merges_do_not_reach_forbids_the_fast_path() -> None:
    # "abc" is made of (a, bc), but "ab" merges first: alone, "abc" comes out as (ab, c). tiktoken would join those two.
    characters = list(fast_bpe.byte_of_character())
    vocab = {name: index for index, name in enumerate([*characters, "ab", "bc", "abc"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c"), ("a", "bc")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert slow_ids(tokenizer, "abc") == [vocab["ab"], vocab["c"]]
    assert fast_bpe.fast_bpe(tokenizer, spec_of(tokenizer)) is None
    reachable = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c"), ("ab", "c")]))
    reachable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert fast_of(reachable).encode("abcbc") == slow_ids(reachable, "abcbc")


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"].update(dropout=0.1),
        lambda spec: spec["model"].update(unk_token="<unk>"),
        lambda spec: spec["model"].update(ignore_merges=True),
        lambda spec: spec["model"].update(byte_fallback=True),
        lambda spec: spec["model"].update(continuing_subword_prefix="##"),
        lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
        lambda spec: spec["model"]["merges"].reverse(),
        lambda spec: spec["model"]["merges"].pop(),
        lambda spec: spec["model"]["vocab"].pop("a"),
        lambda spec: spec["model"]["vocab"].update({"☃": 1000}),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec.update(pre_tokenizer=None),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec["pre_tokenizer"].update(use_regex=False),
        lambda spec: spec["added_tokens"][0].update(special=False),
    ],
)
def test_any_other_kind_of_tokenizer_forbids_the_fast_path(change) -> None:
    spec = spec_of(SLOW)
    assert fast_bpe.fast_bpe(SLOW, spec) is not None
    change(spec)
    assert fast_bpe.fast_bpe(SLOW, spec) is None


@pytest.mark.parametrize(
    "name", ["", "a", "Ġcat", "ĠÃ©", "naïve", "Ġa b", "a\n", "\x85", "\xad", "漢", "Ġ漢", "☃", "\uffff"]
)
def test_bytes_of_a_name_are_those_of_its_characters_or_of_its_text(name) -> None:
    table = fast_bpe.byte_of_character()
    known = all(character in table for character in name)
    assert fast_bpe.bytes_of_name(name) == (bytes(map(table.__getitem__, name)) if known else name.encode())


# --- Unicode ---------------------------------------------------------------------------------------------------------


def _code_points() -> list[str]:
    return [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


def test_the_two_engines_class_characters_alike() -> None:
    """The first 4,096 code points, and both sides of every place where the class changes."""
    points = _code_points()
    classes = [unicodedata.category(point)[0] + str(point.isspace()) for point in points]
    edges = [i for i in range(1, len(points)) if classes[i] != classes[i - 1]]
    chosen = {*points[:4096], *(points[i] for i in edges), *(points[i - 1] for i in edges)}
    assert len(chosen) > 6000
    assert fast_bpe.engines_agree("".join(sorted(chosen)))


@pytest.mark.slow
def test_the_two_engines_class_every_character_alike() -> None:
    points = _code_points()
    for start in range(0, len(points), 1 << 15):
        assert fast_bpe.engines_agree.__wrapped__("".join(points[start : start + (1 << 15)]))


@pytest.mark.parametrize(
    ("where", "change", "same", "other"),
    [
        (r"\p{L}+", r"[\p{L}--[\u1c89]]+", "\u1c88", "\u1c89"),  # a letter to one engine alone
        (r"\p{N}+", r"[\p{N}\u20ac]+", "\u20ab", "\u20ac"),  # a number to one engine alone
        (r"[^\s", r"[^\u20ac\s", "\u20ab", "\u20ac"),  # no sign to one engine alone
    ],
)
def test_a_difference_between_the_engines_is_found(where: str, change: str, same: str, other: str) -> None:
    pattern = fast_bpe.GPT2_PATTERN.replace(where, change)
    assert pattern != fast_bpe.GPT2_PATTERN
    assert fast_bpe.engines_agree(same, pattern)
    assert not fast_bpe.engines_agree(same + other, pattern)


def test_engines_that_differ_leave_ascii_to_the_fast_path() -> None:
    fast = fast_of(SLOW)
    assert fast._any_unicode  # the installed versions agree
    fast._any_unicode = False
    assert fast.encode("café") is None
    assert fast.encode("cafe") == slow_ids(SLOW, "cafe")


# --- hostile texts ---------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the machine may be busy
@given(st.text(alphabet="aé \n\x1c", max_size=40), st.integers(1, 8))
def test_long_runs_are_found(text: str, length: int) -> None:
    longest = max(map(len, re.findall(r"[ \n]+|[aé\x1c]+", text)), default=0)
    if longest >= 2 * length - 1:
        assert fast_bpe.has_long_run(text, length)
    if longest < length:
        assert not fast_bpe.has_long_run(text, length)


MEGABYTE = 1_000_000
NOISE = np.random.default_rng(0).integers(0, 256, MEGABYTE, dtype=np.uint8).tobytes().decode("latin-1")


@pytest.mark.parametrize(
    "text",
    [
        "a" * MEGABYTE,
        "the" * (MEGABYTE // 3),
        "漢" * (MEGABYTE // 3),
        " " * MEGABYTE,
        " " * MEGABYTE + "a",
        ("a" + " " * (2 * fast_bpe.LONG_RUN - 2)) * 200,
        " ".join(["the" * (2 * fast_bpe.LONG_RUN // 3 - 2)] * 200),
        NOISE,
    ],
    ids=["a", "the", "han", "spaces", "spaces-a", "longest-spaces", "longest-words", "noise"],
)
def test_a_megabyte_of_anything_takes_seconds(text: str) -> None:
    from llamita.text.huggingface_codec import HuggingFaceCodec

    codec = HuggingFaceCodec(SLOW)
    began = time.perf_counter()
    ids = codec.encode(text)
    assert time.perf_counter() - began < 10
    assert ids == slow_ids(SLOW, text)
    assert b"".join(codec.bytes_of_id[token] for token in ids) == text.encode()
