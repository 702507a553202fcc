"""The sources of documents: text files, WikiText, JSON lines, a Hugging Face dataset, or Meadow.

`documents(source)` gives one string after another, the same each time, in memory bounded by the longest of them. Knows
nothing about tokens, splits of a corpus or where documents go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from llamita.data import meadow, textfiles, wikitext
from llamita.storage import compressed

ARRAY_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
ARRAY_PERHAPS = re.compile(r"\s*(\[\s*)?")
SPACE = re.compile(r"[ \t\n\r]*")
OnFault = Callable[[ValueError], None]
SourceKind = Literal["text", "wikitext", "jsonl", "hub", "meadow"]


@dataclass(frozen=True)
class Source:
    """A stream of documents that can be read again from its start."""

    kind: SourceKind
    files: tuple[Path, ...] = ()
    """text, wikitext and jsonl: read in this order."""
    separator: textfiles.Separator = "blank-line"
    """text: what lies between documents."""
    text_field: str = "text"
    """jsonl and hub: the field or column that holds a document."""
    dataset: str = ""
    """hub: the name of a dataset, or a local directory of one."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    """hub: which split of the dataset."""
    rows_are_lines: bool = False
    """hub: the rows are the lines of WikiText files; put articles together."""
    limit: int | None = None
    """At most this many documents; meadow needs it."""
    seed: int = 0
    """meadow: which stories, with `corpus`."""
    corpus: Literal["train", "validation"] = "train"

    def check(self) -> None:
        """Raise for what can be known to fail before anything is read."""
        if self.kind in ("text", "wikitext", "jsonl"):
            if not self.files:
                raise ValueError(f"source {self.kind} reads files, and none were given; pass --files FILE ...")
            for path in self.files:
                if not path.exists():
                    raise FileNotFoundError(f"there is no file {path}")
                if path.is_dir():
                    raise IsADirectoryError(f"{path} is a directory; pass the files in it")
        if self.kind == "hub" and not self.dataset:
            raise ValueError("source hub needs the name of a dataset or its directory; pass --dataset NAME")
        if self.kind == "meadow" and not self.limit:
            raise ValueError("source meadow writes as many stories as asked for; pass --documents N")

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the files, about what the documents will come to; None where it is not known."""
        if (
            self.limit is not None
            or not self.files
            or any(map(compressed.compression, filter(Path.is_file, self.files)))
        ):
            return None
        return sum(path.stat().st_size for path in self.files)


def files_in(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The paths with each directory replaced by all files in it and below it, sorted; hidden ones are left out.

    FileNotFoundError for a directory without files.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = (file for file in path.rglob("*") if file.is_file())
        visible = [file for file in inside if not any(n.startswith(".") for n in file.relative_to(path).parts)]
        if not visible:
            raise FileNotFoundError(f"there are no files in {path}")
        found += sorted(visible)
    return tuple(found)


def documents(source: Source) -> Iterator[str]:
    """The documents of a source, in order; some may be empty.

    ValueError or OSError, in one line, for files or rows that cannot be read.
    """
    source.check()
    return islice(_all_documents(source), source.limit)


def _all_documents(source: Source) -> Iterator[str]:
    if source.kind == "text":
        return chain.from_iterable(textfiles.documents(path, source.separator) for path in source.files)
    if source.kind == "wikitext":
        return chain.from_iterable(wikitext.articles(textfiles.lines(path)) for path in source.files)
    if source.kind == "jsonl":
        records = chain.from_iterable(json_records(path) for path in source.files)
        return (_text_of(record, source.text_field, where) for record, where in records)
    if source.kind == "hub":
        found = hub_records(source.dataset, source.dataset_config, source.dataset_split)
        rows = (_text_of(record, source.text_field, where) for record, where in found)
        return wikitext.articles(rows) if source.rows_are_lines else rows
    if source.kind == "meadow":
        assert source.limit is not None
        return meadow.corpus(source.seed, source.limit, source.corpus)
    raise ValueError(f"source={source.kind!r} is not known; use text, wikitext, jsonl, hub or meadow")


def json_records(path: Path, on_fault: OnFault | None = None) -> Iterator[tuple[Any, str]]:
    """The value of each line that is not blank, or each entry of the array that a file is; and its place for errors.

    ValueError for a line that is no JSON, unless `on_fault` takes it; an array that is broken is read no further.
    """
    is_array, pieces = array_or_lines(path)
    if is_array:
        yield from array_records(path, pieces)
        return
    for number, line in enumerate(textfiles.lines_of(pieces), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a value stands in one line, as jq -c . writes it" if line.strip() in ("{", "[") else ""
            fault = ValueError(f"{where} is not JSON: {error}{hint}")
            if on_fault is None:
                raise fault from None
            on_fault(fault)
        else:
            yield value, where


def array_or_lines(path: Path) -> tuple[bool, Iterator[str]]:
    """Whether a file is one array of objects, not a value a line; and its text, read once, as a pipe can be."""
    pieces = textfiles.chunks(path)
    begin = ""
    for text in pieces:
        begin += text
        if ARRAY_PERHAPS.fullmatch(begin) is None:
            break
    return ARRAY_OF_OBJECTS.match(begin) is not None, chain([begin] * bool(begin), pieces)


def array_records(path: Path, pieces: Iterator[str]) -> Iterator[tuple[Any, str]]:
    """The entries of an array, one after the other; memory is bounded by the longest, and a piece of the file."""
    decoder = json.JSONDecoder()
    text, place, line = "", 0, 1
    separator, number = "[", 0
    while True:
        blank = SPACE.match(text, place)
        assert blank is not None
        line += text.count("\n", place, blank.end())
        text, place = text[blank.end() :], 0
        if not text:
            piece = next(pieces, None)
            if piece is None:
                if separator:
                    raise ValueError(f"{path} begins an array of JSON that does not end: {number} entries are whole")
                return
            text = piece
        elif not separator:
            raise ValueError(f"{path}, line {line}: text follows behind the array that the file begins with")
        elif separator == "value":
            where = f"{path}, entry {number + 1} (line {line})"
            while True:
                try:
                    value, place = decoder.raw_decode(text)
                    fault = None
                except (ValueError, RecursionError) as error:
                    fault = error
                if fault is None and place < len(text):
                    break
                more = "".join(islice(pieces, 1 + len(text) // textfiles.CHUNK_BYTES))
                if not more:
                    break
                text += more
            if fault is not None:
                raise ValueError(f"{where} is not JSON: {fault}")
            line += text.count("\n", 0, place)
            number += 1
            yield value, where
            separator = ",]"
        elif text[0] not in separator:
            raise ValueError(f"{path}, line {line}: expected {' or '.join(separator)} in the array, got {text[0]!r}")
        else:
            separator, place = ("" if text[0] == "]" else "value"), 1


def hub_records(dataset: str, config: str | None, split: str) -> Iterator[tuple[Any, str]]:
    """The rows of a Hugging Face dataset, by its name or its local directory, and where each stands."""
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the library and its HTTP client have many kinds
        raise OSError(f"dataset {dataset!r} could not be opened: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows):
        yield row, f"{dataset} ({split}), row {number}"


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, not an object with the field {field!r}")
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}, only {sorted(record)}; pass --text-field")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half of a surrogate pair, which is not text") from None
    return text
