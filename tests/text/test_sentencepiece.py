"""SentencePiece models: the ids of `sentencepiece` itself, and the same tokenizer as tokenizer.json."""

import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamita.text import sentencepiece_json, sentencepiece_training
from llamita.text.bpe import special_tokens
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.tokenizer import Tokenizer

TEXT = (
    "the cat sat on the mat and the dog sat on the cat.\nWhere is the dog? On the mat!\n\n\tIt's   there, on the mat.\n"
)
OURS = Tokenizer.from_codec(sentencepiece_training.train([TEXT * 5], 310, special_tokens(2)))


def processor_of(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    assert isinstance(tokenizer.codec, SentencePieceCodec)
    return tokenizer.codec._processor


def converted(tokenizer: Tokenizer) -> HuggingFaceCodec:
    assert isinstance(tokenizer.codec, SentencePieceCodec)
    found = sentencepiece_json.convert(sentencepiece_json.parse(tokenizer.codec.proto))
    assert found is not None
    assert sentencepiece_json.agree_on_spaces(found, processor_of(tokenizer))
    return HuggingFaceCodec(found)


CONVERTED = converted(OURS)
PARTS = st.one_of(
    st.text(max_size=4), st.sampled_from(TEXT.split()), st.sampled_from(["  ", "▁", "<s>", "<0x41>", "\x00"])
)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(PARTS, max_size=20).map("".join))
@example("")
@example(" ")
@example("  leading and trailing  ")
@example("a\r\nb\rc\n\n\x00\x7f\x85\u2028")
@example("</s> <r0> <unk> <0x0A>")
@example("▁▁ ▁")
def test_ids_and_text(text: str) -> None:
    ids = OURS.encode(text)
    assert ids == processor_of(OURS).encode(text)
    assert ids == CONVERTED.encode(text)
    assert OURS.decode(ids) == text.replace("▁", " ")  # all that SentencePiece cannot give back
    assert not OURS.special_ids & set(ids)
    joined = b"".join(OURS.token_bytes(token) for token in ids)
    assert joined == (b" " if text else b"") + text.replace("▁", " ").encode()


def test_layout_of_the_vocabulary() -> None:
    assert (OURS.unk_id, OURS.bos_id, OURS.eos_id, OURS.pad_id) == (0, 1, 2, None)
    assert OURS.special_ids == {0, 1, 2, 3, 4}
    assert (OURS.vocab_size, OURS.strips_leading_space) == (310, True)
    assert [OURS.token_bytes(token) for token in range(5, 261)] == [bytes([byte]) for byte in range(256)]


def test_control_tokens_only_where_asked() -> None:
    a, b = OURS.encode("a"), OURS.encode("b")
    for codec in (OURS.codec, CONVERTED):
        assert codec.encode_with_special("a</s>b<r1><unk>") == [*a, 2, *b, 4, 0]
    assert OURS.encode("the cat", bos=True, eos=True) == [1, *OURS.encode("the cat"), 2]
    assert OURS.decode([1, *OURS.encode(" the cat"), 2]) == " the cat"
    assert OURS.decode([*a, 2], skip_special=False) == "a</s>"


def test_decoding_is_that_of_sentencepiece() -> None:
    choose = random.Random(0)
    pieces = [token for token in range(OURS.vocab_size) if not 5 <= token < 261 and token]  # no <unk>, no single bytes
    for _ in range(300):
        ids = choose.choices(pieces, k=choose.randint(1, 12))
        assert OURS.decode(ids) == processor_of(OURS).decode(ids)


def test_saved_and_opened_by_others(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        twin = Tokenizer.load(path)
        assert (twin.hash, twin.encode(TEXT), twin.bos_id, twin.eos_id) == (OURS.hash, OURS.encode(TEXT), 1, 2)
    assert pickle.loads(pickle.dumps(OURS)).hash == OURS.hash
    as_json = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (as_json.encode(TEXT), as_json.bos_id, as_json.eos_id) == (OURS.encode(TEXT), 1, 2)
    assert as_json.strips_leading_space
    assert [as_json.token_bytes(token) for token in range(310)] == [OURS.token_bytes(token) for token in range(310)]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "  leading", "", "ünïcödé 😀\x00", "\n"):
        assert theirs(text).input_ids == OURS.encode(text)
        assert theirs.decode(OURS.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 2, 0, 310)


def test_tokens_added_beside_the_model_are_read(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole.add_special_tokens(["<pad>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    assert (found.vocab_size, found.pad_id) == (311, 310)
    assert found.encode(TEXT) == OURS.encode(TEXT)


def test_llama2(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "llama2-tokenizer" / "tokenizer.model"
    llama = Tokenizer.load(file)
    assert (llama.vocab_size, llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 0, 1, 2, None)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    as_json = converted(llama)
    shakespeare = (shared_data / "tinyshakespeare" / "input.txt").read_text("utf-8")[:50_000]
    wikitext = (shared_data / "wikitext-2" / "valid.txt").read_text("utf-8")[:50_000]
    choose = random.Random(0)
    every = [*range(0xD800), *range(0xE000, sys.maxunicode)]
    noise = "".join(map(chr, choose.choices(every, k=20_000)))
    latin = "".join(map(chr, choose.choices(range(256), k=20_000)))
    for text in (shakespeare, wikitext, noise, latin, "", " ", "</s> <s><unk>"):
        ids = reference.encode(text)
        assert llama.encode(text) == ids
        assert as_json.encode(text) == ids
        assert llama.decode(ids) == text.replace("▁", " ")
    assert "<unk>" in wikitext
    assert llama.encode_batch(["Hello", " x"])[0].tolist() == [15043]
    llama.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == llama.hash
    assert (tmp_path / "tokenizer.model").read_bytes() == file.read_bytes()


def test_what_tokenizer_json_cannot_hold_is_saved_as_a_model_alone(tmp_path: Path) -> None:
    assert isinstance(OURS.codec, SentencePieceCodec)
    model = sentencepiece_json.parse(OURS.codec.proto)
    normal = [index for index, (_, _, kind) in enumerate(model.pieces) if kind == sentencepiece_json.NORMAL]
    longer = [index for index in normal if len(model.pieces[index][0]) > 1]

    def with_piece(index: int, score: float, kind: int) -> sentencepiece_json.SentencePieceModel:
        pieces = list(model.pieces)
        pieces[index] = (pieces[index][0], score, kind)
        return replace(model, pieces=tuple(pieces))

    for changed in (
        replace(model, model_type=1),
        replace(model, normalizes=True),
        replace(model, removes_extra_spaces=True),
        replace(model, escapes_spaces=False),
        replace(model, whitespace_as_suffix=True),
        with_piece(longer[0], 0, sentencepiece_json.USER_DEFINED),
        with_piece(longer[0], 0, sentencepiece_json.UNUSED),
        with_piece(longer[0], model.pieces[longer[1]][1], sentencepiece_json.NORMAL),
    ):
        assert sentencepiece_json.convert(changed) is None
    assert sentencepiece_json.convert(model) is not None

    unigram = tmp_path / "unigram"
    lines = TEXT.split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(unigram), vocab_size=32, minloglevel=2, pad_id=3
    )
    found = Tokenizer.load(tmp_path / "unigram.model")
    assert found.encode(TEXT) == sentencepiece.SentencePieceProcessor(model_file=f"{unigram}.model").encode(TEXT)
    assert found.pad_id == 3
    found.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert Tokenizer.load(tmp_path / "out").hash == found.hash


def test_faulty_models_are_named_in_one_line(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    file = tmp_path / "tokenizer.model"
    good = file.read_bytes()
    for content in (b"", b"garbage", good[:1000], good[:-7], bytes(100), b"PK\x03\x04" + good):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model: ") as fault:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(fault.value)


def test_vocabulary_sizes_that_the_text_does_not_allow() -> None:
    with pytest.raises(
        ValueError, match=r"vocab_size=5000 is more than this text allows: it gives (\d+) pieces"
    ) as fault:
        sentencepiece_training.train([TEXT * 5], 5000, special_tokens(0))
    reachable = int(str(fault.value).split("gives ")[1].split()[0])
    assert sentencepiece_training.train([TEXT * 5], reachable, special_tokens(0)).vocab_size == reachable
    with pytest.raises(ValueError, match=r"vocab_size=260 is too small.* at least (\d+)") as fault:
        sentencepiece_training.train([TEXT * 5], 260, special_tokens(0))
    least = int(str(fault.value).rsplit(" ", 1)[1])
    assert sentencepiece_training.train([TEXT * 5], least, special_tokens(0)).vocab_size == least
    with pytest.raises(ValueError, match="no text to learn from"):
        sentencepiece_training.train(["\n", "\n\n"], 300, special_tokens(0))
