"""Text files read in pieces."""

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from llamita.text import corpus


def parts(text: str) -> list[str]:
    """What the GPT-2 pattern splits a text into."""
    return [
        text[start:end] for _, (start, end) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    ]


TEXT = "It's   a  word,\r\n\r\n\tand\u00a0\u00a0 another… 漢字 é\u0301 😀\n \n  \x1c\x85 'll 12³ " * 7


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_chunks_are_the_text_and_cut_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", size)
    first, second = tmp_path / "one.txt", tmp_path / "two.txt"
    first.write_bytes(TEXT.encode())
    second.write_bytes(b"\n" + TEXT.encode())
    seen: list[int] = []
    chunks = list(corpus.read_chunks([first, second], seen.append))
    assert "".join(chunks) == TEXT + "\n" + TEXT
    assert [part for chunk in chunks for part in parts(chunk)] == parts(TEXT) + parts("\n" + TEXT)
    assert seen[-1] == first.stat().st_size + second.stat().st_size == corpus.check_files([first, second])
    if size < 64:
        assert len(chunks) > 20


def test_a_word_without_end_is_cut_rather_than_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 100)
    monkeypatch.setattr(corpus, "LONGEST_WORD", 1000)
    file = tmp_path / "long.txt"
    file.write_text("a" * 10_000)
    chunks = list(corpus.read_chunks([file]))
    assert "".join(chunks) == "a" * 10_000
    assert max(map(len, chunks)) <= 1100


def test_what_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 4)
    file = tmp_path / "text.txt"
    for content, place in ((b"abcd\xff", 4), (b"abc\xe2\x82x", 3), (b"abcdef\xe2\x82", 6), (b"ab \xff", 3)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8: .* at byte {place}$"):
            list(corpus.read_chunks([file]))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.txt"):
        corpus.check_files([file, tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match="is a directory"):
        corpus.check_files([tmp_path])
    with pytest.raises(ValueError, match="one or more text files"):
        corpus.check_files([])
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no text to learn from"):
        corpus.check_files([file])
