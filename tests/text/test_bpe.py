"""Training tokenizers: what is learned, what is written, what is refused."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from llamita.text import corpus, fast_bpe
from llamita.text.bpe import TokenizerTrainingConfig, train_bpe_from_iterator, train_tokenizer
from llamita.text.tokenizer import Tokenizer

TEXT = "low low low low low lower lower newest newest newest newest newest newest widest widest widest\n" * 3


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, newline="")
    return file


def naive_merges(text: str, count: int) -> list[bytes]:
    """Byte-pair encoding as the paper says it: join the most frequent pair everywhere, again and again.

    Of pairs that are equally frequent, the one of the smaller ids.
    """
    ids = {bytes([byte]): token for token, byte in enumerate(sorted(fast_bpe.byte_of_character().values(), key=_place))}
    words = [[bytes([byte]) for byte in part.encode()] for part in gpt2_parts(text)]
    learned: list[bytes] = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        learned.append(b"".join(best))
        ids[learned[-1]] = len(ids)
        for word in words:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = [learned[-1]]
                place += 1
    return learned


def _place(byte: int) -> str:
    """The characters that stand for bytes, in whose order the trainer numbers them."""
    return next(character for character, value in fast_bpe.byte_of_character().items() if value == byte)


def gpt2_parts(text: str) -> list[str]:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", [TEXT, "aaaaaa aaa é é é, b\r\n\r\n  banana's bananas' 1212 12121\n" * 3])
def test_merges_are_those_of_the_paper(text: str) -> None:
    tokenizer = train_bpe_from_iterator([text], vocab_size=272)
    assert [tokenizer.token_bytes(token) for token in range(259, 272)] == naive_merges(text, 13)


def test_a_vocabulary_without_merges_is_a_byte_model(text_file: Path, tmp_path: Path) -> None:
    config = TokenizerTrainingConfig(files=(text_file,), vocab_size=261, reserved_tokens=2, output=tmp_path / "bytes")
    tokenizer = train_tokenizer(config)
    assert json.loads((tmp_path / "bytes" / "tokenizer.json").read_text())["model"]["merges"] == []
    assert len(tokenizer.encode("añb")) == 4
    assert tokenizer.decode(tokenizer.encode("añb")) == "añb"


def test_from_files_and_from_memory_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> None:
    text = (shared_data / "wikitext-2" / "valid.txt").read_bytes()[:200_000].decode(errors="ignore") + "\r\n  x\n\n\n y"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    hashes = {train_bpe_from_iterator([text], 900).hash}
    for size in (1 << 10, 1 << 16):
        monkeypatch.setattr(corpus, "CHUNK_BYTES", size)
        config = TokenizerTrainingConfig(files=(file,), vocab_size=900, output=tmp_path / f"out{size}")
        hashes |= {train_tokenizer(config).hash, Tokenizer.load(config.output).hash}
    assert len(hashes) == 1


def test_sentencepiece_from_files(text_file: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        config = TokenizerTrainingConfig(
            files=(text_file,), vocab_size=280, kind="sentencepiece", reserved_tokens=1, output=tmp_path / name
        )
        hashes |= {train_tokenizer(config).hash, Tokenizer.load(tmp_path / name).hash}
    assert len(hashes) == 1
    found = Tokenizer.load(tmp_path / "one")
    assert (found.vocab_size, found.special_ids) == (280, {0, 1, 2, 3})
    assert found.decode(found.encode("  lower\r\n\tthan low ")) == "  lower\r\n\tthan low "


def test_progress_ends_at_all_bytes(text_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = TokenizerTrainingConfig(files=(text_file, text_file), vocab_size=262, output=tmp_path / "out")
    train_tokenizer(config, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * len(TEXT), 2 * len(TEXT))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_what_is_refused_leaves_nothing_behind(text_file: Path, tmp_path: Path, kind: str) -> None:
    empty, binary, spaces = tmp_path / "empty.txt", tmp_path / "binary.bin", tmp_path / "newlines.txt"
    empty.touch()
    binary.write_bytes(b"text \xff\xfe")
    spaces.write_bytes(b"\n")

    def refuse(message: str, files: tuple[Path, ...] = (text_file,), vocab_size: int = 265, **changes) -> None:
        options = {"kind": kind, "output": tmp_path / "out", **changes}
        with pytest.raises((ValueError, OSError), match=message) as fault:
            train_tokenizer(TokenizerTrainingConfig(files=files, vocab_size=vocab_size, **options))
        assert "\n" not in str(fault.value)

    refuse("there is no file", files=(tmp_path / "absent.txt",))
    refuse("no text to learn from", files=(empty,))
    refuse("no text to learn from|more than the text allows", files=(spaces,))
    refuse(r"binary\.bin is not UTF-8: invalid start byte at byte 5", files=(binary,))
    refuse("is a directory", files=(tmp_path,))
    refuse("one or more text files", files=())
    refuse("vocab_size=258 is too small: 3 special tokens and 256 bytes need 259 or more", vocab_size=258)
    refuse("vocab_size=262 is too small: 7 special .* need 263 or more", vocab_size=262, reserved_tokens=4)
    refuse(r"vocab_size=5000 is more than (the|this) text allows.* (\d+) or fewer", vocab_size=5000)
    refuse("is a file", output=text_file)
    refuse("reserved_tokens=-1", reserved_tokens=-1)
    left = {"text.txt", "empty.txt", "binary.bin", "newlines.txt"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_the_stated_reachable_size_is_reachable() -> None:
    with pytest.raises(ValueError, match="ask for") as fault:
        train_bpe_from_iterator([TEXT], 5000)
    reachable = int(str(fault.value).split("ask for ")[1].split()[0])
    assert train_bpe_from_iterator([TEXT], reachable).vocab_size == reachable
    with pytest.raises(ValueError, match=f"ask for {reachable} "):
        train_bpe_from_iterator([TEXT], reachable + 1)
    with pytest.raises(ValueError, match="no text to learn from"):
        train_bpe_from_iterator(["", ""], 300)


def test_an_output_that_exists(text_file: Path, tmp_path: Path) -> None:
    config = TokenizerTrainingConfig(files=(text_file,), vocab_size=262, output=tmp_path / "out")
    first = train_tokenizer(config).hash
    with pytest.raises(FileExistsError, match="exists already"):
        train_tokenizer(config)
    replacing = TokenizerTrainingConfig(files=(text_file,), vocab_size=263, output=config.output, overwrite=True)
    assert Tokenizer.load(config.output).hash == first
    second = train_tokenizer(replacing).hash
    assert Tokenizer.load(config.output).hash == second != first
    (config.output / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"holds more than a tokenizer \(model\.safetensors\)"):
        train_tokenizer(replacing)
    assert Tokenizer.load(config.output).hash == second


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_a_large_corpus_is_not_held_in_memory(tmp_path: Path, shared_data: Path) -> None:
    text = (shared_data / "wikitext-2" / "valid.txt").read_bytes()
    file = tmp_path / "large.txt"
    with file.open("wb") as stream:
        for _ in range(400):
            stream.write(text)
    assert file.stat().st_size > 400_000_000
    code = (
        "import sys, pathlib; from llamita.text.bpe import TokenizerTrainingConfig, train_tokenizer\n"
        "file, output = map(pathlib.Path, sys.argv[1:])\n"
        "train_tokenizer(TokenizerTrainingConfig(files=(file,), vocab_size=2000, output=output))\n"
        # Not getrusage: its peak counts that of the process that started this one.
        "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "out")]
    kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 250_000
