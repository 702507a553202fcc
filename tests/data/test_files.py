"""Files as they come: compressed, as arrays of JSON, and as tables; held to Python's own readers."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import threading
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamita.data import sources, tables, textfiles
from llamita.data.labelled import Fields, read_labelled, read_records
from llamita.data.sources import Source, documents, json_records
from llamita.storage import compressed
from llamita.text import corpus

TEXT = "Où est l'élève?\r\n\nThe fox.\n" * 3


def zstd(data, **options):
    return pytest.importorskip("zstandard").ZstdCompressor(**options).compress(data)


PACKED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip in members": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]),
    "zstd": zstd,
    "zstd in frames": lambda data: zstd(data[:7]) + b"\x50\x2a\x4d\x18\x02\x00\x00\x00hi" + zstd(data[7:]),
    "zstd of unknown size": lambda data: (
        pytest.importorskip("zstandard").ZstdCompressor().compressobj().compress(b"") + _streamed(data)
    ),
}


def _streamed(data):
    stream = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst", "a"])
@pytest.mark.parametrize("form", PACKED)
def test_a_compressed_file_is_read_as_what_it_is(tmp_path, form, name):
    """By its first bytes: a name may say something else."""
    path = tmp_path / name
    path.write_bytes(PACKED[form](TEXT.encode()))
    assert "".join(textfiles.chunks(path)) == TEXT.replace("\r\n", "\n")
    assert "".join(corpus.read_chunks([path])) == TEXT
    assert next(documents(Source("text", files=(path,)))) == "Où est l'élève?"
    assert compressed.read(path) == TEXT.encode()
    assert (Source("text", files=(path,)).total_bytes is None) == (form != "plain")


def test_zstandard_that_refers_far_back_is_read(tmp_path):
    """As `zstd --long=31` writes it, which the library refuses unless it is told the size of the window."""
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, hash_log=6, chain_log=6)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(stream.compress(TEXT.encode()) + stream.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert compressed.read(path) == TEXT.encode()


def _parquet():
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": ["a"], "label": ["b"]}), file := io.BytesIO())
    return file.getvalue()


def _arrow():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_file(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def _zip():
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


@pytest.mark.parametrize(("content", "kind"), [
    (_parquet, "a Parquet file, not text; give the directory it is in as a dataset"),
    (_arrow, "an Arrow file, not text; give the directory it is in as a dataset"),
    (lambda: bz2.compress(b"text"), "compressed with bzip2, .*bunzip2"),
    (lambda: lzma.compress(b"text"), "compressed with xz, .*xz -d"),
    (_zip, "a ZIP file"),
], ids=["parquet", "arrow", "bzip2", "xz", "zip"])  # fmt: skip
def test_a_file_of_another_kind_is_named(tmp_path, content, kind):
    path = tmp_path / "a.csv"
    path.write_bytes(content())
    for read in (lambda: read_labelled([str(path)], "train"), lambda: list(corpus.read_chunks([path]))):
        with pytest.raises(ValueError, match=rf"a\.csv is {kind}"):
            read()


@pytest.mark.parametrize("text", ["PAR1 is a word", "BZh9 too", "ARROW1", "PK"])
def test_text_that_begins_like_another_file_is_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert list(textfiles.lines(tmp_path / "a")) == [text]


@pytest.mark.parametrize("form", ["gzip", "zstd"])
@pytest.mark.parametrize("harm", [lambda data: data[:-5], lambda data: data[:12] + b"\xff\xff\xff" + data[15:]])
def test_a_damaged_file_is_one_line(tmp_path, form, harm):
    path = tmp_path / "a.jsonl"
    path.write_bytes(harm(PACKED[form](json.dumps({"a": list(range(5000))}).encode())))
    with pytest.raises(ValueError, match=r"a\.jsonl is compressed and damaged, or cut short: ") as found:
        list(json_records(path))
    assert "\n" not in str(found.value)


def test_zstandard_that_is_missing_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"\x28\xb5\x2f\xfd1234")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a is compressed with Zstandard, .*: pip install zstandard; or unpack it"):
        list(textfiles.lines(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "a.txt.gz", "a.csv.zst"])
def test_labelled_texts_may_be_compressed(tmp_path, name):
    content = {
        "csv": "text,label\nfine,1\nbad,0\n",
        "tsv": "text\tlabel\nfine\t1\nbad\t0\n",
        "jsonl": '{"text": "fine", "label": 1}\n{"text": "bad", "label": 0}\n',
        "txt": "1 ||| fine\n0 ||| bad\n",
    }[name.split(".")[1]]
    (tmp_path / name).write_bytes(PACKED["zstd" if name.endswith("zst") else "gzip"](content.encode()))
    found = read_labelled([str(tmp_path / name)], "train")
    assert (found.texts, found.labels.tolist()) == (("fine", "bad"), [1, 0])


# --- arrays of JSON --------------------------------------------------------------------------------------------------

RECORDS = [
    {"a": 1},
    {"b": ["]", "[", {"c": '}{,\\"\n'}]},
    {"text": "Où 🦙 \u2028"},
    {},
    {"n": -1.5e3, "t": True, "z": None},
]
ARRAYS = {
    "one line": json.dumps(RECORDS),
    "indented": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "an entry a line": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "spaces and a mark": "\ufeff \n\t[ " + " , ".join(map(json.dumps, RECORDS)) + " ] \n\n",
    "commas first": "[" + "\n,".join(map(json.dumps, RECORDS)) + "]",
}


@pytest.mark.parametrize("chunk", [3, 4, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ARRAYS)
def test_an_array_is_read_where_lines_are_expected(tmp_path, form, chunk, monkeypatch):
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.jsonl"
    path.write_text(ARRAYS[form], "utf-8")
    found = list(json_records(path))
    assert [value for value, _ in found] == json.loads(ARRAYS[form].removeprefix("\ufeff")) == RECORDS
    text = ARRAYS[form].removeprefix("\ufeff")
    for number, (_, where) in enumerate(found, start=1):
        line = int(re.fullmatch(rf".*a\.jsonl, entry {number} \(line (\d+)\)", where)[1])
        assert text.split("\n")[line - 1].count("{")  # the line that the entry begins in


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ('[{"a": 1},\n{"b" 2}]', 1, r"a, entry 2 \(line 2\) is not JSON: Expecting ':'"),
        ('[{"a": 1}\n{"b": 2}]', 1, "a, line 2: expected , or ] in the array, got '{'"),
        ('[{"a": 1},', 1, "a begins an array of JSON that does not end: 1 entries are whole"),
        ('[{"a": 1}', 1, "a begins an array of JSON that does not end: 1 entries are whole"),
        ('[{"a": 1}]\n[{"b": 2}]', 1, "a, line 2: text follows behind the array"),
        ('[{"a": 1,', 0, r"a, entry 1 \(line 1\) is not JSON"),
        ('[{"a": 1}, ]', 1, r"a, entry 2 \(line 1\) is not JSON"),
    ],
)
def test_what_is_wrong_with_an_array_is_told_with_its_place(tmp_path, text, count, message):
    (tmp_path / "a").write_text(text)
    found = []
    with pytest.raises(ValueError, match=message.replace("]", "\\]") if "expected" in message else message):
        found.extend(json_records(tmp_path / "a"))
    assert len(list(_until_fault(tmp_path / "a"))) == count


def _until_fault(path):
    with pytest.raises(ValueError, match="a"):
        yield from json_records(path)


def test_lines_that_are_arrays_are_lines(tmp_path):
    (tmp_path / "a").write_text('[1, 2]\n[]\n["x"]\n')
    assert [value for value, _ in json_records(tmp_path / "a")] == [[1, 2], [], ["x"]]
    (tmp_path / "b").write_text("\n\n")
    assert list(json_records(tmp_path / "b")) == []
    faults = []
    (tmp_path / "c").write_text('{"a": 1}\n{\n{"b": 2}\n')
    assert [value for value, _ in json_records(tmp_path / "c", faults.append)] == [{"a": 1}, {"b": 2}]
    assert [str(fault).partition(": ")[0] for fault in faults] == [f"{tmp_path / 'c'}, line 2 is not JSON"]


def test_an_array_of_documents(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert list(documents(Source("jsonl", files=(tmp_path / "a.json",)))) == ["one", "two"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"body": "two"}], indent=1))
    with pytest.raises(ValueError, match=r"a\.json, entry 2 \(line 5\) has no field 'text'"):
        list(documents(Source("jsonl", files=(tmp_path / "a.json",))))


# --- tables ----------------------------------------------------------------------------------------------------------

CELLS = st.text(alphabet='ab ,;\t"\n|é', max_size=8)
TABLE = st.lists(st.lists(CELLS, min_size=2, max_size=4), min_size=1, max_size=6)


@settings(deadline=None)
@given(TABLE, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from([",", "\t"]))
@example([['"', ""], ["", 'x"y"'], ["\n\n", '""']], csv.QUOTE_MINIMAL, ",")
def test_rows_in_quotes_are_those_of_pythons_own_reader(tmp_path_factory, rows, quoting, separator):
    written = io.StringIO()
    csv.writer(written, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(rows)
    path = tmp_path_factory.mktemp("table") / "a.csv"
    path.write_text(written.getvalue(), "utf-8")
    reader = csv.reader(io.StringIO(written.getvalue()), delimiter=separator, strict=True)
    expected = [(row, reader.line_num) for row in reader if row]
    assert list(tables.rows(path, separator, True)) == expected
    assert [row for row, _ in expected] == rows


@pytest.mark.parametrize(
    "text", ['a "b" c,1\n', '5" disk,1\n', ' "a",1\n', '"a",\n', "\n,\n\n,,\n", '"a\n\nb",""\n', 'x,"y"']
)
def test_rows_that_a_writer_would_not_make_are_read_as_python_reads_them(tmp_path, text):
    (tmp_path / "a").write_text(text)
    expected = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    assert [row for row, _ in tables.rows(tmp_path / "a", ",", True)] == expected


def test_a_field_may_be_of_any_length(tmp_path):
    long = "word, " * 60_000
    assert len(long) > csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",1\n{"x" * 400_000},0\n')
    found = read_labelled([str(tmp_path / "a.csv")], "train")
    assert found.texts == (long, "x" * 400_000)
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{long}\t1\nx\t0\n")
    assert read_labelled([str(tmp_path / "a.tsv")], "train").texts == (long, "x")


def test_a_quote_in_tsv_is_a_character_unless_asked_otherwise(tmp_path):
    content = 'text\tlabel\n"Fine" he said\t1\n5" disk\t0\n"\t1\n""\t0\n"all"\t1\n'
    (tmp_path / "a.tsv").write_text(content)
    found = list(read_records(str(tmp_path / "a.tsv"), "train"))
    assert [(record.text, record.label) for record in found] == [
        ('"Fine" he said', "1"),
        ('5" disk', "0"),
        ('"', "1"),
        ('""', "0"),
        ('"all"', "1"),
    ]
    assert found[2].where.endswith("a.tsv, line 4")
    (tmp_path / "b.tsv").write_text('text\tlabel\n"two\nlines\tand a tab"\t1\n"a ""b"""\t0\n')
    found = list(read_records(str(tmp_path / "b.tsv"), "train", Fields(tsv_quotes=True)))
    assert [(record.text, record.label) for record in found] == [("two\nlines\tand a tab", "1"), ('a "b"', "0")]
    with pytest.raises(ValueError, match=r"b\.tsv, line 2 has not the 2 columns of the header, but 1"):
        list(read_records(str(tmp_path / "b.tsv"), "train"))
    with pytest.raises(ValueError, match=r"a\.tsv, line 2 is not CSV: expected '\\t' or the end of the line"):
        list(read_records(str(tmp_path / "a.tsv"), "train", Fields(tsv_quotes=True)))
    (tmp_path / "c.csv").write_text('text,label\nx,1\n"never\nends,0\n')
    with pytest.raises(ValueError, match=r"c\.csv, line 3 is not CSV: a quote begins a field there and none ends it"):
        list(read_records(str(tmp_path / "c.csv"), "train"))


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', '[{"a": 1}, {"a": 2}]'])
def test_a_pipe_is_read_once(tmp_path, form, text):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(PACKED[form](text.encode()),))
    writer.start()
    assert [value for value, _ in json_records(path)] == [{"a": 1}, {"a": 2}]
    writer.join()


def test_sources_says_where_arrays_begin(tmp_path):
    for text, expected in [("[{}]", True), (" \n[\n {", True), ("[[{}]]", False), ("{}", False), ("", False)]:
        (tmp_path / "a").write_text(text)
        found, pieces = sources.array_or_lines(tmp_path / "a")
        assert found == expected, text
        assert "".join(pieces) == text
