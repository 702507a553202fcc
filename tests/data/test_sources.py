"""Documents out of files, JSON lines, datasets and Meadow; and what is said of those that cannot be read."""

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data import meadow, textfiles
from llamita.data.sources import Source, documents


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def text(path: Path, separator: str) -> list[str]:
    return list(documents(Source("text", (path,), separator=separator)))


@pytest.mark.parametrize(("content", "expected"), [
    ("a\nb\n\nc\n", ["a\nb", "c"]),
    ("\n\n a\n \t\n\n\nb", [" a", "b"]),
    ("a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
    ("a\rb\r\rc", ["a\nb", "c"]),
    ("\ufeffa\n\nb", ["a", "b"]),
    ("a\x0bb\x85c\u2028d\n\ne", ["a\x0bb\x85c\u2028d", "e"]),
    ("", []),
    ("\n\n", []),
])  # fmt: skip
def test_blank_lines(tmp_path, content, expected):
    assert text(write(tmp_path / "t.txt", content), "blank-line") == expected


@pytest.mark.parametrize(("content", "expected"), [
    ("a\n<|endoftext|>\nb\n\nc\n<|endoftext|>\n", ["a", "b\n\nc"]),
    ("a<|endoftext|>b", ["a", "b"]),
    ("a<|endoftext|><|endoftext|>b", ["a", "", "b"]),
    ("a<|endoftex", ["a<|endoftex"]),
    ("", [""]),
])  # fmt: skip
def test_end_of_text_markers(tmp_path, content, expected):
    assert text(write(tmp_path / "t.txt", content), "<|endoftext|>") == expected


def test_whole_files(tmp_path):
    paths = write(tmp_path / "a.txt", "\ufeff a\r\n\r\nb \n"), write(tmp_path / "b.txt", "")
    assert list(documents(Source("text", paths, separator="file"))) == [" a\n\nb \n", ""]


# A few bytes at a time, so that characters, line ends and markers fall across the pieces.
@given(
    st.lists(st.sampled_from(["a", "é", "\U0001f600", "\r\n", "\n", "\r", " ", "<|endoftext|>", "<|end"]), max_size=40)
)
def test_pieces_do_not_matter(tmp_path_factory, parts):
    path = write(tmp_path_factory.mktemp("pieces") / "t.txt", "".join(parts))
    whole = {separator: text(path, separator) for separator in ("blank-line", "<|endoftext|>", "file")}
    universal = path.read_text(encoding="utf-8")
    assert whole["file"] == [universal]
    assert list(textfiles.lines(path)) == universal.removesuffix("\n").split("\n") * bool(universal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "CHUNK_BYTES", 3)
        assert {separator: text(path, separator) for separator in whole} == whole


@pytest.mark.parametrize("before", [0, 10, (1 << 20) - 1, 1 << 20, 3_000_000])
def test_bad_utf8_is_named_with_its_offset(tmp_path, before):
    path = write(tmp_path / "bad.txt", b"a" * before + b"\xff more")
    with pytest.raises(ValueError, match=rf"bad.txt is not UTF-8: byte 0xff at offset {before} "):
        text(path, "blank-line")


def test_utf8_cut_at_the_end_and_after_a_mark(tmp_path):
    with pytest.raises(ValueError, match="byte 0xc3 at offset 3"):
        text(write(tmp_path / "cut.txt", b"abc\xc3"), "file")
    with pytest.raises(ValueError, match="byte 0xff at offset 4"):
        text(write(tmp_path / "mark.txt", b"\xef\xbb\xbfa\xff"), "file")
    with pytest.raises(ValueError, match=r"byte 0xff at offset 0 .*; convert the file, .* it begins as UTF-16 does"):
        text(write(tmp_path / "utf16.txt", "text".encode("utf-16")), "file")


def test_one_huge_line(tmp_path):
    line = "word " * 2_000_000
    assert text(write(tmp_path / "huge.txt", line), "blank-line") == [line]


def test_json_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"text": "a\\n\\nb"}\n\n{"text": "", "n": 1}\r\n{"text": "\\ud83d\\ude00"}')
    assert list(documents(Source("jsonl", (path,)))) == ["a\n\nb", "", "\U0001f600"]
    path = write(tmp_path / "e.jsonl", '{"body": "x"}')
    assert list(documents(Source("jsonl", (path,), text_field="body"))) == ["x"]


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2 is not JSON"),
    ('{\n  "text": "a"\n}', "line 2 is not JSON: .*; a value stands in one line, as jq -c . writes it"),
    ("[1]", "line 2 is list, not an object"),
    ('{"body": "x", "id": 1}', r"line 2 has no field 'text', only \['body', 'id'\]; pass --text-field"),
    ('{"text": null}', "line 2: field 'text' is NoneType, not text"),
    ('{"text": "ab\\ud800"}', "line 2: character 2 is half of a surrogate pair"),
])  # fmt: skip
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(documents(Source("jsonl", (path,))))


def test_a_dataset_by_name(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, texts in (("train", ["one", "", "three"]), ("test", ["four"])):
        write(folder / f"{split}.jsonl", "\n".join(json.dumps({"text": t, "n": len(t)}) for t in texts))
    source = Source("hub", dataset=str(folder))
    assert list(documents(source)) == ["one", "", "three"]
    assert list(documents(source)) == ["one", "", "three"], "read again from the start"
    assert list(documents(Source("hub", dataset=str(folder), dataset_split="test"))) == ["four"]
    assert list(documents(Source("hub", dataset=str(folder), limit=1))) == ["one"]
    with pytest.raises(ValueError, match=r"row 0 has no field 'body', only \['n', 'text'\]"):
        list(documents(Source("hub", dataset=str(folder), text_field="body")))
    with pytest.raises((ValueError, OSError), match="validation"):
        list(documents(Source("hub", dataset=str(folder), dataset_split="validation")))


def test_a_dataset_of_wikitext_lines(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "wiki"
    folder.mkdir()
    lines = ["", " = One = \n", "", " Text . \n", "", " = Two = \n", "", " Text . \n"]
    write(folder / "train.jsonl", "\n".join(json.dumps({"text": line}) for line in lines))
    found = list(documents(Source("hub", dataset=str(folder), rows_are_lines=True)))
    assert found == ["= One =\nText .", "= Two =\nText ."]


def test_a_dataset_that_is_not_there(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="nowhere"):
        list(documents(Source("hub", dataset=str(tmp_path / "nowhere"))))


def test_meadow():
    source = Source("meadow", limit=5, seed=3)
    assert list(documents(source)) == list(islice(meadow.corpus(3, 5, "train"), 5))
    validation = list(documents(Source("meadow", limit=5, seed=3, corpus="validation")))
    assert len(validation) == 5
    assert not set(validation) & set(documents(source))


def test_limit(tmp_path):
    path = write(tmp_path / "t.txt", "a\n\nb\n\nc")
    assert list(documents(Source("text", (path,), limit=2))) == ["a", "b"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.txt"):
        documents(Source("text", (tmp_path / "nothing.txt",)))
    with pytest.raises(IsADirectoryError, match="is a directory"):
        documents(Source("wikitext", (tmp_path,)))
    with pytest.raises(ValueError, match="pass --files"):
        documents(Source("jsonl"))
    with pytest.raises(ValueError, match="pass --dataset"):
        documents(Source("hub"))
    with pytest.raises(ValueError, match="pass --documents"):
        documents(Source("meadow"))
    with pytest.raises(ValueError, match="source='pdf' is not known"):
        documents(Source("pdf"))
    with pytest.raises(ValueError, match="separator='tab' is not known"):
        text(write(tmp_path / "t.txt", "a"), "tab")
