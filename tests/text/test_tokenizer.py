"""Loading, encoding, decoding and saving, for byte-level BPE of our own and of others' making."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer

TEXT = (
    "The cat sat on the mat, and the dog didn't. It's 1999 in the café; they've 12 naïve rôles.\r\n\r\n  The end.\n" * 5
)

OURS = train_bpe_from_iterator([TEXT], vocab_size=310, reserved_tokens=2)
BYTES = train_bpe_from_iterator([TEXT], vocab_size=259)


@settings(deadline=None)  # the machine may be busy
@given(st.text())
@example("")
@example("  leading and trailing  ")
@example("\x00\x01\x1f\x7f\x85")
@example("a\r\nb\rc\n\n")
@example("👩‍👩‍👧 e\u0301 \u200d\ufeff \U0010ffff")
@example("<unk> </s> <s><r0><r1>")
@example("'s 'S can't 're''ll")
def test_any_text_comes_back_and_holds_no_control_token(text: str) -> None:
    for tokenizer in (OURS, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.special_ids & set(ids)
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert BYTES.encode(text) == [_byte_id(byte) for byte in text.encode()]


def _byte_id(byte: int) -> int:
    return next(token for token in range(259) if BYTES.token_bytes(token) == bytes([byte]))


def test_layout_of_the_vocabulary() -> None:
    assert (OURS.unk_id, OURS.bos_id, OURS.eos_id, OURS.pad_id) == (0, 1, 2, None)
    assert OURS.special_ids == {0, 1, 2, 3, 4}
    assert OURS.vocab_size == 310
    assert sorted(OURS.token_bytes(token) for token in range(5, 261)) == [bytes([byte]) for byte in range(256)]
    assert OURS.token_bytes(261) == b"he"  # the most frequent pair
    assert not OURS.strips_leading_space


def test_control_tokens_only_where_asked() -> None:
    text = "a</s>b<r1><unk>"
    a, b = OURS.encode("a"), OURS.encode("b")
    assert OURS.encode(text, allow_special=True) == [*a, 2, *b, 4, 0]
    assert OURS.decode(OURS.encode(text, allow_special=True)) == "ab"
    assert OURS.decode(OURS.encode(text, allow_special=True), skip_special=False) == text
    assert OURS.encode("a", bos=True, eos=True) == [1, *a, 2]
    assert [ids.tolist() for ids in OURS.encode_batch(["a", ""], bos=True, eos=True)] == [[1, *a, 2], [1, 2]]
    assert OURS.encode_batch(["a"])[0].dtype == np.int32
    tokens, lengths = OURS.encode_joined(["a", "", "ab a"], bos=True)
    assert tokens.tolist() == [1, *a, 1, 1, *OURS.encode("ab a")]
    assert lengths.tolist() == [1 + len(a), 1, 1 + len(OURS.encode("ab a"))]
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int64)
    assert [part.tolist() for part in OURS.encode_joined([])] == [[], []]


@pytest.mark.parametrize("tokenizer", [OURS, BYTES])
def test_copies_are_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    for twin in (
        Tokenizer.load(tmp_path / "saved"),
        Tokenizer.load(tmp_path / "saved" / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ):
        assert twin.hash == tokenizer.hash
        assert (twin.bos_id, twin.eos_id, twin.unk_id) == (1, 2, 0)
        assert twin.encode(TEXT + "</s>") == tokenizer.encode(TEXT + "</s>")
    assert Tokenizer.load(str(tmp_path / "saved")).vocab_size == tokenizer.vocab_size


def test_hash_tells_tokenizers_apart() -> None:
    others = [
        train_bpe_from_iterator([TEXT], vocab_size=309, reserved_tokens=2),
        train_bpe_from_iterator([TEXT], vocab_size=310, reserved_tokens=1),
        train_bpe_from_iterator([TEXT.upper()], vocab_size=310, reserved_tokens=2),
    ]
    assert len({OURS.hash, BYTES.hash, *(other.hash for other in others)}) == 5
    assert train_bpe_from_iterator([TEXT], vocab_size=310, reserved_tokens=2).hash == OURS.hash


def test_decode_marks_broken_text_and_refuses_unknown_ids() -> None:
    first = OURS.encode("€")[0]
    assert OURS.decode([first]) == "\ufffd"
    assert OURS.decode(np.array(OURS.encode("€uro"))) == "€uro"
    for wrong in (-1, 310):
        with pytest.raises(ValueError, match=r"outside the vocabulary of 0\.\.309"):
            OURS.decode([wrong])
        with pytest.raises(ValueError, match=r"outside the vocabulary of 0\.\.309"):
            OURS.token_bytes(wrong)


def test_lone_surrogates_are_refused() -> None:
    for encode in (
        OURS.encode,
        lambda text: OURS.encode_batch(["fine", text]),
        lambda text: OURS.encode_joined(["fine", text]),
    ):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D83D, at character 3"):
            encode("abc\ud83d")


def test_transformers_opens_it_with_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    OURS.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, " leading", "", "\t\x00€", "plain"):
        assert theirs(text).input_ids == OURS.encode(text)  # no BOS that nobody asked for
        assert theirs.decode(OURS.encode(text)) == text
    assert theirs("x</s>", split_special_tokens=True).input_ids == OURS.encode("x</s>")
    assert theirs("x</s>").input_ids == OURS.encode("x</s>", allow_special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 2, 0, 310)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is False


# --- other people's files --------------------------------------------------------------------------------------------


def _llama3_like(directory: Path) -> None:
    """Merges without <s>, a split pattern of its own, special tokens after the vocabulary, BOS from a template."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens(["<tool>"])  # not special: found in text
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 300)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(directory / "tokenizer.json"))


def test_others_tokenizers_are_read_as_their_files_say(tmp_path: Path) -> None:
    _llama3_like(tmp_path)
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "chat_template": "{{ messages }}", "x": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.load(tmp_path)
    assert (found.vocab_size, found.bos_id, found.eos_id, found.unk_id) == (303, 300, 301, None)
    assert found.special_ids == {300, 301}
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    plain = theirs.encode(TEXT, add_special_tokens=False).ids
    assert found.encode(TEXT) == plain
    assert [ids.tolist() for ids in found.encode_batch([TEXT], bos=True)] == [[300, *plain]]  # one BOS
    assert found.decode(plain) == TEXT
    assert found.encode("a <|end|>") != found.encode("a <|end|>", allow_special=True)
    assert found.encode("<tool>") == [302]
    assert (found.token_bytes(302), found.token_bytes(301)) == (b"<tool>", b"")
    assert found.decode([302, 301]) == "<tool>"
    found.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.hash, again.encode(TEXT)) == (found.hash, plain)
    kept = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert (kept["chat_template"], kept["x"], kept["bos_token"]) == ("{{ messages }}", 1, {"content": "<|begin|>"})


def test_where_the_ends_of_a_text_are_found(tmp_path: Path) -> None:
    _llama3_like(tmp_path)

    def ends(**files: dict) -> tuple[int | None, int | None]:
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config"):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        found = Tokenizer.load(tmp_path)
        return found.bos_id, found.eos_id

    names, ids = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, {"bos_token_id": 300, "eos_token_id": [301, 300]}
    assert ends() == (None, None)
    assert ends(special_tokens_map=names) == (300, 301)
    assert ends(config=ids) == (300, 301)
    assert ends(generation_config={"eos_token_id": 300}, config=ids) == (300, 300)
    assert ends(tokenizer_config={"bos_token": None}, config=ids) == (None, 301)
    # A token that ends texts is a control token even where the file calls it an ordinary added one.
    assert ends(tokenizer_config={"eos_token": "<tool>"}) == (None, 302)
    assert 302 not in Tokenizer.load(tmp_path).encode("<tool>")
    with pytest.raises(ValueError, match="no token that begins a text"):
        Tokenizer.load(tmp_path).encode("x", bos=True)


def test_faulty_files_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither a tokenizer\.json nor a tokenizer\.model"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    OURS.save(tmp_path)
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words.normalizer = normalizers.Lowercase()
    good = file.read_text()
    for content in ("", "{}", "[]", "null", good[: len(good) // 2], '{"model": 3}', words.to_str()):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not") as fault:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(fault.value)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not"):
        Tokenizer.load(tmp_path)
    file.write_text(good)
    for content, said in (("{", "is not JSON"), ("[]", "holds a list where an object was expected")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json {said}"):
            Tokenizer.load(tmp_path)


def test_a_piece_shows_a_special_token_by_name_and_a_part_of_a_character_as_such() -> None:
    assert [OURS.piece(token) for token in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert [BYTES.piece(token) for token in BYTES.encode("é!")] == ["\ufffd", "\ufffd", "!"]
    assert "".join(OURS.piece(token) for token in OURS.encode("The cat")) == "The cat"
    with pytest.raises(ValueError, match="token id 310 is outside the vocabulary"):
        OURS.piece(310)
