"""llama2.c's tokenizer files: the same ids there and back, and Llama 2's own."""

import struct
from pathlib import Path

import pytest

from llamita.data import meadow
from llamita.storage.formats import llama2c_tokenizer
from llamita.text import sentencepiece_training
from llamita.text.bpe import special_tokens, train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer

LLAMA2 = Path(__file__).parents[4] / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
TEXTS = ["Once upon a time,  two spaces\n", "naïve café 日本", "", "<s> x </s>", *meadow.corpus(2, 30, "validation")]


def small() -> Tokenizer:
    return Tokenizer.from_codec(
        sentencepiece_training.train(list(meadow.corpus(0, 300, "train")), 400, special_tokens(0))
    )


def llama2() -> Tokenizer:
    if not LLAMA2.is_file():
        pytest.skip("Llama 2's tokenizer is not on this machine")
    return Tokenizer.load(LLAMA2)


@pytest.mark.parametrize("make", [small, llama2])
def test_there_and_back(tmp_path, make):
    tokenizer = make()
    llama2c_tokenizer.write(tmp_path / "t.bin", tokenizer)
    again = llama2c_tokenizer.read(tmp_path / "t.bin")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (tokenizer.vocab_size, 1, 2)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    llama2c_tokenizer.write(tmp_path / "again.bin", again)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "t.bin").read_bytes()


def test_it_is_laid_out_as_run_c_reads_it(tmp_path):
    tokenizer = small()
    llama2c_tokenizer.write(tmp_path / "t.bin", tokenizer)
    content = (tmp_path / "t.bin").read_bytes()
    position, texts = 4, []
    for _ in range(tokenizer.vocab_size):
        _, length = struct.unpack_from("<fi", content, position)
        texts.append(content[position + 8 : position + 8 + length])
        position += 8 + length
    assert position == len(content)
    assert struct.unpack("<I", content[:4])[0] == max(map(len, texts))
    assert texts[:4] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    assert b" the" in texts


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"llama2\.c has SentencePiece's BPE"):
        llama2c_tokenizer.write(tmp_path / "t.bin", train_bpe_from_iterator(meadow.corpus(0, 200, "train"), 300))
    assert not list(tmp_path.iterdir())


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    llama2c_tokenizer.write(path, small())
    content = path.read_bytes()
    ends = [0, 3, 4, 9, 13, 30, len(content) - 1]
    damaged = [content[:end] for end in ends]
    damaged += [content[:8] + struct.pack("<I", 2**31) + content[12:], content[:12] + b"\xff" + content[13:]]
    damaged += [content[:4] + struct.pack("<f", float("nan")) + content[8:]]
    for broken in damaged:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t\.bin"):
            llama2c_tokenizer.read(path)
