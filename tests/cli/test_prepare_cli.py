"""`llamita prepare` and `llamita data show` as typed: what they print, and one line for each mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from llamita.cli import data as data_cli
from llamita.cli.main import main
from llamita.cli.prepare import describe
from llamita.data import meadow
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig
from llamita.data.prepare import Progress
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe_from_iterator(meadow.corpus(0, 200, "train"), vocab_size=400).save(directory)
    return directory


@pytest.fixture
def data_dir(tmp_path, tokenizer_dir, capsys) -> Path:
    arguments = ["prepare", "--source", "meadow", "--documents", "40", "--seed", "2", "--workers", "1"]
    assert main([*arguments, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def test_prepare_prints_a_summary(data_dir, capsys):
    printed = capsys.readouterr().out
    manifest = json.loads((data_dir / "manifest.json").read_text())
    for name, split in manifest["splits"].items():
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert row.split()[1:3] == [f"{split['documents']:,}", f"{split['tokens']:,}"]
    assert f"wrote {data_dir}" in printed
    assert (manifest["splits"]["train"]["documents"], manifest["splits"]["validation"]["documents"]) == (40, 4)


def test_every_option_of_a_text_file(tmp_path, tokenizer_dir):
    (tmp_path / "t.txt").write_text("First citizen.\n\nSecond citizen.\n" * 20)
    arguments = [
        "prepare",
        "--source",
        "text",
        "--files",
        str(tmp_path / "t.txt"),
        "--separator",
        "file",
        "--split",
        "tail",
    ]
    arguments += ["--validation-share", "0.2", "--no-bos", "--no-eos", "--workers", "1"]
    assert main([*arguments, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "data")]) == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert [split["characters"] for split in manifest["splits"].values()] == [512, 128]
    assert not manifest["adds_bos"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--files", "nothing.txt"], "there is no file nothing.txt"),
    (["--source", "meadow"], "pass --documents N"),
    (["--source", "meadow", "--documents", "5", "--validation-share", "2"], "validation_share=2.0 must be"),
    (["--source", "meadow", "--documents", "5", "--workers", "0"], "workers=0 must be at least 1"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, tokenizer_dir, capsys, arguments, message):
    status = main(["prepare", *arguments, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "data")])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.err.strip().startswith("error: ")
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_show_without_colours(data_dir, capsys):
    capsys.readouterr()
    assert main(["data", "show", str(data_dir), "--mode", "pad", "--sequence-length", "300", "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    story = next(meadow.corpus(2, 1, "train"))
    assert f"⟦<s>⟧{story[:40]}" in printed
    assert "\x1b" not in printed
    assert "<padding x " in printed
    assert "40 documents" in printed
    assert "0 of 4 validation documents are in the training split too" in printed
    assert "truncated" in printed
    assert "fully masked" in printed


@pytest.mark.parametrize("mode", ["pad", "pack", "best-fit", "random"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_show_every_mode(data_dir, capsys, mode, split):
    arguments = [
        "data",
        "show",
        str(data_dir),
        "--mode",
        mode,
        "--split",
        split,
        "--rows",
        "3",
        "--sequence-length",
        "16",
    ]
    capsys.readouterr()
    assert main([*arguments, "--within-documents"]) == 0
    assert capsys.readouterr().out.count(" tokens scored ") == 3


def test_show_with_colours(tokenizer_dir):
    tokenizer = Tokenizer.load(tokenizer_dir)
    documents = InMemoryDocuments([[1, *tokenizer.encode("red [bold]fox\x1b[2J"), 2]])
    (row,) = Rows(documents, RowsConfig("pad", 40), pad_id=2)
    output = io.StringIO()
    Console(file=output, force_terminal=True, color_system="standard", soft_wrap=True).print(
        data_cli.row_text(row, tokenizer, colours=True)
    )
    padding = 41 - len(documents.tokens)
    assert output.getvalue() == (
        f"\x1b[33m<s>\x1b[0m\x1b[32mred [bold]fox␛[2J</s>\x1b[0m\x1b[90m<padding x {padding}>\x1b[0m\n"
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--split", "test"], "has no split 'test'"),
    (["--first", "100000"], "first=100000 must be"),
    (["--sequence-length", "0"], "sequence_length=0"),
    (["--mode", "random", "--sequence-length", "1000000"], "fewer than one random window"),
])  # fmt: skip
def test_mistakes_in_show(data_dir, capsys, arguments, message):
    capsys.readouterr()
    assert main(["data", "show", str(data_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_show_where_there_is_no_data(tmp_path, capsys):
    assert main(["data", "show", str(tmp_path)]) == 2
    assert "holds no prepared data" in capsys.readouterr().err


def test_show_on_a_terminal_of_few_characters(data_dir):
    """A corpus has characters that stdout may not: they are replaced, nothing fails."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "llamita.cli.main", "data", "show", str(data_dir), "--rows", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?<s>?" in done.stdout


def test_progress_line():
    assert describe(Progress(1200, 34_000, 5_000_000, 20_000_000, 2.0)) == "1,200 documents, 34,000 tokens"
