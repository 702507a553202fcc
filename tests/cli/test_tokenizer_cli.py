"""`llamita tokenizer train` as a user types it."""

import shlex
from pathlib import Path

import pytest

from llamita.cli.main import main
from llamita.text.tokenizer import Tokenizer

TEXT = "the cat sat on the mat; the dog sat on the cat; where is the dog? on the mat!\n" * 20


@pytest.fixture
def text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a text.txt"
    file.write_text(TEXT)
    return file


def test_trains_and_says_what_comes_next(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", str(text_file), str(text_file), "--vocab-size", "280"]) == 0
    told = capsys.readouterr()
    tokenizer = Tokenizer.load("tokenizer")
    assert tokenizer.vocab_size == 280
    assert "280 tokens: 3 special, 256 bytes, 21 learned" in told.out
    ratio = len(TEXT) / len(tokenizer.encode(TEXT))
    assert f"{ratio:.2f} bytes per token on the whole text" in told.out
    assert "wrote tokenizer" in told.out
    following = next(line for line in told.out.splitlines() if line.startswith("next: "))
    words = shlex.split(following)[1:]
    assert words[:2] == ["llamita", "prepare"]
    assert words[words.index("--files") + 1 : words.index("--tokenizer") + 2] == [str(text_file)] * 2 + [
        "--tokenizer",
        "tokenizer",
    ]
    assert told.err == ""  # progress is for terminals


def test_what_it_says_comes_next_works(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_file.write_text("\n\n".join(f"{number}. {TEXT}" for number in range(40)))
    assert main(["tokenizer", "train", str(text_file), "--vocab-size", "280"]) == 0
    following = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert main(shlex.split(following)[2:]) == 0, capsys.readouterr().err
    assert Path("data/manifest.json").exists()


def test_sentencepiece(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--vocab-size", "290", "--kind", "sentencepiece", "--reserved-tokens", "2", "--output", "sp"]
    assert main(["tokenizer", "train", str(text_file), *arguments]) == 0
    assert "290 tokens: 5 special, 256 bytes, 29 learned" in capsys.readouterr().out
    assert Path("sp/tokenizer.model").exists()
    assert Tokenizer.load("sp").special_ids == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vocab-size", "280"], "expected one or more text files, got none"),
        (["absent.txt", "--vocab-size", "280"], "there is no file absent.txt"),
        (["a text.txt", "--vocab-size", "100"], "need 259 or more"),
        (["a text.txt", "--vocab-size", "9999"], "or fewer, or give more text"),
        (["a text.txt", "--vocab-size", "9999", "--kind", "sentencepiece"], "or fewer, or give more text"),
        (["a text.txt", "--vocab-size", "280", "--output", "a text.txt"], "is a file"),
        (["a text.txt", "--vocab-size", "280", "--output", ".", "--overwrite"], "holds more than a tokenizer"),
    ],
)
def test_mistakes_get_one_line(
    text_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["tokenizer", "train", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert [file.name for file in Path().iterdir()] == [text_file.name]
