"""Text files in bounded memory: decoded pieces, lines, and documents between separators.

gzip and Zstandard files are read as what they hold. UTF-8 only, a byte order mark at the start is dropped, and line
ends (LF, CRLF, CR) become LF as Python's text mode has it. Knows nothing about what the documents are for.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from llamita.storage import compressed

Separator = Literal["blank-line", "<|endoftext|>", "file"]

END_OF_TEXT = "<|endoftext|>"
CHUNK_BYTES = 1 << 20


def documents(path: Path, separator: Separator) -> Iterator[str]:
    """The documents of one file, in order; memory is bounded by the longest document.

    blank-line: runs of lines that are not blank, joined by LF. <|endoftext|>: what lies between the markers, without
    line ends at either side. file: the whole file as it is. Documents may be empty.
    """
    if separator == "file":
        yield "".join(chunks(path))
    elif separator == END_OF_TEXT:
        yield from _between_markers(path)
    elif separator == "blank-line":
        yield from _paragraphs(path)
    else:
        raise ValueError(f"separator={separator!r} is not known; use blank-line, {END_OF_TEXT} or file")


def chunks(path: Path) -> Iterator[str]:
    """The file's text in pieces of about a megabyte. ValueError names the file and byte offset of what is not UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    read = 0
    with compressed.opened(path) as file:
        at_end = False
        while not at_end:
            piece = file.read(CHUNK_BYTES)
            at_end = not piece
            if not read and (other := compressed.other_kind(piece)):
                raise ValueError(f"{path} is {other}")
            read += len(piece)
            if read == len(piece) and piece.startswith(codecs.BOM_UTF8):
                piece = piece[len(codecs.BOM_UTF8) :]
            try:
                text = decoder.decode(piece, final=at_end)
            except UnicodeDecodeError as error:
                # error.object is what the decoder held back before, and this piece.
                offset = read - len(error.object) + error.start
                value = error.object[error.start]
                is_utf16 = not offset and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                how = "iconv -f UTF-16 -t UTF-8, since it begins as UTF-16 does" if is_utf16 else "iconv"
                raise ValueError(
                    f"{path} is not UTF-8: byte {value:#04x} at offset {offset} ({error.reason}); "
                    f"convert the file, for example with {how}"
                ) from None
            if text:
                yield text


def lines(path: Path) -> Iterator[str]:
    """The file's lines without their ends. A line of any length works as long as it fits in memory."""
    return lines_of(chunks(path))


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text in pieces."""
    held: list[str] = []
    for text in pieces:
        first, *rest = text.split("\n")
        held.append(first)
        if rest:
            yield "".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
    if last := "".join(held):
        yield last


def _paragraphs(path: Path) -> Iterator[str]:
    held: list[str] = []
    for line in lines(path):
        if line and not line.isspace():
            held.append(line)
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _between_markers(path: Path) -> Iterator[str]:
    held: list[str] = []
    tail = ""  # the end of what was read, in which a marker may begin
    seen_marker = False
    for text in chunks(path):
        *done, rest = (tail + text).split(END_OF_TEXT)
        for piece in done:
            held.append(piece)
            yield "".join(held).strip("\n")
            held = []
            seen_marker = True
        cut = max(0, len(rest) - len(END_OF_TEXT) + 1)
        held.append(rest[:cut])
        tail = rest[cut:]
    last = "".join([*held, tail]).strip("\n")
    if last or not seen_marker:
        yield last
