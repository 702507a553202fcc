"""Llama 3's rank files: the ids of tiktoken itself, with the split and the special tokens that Llama 3 published."""

import base64
import random
import sys
import time
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from llamita.data import meadow
from llamita.text import fast_bpe, tiktoken_ranks
from llamita.text.tokenizer import Tokenizer

# As published with Llama 3, typed out once more.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
UNREACHABLE = [b"qzqzq", b" Xylophon", b"aaa", b"\xe6\x97\xa5\xe6\x9c\xac", b"    \n"]


def made_ranks() -> dict[bytes, int]:
    """Single bytes in an order of their own, merges learned from stories and made up, and words that no merge makes."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    stories = [*meadow.corpus(0, 100, "train"), "It's we'll THEY'RE 12345 67 890!!\n\n  \t naïve café 日本語 ..." * 30]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(stories, trainer)
    table = fast_bpe.byte_of_character()
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(table[character] for character in name): rank for name, rank in learned}
    # Pieces of which several pairs make the same token.
    for token in (b"aa", b"aaaa", b"abab", b"ba", b"bab", b"ab", b"baba", *UNREACHABLE):
        ranks.setdefault(token, len(ranks))
    return ranks


RANKS = made_ranks()
THEIRS = tiktoken.Encoding(
    "llama3", pat_str=SPLIT, mergeable_ranks=RANKS,
    special_tokens={name: len(RANKS) + number for number, name in enumerate(tiktoken_ranks.SPECIAL)},
)  # fmt: skip


def write(path: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("ranks") / "tokenizer.model"))


PARTS = st.one_of(
    st.text(max_size=4),
    st.text(alphabet="ab", max_size=12),
    st.sampled_from([*(token.decode() for token in UNREACHABLE)]),
    st.sampled_from(["'S", "'ſ", "'LL", "'re", "1234567", " \n\n  x", "…!\r\n"]),
    st.sampled_from(list(tiktoken_ranks.SPECIAL[:12])),
)  # fmt: skip


@settings(deadline=None, max_examples=300)  # the machine may be busy
@given(text=st.lists(PARTS, max_size=12).map("".join))
@example(text="")
@example(text="aaaaabababaaa qzqzqz qzqzq Xylophon Xylophone")
def test_ids_and_text_are_tiktokens(ours, text):
    ids = THEIRS.encode(text, disallowed_special=())
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text
    with_special = THEIRS.encode(text, allowed_special="all")
    assert ours.encode(text, allow_special=True) == with_special
    assert ours.decode(with_special, skip_special=False) == text


def test_many_texts_are_split_alike(ours):
    choose = random.Random(0)
    every = [*range(0xD800), *range(0xE000, sys.maxunicode)]
    for letters in (every, range(0x250), range(0x80)):
        text = "".join(map(chr, choose.choices(letters, k=20_000)))
        assert ours.encode(text) == THEIRS.encode_ordinary(text)
    text = "\n".join(meadow.corpus(3, 50, "validation"))
    assert ours.encode(text, bos=True, eos=True) == [len(RANKS), *THEIRS.encode_ordinary(text), len(RANKS) + 1]


def test_the_special_tokens_are_llama_3s(ours):
    names = tiktoken_ranks.SPECIAL
    assert len(set(names)) == 256
    expected = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_3|>": 5, "<|start_header_id|>": 6, "<|end_header_id|>": 7,
        "<|reserved_special_token_4|>": 8, "<|eot_id|>": 9, "<|reserved_special_token_5|>": 10,
        "<|reserved_special_token_250|>": 255}  # fmt: skip
    assert {name: names.index(name) for name in expected} == expected
    assert ours.codec.special_tokens == {name: len(RANKS) + number for number, name in enumerate(names)}
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(RANKS) + 256, len(RANKS), len(RANKS) + 1)
    assert (ours.unk_id, ours.pad_id) == (None, None)
    assert [ours.token_bytes(rank) for rank in RANKS.values()] == list(RANKS)


def test_saved_it_is_the_same_here_and_in_transformers(ours, tmp_path):
    ours.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.bos_id, again.eos_id) == (ours.hash, ours.bos_id, ours.eos_id)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for text in (*meadow.corpus(3, 20, "validation"), "It'S 12345 日本\n\n  qzqzq aaaab", "", " \n"):
        assert theirs(text).input_ids == THEIRS.encode_ordinary(text)
        assert theirs.decode(THEIRS.encode_ordinary(text)) == text
    assert theirs("<|begin_of_text|>a<|eot_id|>").input_ids == THEIRS.encode(
        "<|begin_of_text|>a<|eot_id|>", allowed_special="all"
    )
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    write(tmp_path / "tokenizer.model")  # beside a tokenizer.json it is left alone
    assert Tokenizer.load(tmp_path).hash == ours.hash


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"IQ== 0\nIQ== 1\n", r"line 2: expected a new token of rank 1, got b'!' of 1"),
        (b"IQ== 0\nIg== 2\n", r"line 2: expected a new token of rank 1"),
        (b"IQ== 0\nIg= 1\n", r"line 2: .*padding"),
        (b"IQ== 0\nnothing\n", "line 2 is not a token in base64, a space and a rank"),
        (b"IQ== 0\nIg== -1\n", "line 2 is not a token in base64"),
        (b"IQ== 0\n" + base64.b64encode(bytes(257)) + b" 1\n", "line 2: expected a new token"),
        (b"IQ== 0\nIg== 1\n", "byte 0x00 is no token"),
        (b"IQ== 0\n\nIg== 1\n", "line 2 is not"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"tokenizer.model is no rank file of tiktoken's that can be used: {words}"
    ) as fault:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(fault.value)


def test_a_special_token_among_the_ranks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'<\|eot_id\|>' is an ordinary token there"):
        Tokenizer.load(write(tmp_path / "tokenizer.model", RANKS | {b"<|eot_id|>": len(RANKS)}))


def test_a_file_of_long_tokens_takes_seconds():
    choose = random.Random(0)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 1000:
        ranks.setdefault(bytes(choose.choices(b"ab", k=choose.choice([2, 3, 4, 256]))), len(ranks))
    began = time.perf_counter()
    tiktoken_ranks.convert(ranks)
    assert time.perf_counter() - began < 10
