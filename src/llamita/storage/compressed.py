"""Files that may be compressed, read as what they are: gzip and Zstandard, known by their first bytes, not their names.

Knows nothing of what files hold.
"""

import contextlib
import gzip
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

Compression = Literal["gzip", "zstd"]
READ_BYTES = 1 << 17
SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
GZIP = b"\x1f\x8b\x08"
ZSTD = (
    b"\x28\xb5\x2f\xfd",
    *(bytes([0x50 + low]) + b"\x2a\x4d\x18" for low in range(16)),
)  # frames, and skippable ones

LARGEST_WINDOW = 1 << 31
"""How far back Zstandard may refer: dumps of the web are made with `--long=31`, which the library refuses by itself."""
OTHERS = (
    (rb"PAR1\x15", "a Parquet file, not text; give the directory it is in as a dataset"),
    (rb"ARROW1\0", "an Arrow file, not text; give the directory it is in as a dataset"),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2, which is not read here; unpack it: bunzip2"),
    (rb"\xfd7zXZ\0", "compressed with xz, which is not read here; unpack it: xz -d"),
    (rb"\x04\x22\x4d\x18", "compressed with LZ4, which is not read here; unpack it: lz4 -d"),
    (rb"PK\x03\x04", "a ZIP file, as those of Excel and Word are too; unpack it, or save it as text"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
)
"""What other files begin with that are given where text is expected, and what to do with them."""


class Reader:
    """The bytes of a file, decompressed; `consumed` of those on the disk have been taken."""

    def __init__(self, path: Path, file: BinaryIO, content: Any, faults: tuple[type[Exception], ...]) -> None:
        self._path, self._file, self._content, self._faults = path, file, content, faults

    def read(self, count: int) -> bytes:
        """`count` bytes, fewer at the end alone; ValueError for a file that is damaged or cut short."""
        pieces: list[bytes] = []
        try:
            while count and (piece := self._content.read(count)):
                pieces.append(piece)
                count -= len(piece)
            return b"".join(pieces)
        except self._faults as error:
            raise ValueError(f"{self._path} is compressed and damaged, or cut short: {error}") from None

    @property
    def consumed(self) -> int:
        return self._file.tell() if self._file.seekable() else 0


def compression(path: Path) -> Compression | None:
    """How a file is compressed, by its first bytes."""
    with open(path, "rb") as file:
        return _kind(file)


def _kind(file: BufferedReader) -> Compression | None:
    begin = file.peek(4)[:4]  # what is peeked at is still to be read, from a pipe too
    if begin.startswith(GZIP):
        return "gzip"
    return "zstd" if begin in ZSTD else None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """A file to read; ValueError for Zstandard where nothing that reads it is installed."""
    with open(path, "rb") as file:
        kind = _kind(file)
        if kind == "gzip":
            with gzip.GzipFile(fileobj=file) as content:
                yield Reader(path, file, content, (gzip.BadGzipFile, EOFError, zlib.error))
        elif kind == "zstd":
            content, faults = _zstd(path, file)
            with content:
                yield Reader(path, file, content, faults)
        else:
            yield Reader(path, file, file, ())


def other_kind(begin: bytes) -> str:
    """What a file is that begins so, and what to do with it; empty where it may be text."""
    return next((about for pattern, about in OTHERS if re.match(pattern, begin)), "")


def plain_name(path: Path) -> Path:
    """The name of a file without what tells that it is compressed: data.csv of data.csv.gz."""
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def read(path: Path) -> bytes:
    """All bytes of a file, decompressed."""
    with opened(path) as reader:
        pieces = []
        while piece := reader.read(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


class Frames:
    """The content of Zstandard frames one after the other, through the package zstandard.

    Its own reader takes a file that is cut short for one that ends.
    """

    def __init__(self, file: BinaryIO, decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame = decompressor.decompressobj()
        self._begun, self._held = False, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._held = b""

    def read(self, count: int) -> bytes:
        while not self._held:
            piece = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(READ_BYTES)
            if not piece:
                if self._begun and not self._frame.eof:
                    raise EOFError("it ends inside of a frame")
                break
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._begun = True
            self._held = self._frame.decompress(piece)
        found, self._held = self._held[:count], self._held[count:]
        return found


def _zstd(path: Path, file: BinaryIO) -> tuple[Any, tuple[type[Exception], ...]]:
    """A reader of all frames of a file, and what it raises."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path} is compressed with Zstandard, which needs a package: pip install zstandard; or unpack it: zstd -d"
        ) from None
    return Frames(file, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)), (zstandard.ZstdError, EOFError)
