"""Texts with labels: files of `label ||| sentence` lines, CSV, JSON lines, hub datasets, Meadow's happy or sad.

A label is spelled by its name or, where a mapping names the labels, by its number. Errors name the file and the line.
Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llamita.data import meadow, tables, textfiles
from llamita.data.sources import json_records
from llamita.storage import compressed, files

SEPARATOR = "|||"
SHOWN = 60  # characters of a faulty line that an error quotes
MEADOW = re.compile(r"meadow(:(?P<count>\d+))?")
MEADOW_TEXTS = {"train": 2000, "validation": 500}
HUB = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
Split = Literal["train", "validation"]


class Record(NamedTuple):
    """A text, its label as the source spells it (None: it has none), and where it stands."""

    text: str
    label: str | None
    where: str


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the numbers of their labels: int64 [n], indices into `names`."""

    texts: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def counts(self) -> np.ndarray:
        """The number of texts of each label."""
        return np.bincount(self.labels, minlength=len(self.names))

    def digest(self) -> str:
        """A hash of texts and labels, in order."""
        content = json.dumps([self.names, self.texts, self.labels.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Fields:
    """The names of the text and the label in CSV headers, JSON objects and hub datasets; how TSV is read."""

    text: str = "text"
    label: str = "label"
    tsv_quotes: bool = False
    """Whether fields of a TSV file may stand in quotes, as those of CSV do."""


def read_labelled(
    sources: Sequence[str], split: Split, names: Sequence[str] = (), fields: Fields | None = None
) -> LabelledTexts:
    """The labelled texts of several sources, one after another; see `read_records` for what a source is.

    Without `names` they are the labels found: numbers in order, anything else sorted. ValueError or OSError, in one
    line, for what cannot be read, a text without a label, and where all have the same one: such labels are the
    placeholders of a test file, and nothing can be learned from them or scored against them.
    """
    records = [record for source in sources for record in read_records(source, split, fields)]
    shown = ", ".join(sources)
    for record in records:
        if record.label is None:
            raise ValueError(f"{record.where} has no label; `llamita classify predict` takes texts without labels")
    numbered = bool(names) and not any(name.isdecimal() for name in names)  # numbers may be names themselves: 1 to 5
    found = tuple(names) or names_of(records)
    if len(found) < 2:
        raise ValueError(f"{shown}: expected texts of at least two labels, found {list(found)}")
    labels = np.array([label_id(record, found, numbered) for record in records], dtype=np.int64)
    if len(set(labels.tolist())) < 2:
        one = f"all {len(labels)} texts have the label {found[labels[0]]!r}" if len(labels) else "there is no text"
        raise ValueError(
            f"{shown}: {one}; labels that are all alike are placeholders, which cannot be learned from or scored: "
            "`llamita classify predict` labels such texts"
        )
    return LabelledTexts(tuple(record.text for record in records), labels, found, shown)


def names_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The different labels, by number where all are whole numbers."""
    found = {record.label for record in records if record.label is not None}
    if all(re.fullmatch(r"-?\d+", label) for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def label_id(record: Record, names: Sequence[str], numbered: bool) -> int:
    """The number of a record's label: that of its name or, where `numbered`, the number that it spells."""
    label = record.label or ""
    if label in names:
        return list(names).index(label)
    if numbered and label.isdecimal() and int(label) < len(names):
        return int(label)
    also = f", or a number from 0 to {len(names) - 1}" if numbered else ""
    raise ValueError(f"{record.where}: the label {label!r} is none of {', '.join(names)}{also}")


def read_mapping(path: Path) -> tuple[str, ...]:
    """The names of a label-mapping file: a JSON list of them, or an object that gives each its number."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    value = files.parse_json(path.read_bytes(), f"{path} is not valid JSON")
    if isinstance(value, dict):
        if all(isinstance(name, str) for name in value.values()):  # number to name, as in id2label
            value = {name: int(number) if number.isdecimal() else -1 for number, name in value.items()}
        numbers = [number for number in value.values() if type(number) is int]
        if sorted(numbers) != list(range(len(value))):
            raise ValueError(f"{path} must give the labels the numbers 0 to {len(value) - 1}, each once")
        value = sorted(value, key=value.__getitem__)
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f'{path} must hold a list of labels such as ["bad", "good"], or an object of their numbers')
    if len(set(value)) < max(2, len(value)):
        raise ValueError(f"{path} must name at least two different labels, got {value}")
    return tuple(value)


def validation_of(sources: Sequence[str]) -> tuple[str, ...]:
    """The validation data that goes with training data where every source has some of its own; else nothing."""
    hub = [HUB.fullmatch(source) for source in sources]
    if all(
        MEADOW.fullmatch(source) or (found and not found["split"]) for source, found in zip(sources, hub, strict=True)
    ):
        return tuple(dict.fromkeys(source if found else "meadow" for source, found in zip(sources, hub, strict=True)))
    return ()


def absolute(source: str) -> str:
    """Returns the name of a source from anywhere: files, and directories of datasets, by their whole path."""
    if MEADOW.fullmatch(source):
        return source
    found = HUB.fullmatch(source)
    path = Path(found["name"] if found else source)
    if not path.exists():
        return source
    return f"hub:{path.resolve()}{source[found.end('name') :]}" if found else str(path.resolve())


# --- sources ---------------------------------------------------------------------------------------------------------


def read_records(source: str, split: Split, fields: Fields | None = None, labelled: bool = True) -> Iterator[Record]:
    """The records of one source, in order.

    `meadow` or `meadow:COUNT`: stories of the split. `hub:NAME`, `hub:NAME:CONFIG`, either with `@SPLIT`: a dataset of
    the hub, or a directory of one. Otherwise a file, which may be compressed (.csv.gz): .csv and .tsv with a header,
    .jsonl or .json with an object a line or an array of them, anything else with `label ||| sentence` lines. Without
    `labelled` a text may lack its label, and a line its `|||`.
    """
    fields = fields or Fields()
    if found := MEADOW.fullmatch(source):
        yield from _meadow(int(found["count"] or MEADOW_TEXTS[split]), split)
        return
    if found := HUB.fullmatch(source):
        yield from _hub(found["name"], found["config"], found["split"] or split, fields, labelled)
        return
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file in it, or hub:{path} for a dataset")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a file, meadow, or hub:NAME for a dataset of the hub")
    suffix = compressed.plain_name(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        separator, quoted = ("\t", fields.tsv_quotes) if suffix == ".tsv" else (",", True)
        yield from _table(path, tables.rows(path, separator, quoted), fields, labelled)
    elif suffix in (".jsonl", ".json", ".ndjson"):
        for value, where in json_records(path):
            yield _record(value, fields, where, labelled)
    else:
        yield from _separated(path, labelled)


def _separated(path: Path, labelled: bool) -> Iterator[Record]:
    for number, line in enumerate(textfiles.lines(path), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        label, separator, text = line.partition(SEPARATOR)
        if not separator and labelled:
            raise ValueError(f"{where} is not of the form 'label {SEPARATOR} sentence': {line[:SHOWN]!r}")
        if not separator:
            label, text = "", line
        if labelled and not label.strip():
            raise ValueError(f"{where} has no label before {SEPARATOR}: {line[:SHOWN]!r}")
        yield Record(_text(text.strip(), where), label.strip() or None, where)


def _table(path: Path, rows: Iterator[tuple[list[str], int]], fields: Fields, labelled: bool) -> Iterator[Record]:
    """The records of rows, the first of which names the columns."""
    header, first = next(rows, ([], 0))
    for name in (fields.text, fields.label):
        if header.count(name) > 1:
            raise ValueError(f"{path}, line {first} names the column {name!r} {header.count(name)} times")
    if (
        len(header) == 1
        and header[0] != fields.text
        and (other := next((sign for sign in ";\t|" if sign in header[0]), None))
    ):
        raise ValueError(
            f"{path}, line {first} is one column, {header[0]!r:.{SHOWN}}; columns seem to be parted by {other!r}: part "
            "them by commas in a .csv file, by tabs in a .tsv file"
        )
    for row, number in rows:
        where = f"{path}, line {number}"
        if len(row) == 1 < len(header) and not row[0].strip():
            continue  # a line of spaces is an empty one
        if len(row) != len(header):
            raise ValueError(f"{where} has not the {len(header)} columns of the header, but {len(row)}")
        yield _record(dict(zip(header, row, strict=True)), fields, where, labelled)


def _hub(name: str, config: str | None, split: str, fields: Fields, labelled: bool) -> Iterator[Record]:
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the library and its HTTP client have many kinds
        raise OSError(f"dataset {name!r} could not be opened: {type(error).__name__}: {error}") from error
    known = getattr(rows.features.get(fields.label), "names", None)
    for number, row in enumerate(rows):
        label = row.get(fields.label)
        if known and isinstance(label, int):
            row[fields.label] = known[label] if label >= 0 else None  # -1 stands for none in unlabelled splits
        yield _record(row, fields, f"{name} ({split}), row {number}", labelled)


def _meadow(count: int, split: Split) -> Iterator[Record]:
    for number, text in enumerate(islice(meadow.corpus(0, count, split), count)):
        story = meadow.parse(text)
        assert story is not None, f"a generated story does not parse: {text}"
        yield Record(text, meadow.label(story), f"meadow ({split}), story {number}")


def _record(value: Any, fields: Fields, where: str, labelled: bool) -> Record:
    """A record of an object with a field for the text and one for the label, which is a text or a whole number."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, not an object with {fields.text!r} and {fields.label!r}")
    for name, flag in ((fields.text, "--text-field"), (fields.label, "--label-field")):
        if name not in value and (labelled or name == fields.text):
            raise ValueError(f"{where} has no field {name!r}, only {sorted(map(str, value))}; pass {flag}")
    text, label = value[fields.text], value.get(fields.label)
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {fields.text!r} is {type(text).__name__}, not text")
    if label is not None and type(label) not in (str, int):
        raise ValueError(f"{where}: field {fields.label!r} is {type(label).__name__}, not a name or a whole number")
    return Record(_text(text, where), None if label is None else _text(str(label).strip(), where) or None, where)


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half of a surrogate pair, which is not text") from None
    return text
