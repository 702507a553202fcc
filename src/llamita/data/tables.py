"""Tables as text: the rows of CSV, with fields in quotes, and of TSV, where a quote is a character like any other.

Fields may be of any length. Knows nothing of what columns mean.
"""

from collections.abc import Iterator
from pathlib import Path

from llamita.data import textfiles

QUOTE = '"'


def rows(path: Path, separator: str, quoted: bool) -> Iterator[tuple[list[str], int]]:
    """The fields of each row that is not an empty line, and the number of its last line.

    `quoted`: a field that begins with a quote goes on to the next single one, over separators and ends of lines, and
    two quotes in it are one (RFC 4180). ValueError, in one line, that names the line where it is not of that form.
    """
    lines = enumerate(textfiles.lines(path), start=1)
    for number, line in lines:
        if not line:
            continue
        if not quoted or QUOTE not in line:
            yield line.split(separator), number
            continue
        first, row, place = number, [], 0
        while place <= len(line):
            if not line.startswith(QUOTE, place):
                end = line.find(separator, place)
                end = len(line) if end < 0 else end
                row.append(line[place:end])
                place = end + 1
                continue
            parts: list[str] = []
            place += 1
            while True:
                end = line.find(QUOTE, place)
                if end < 0:
                    parts.append(line[place:] + "\n")
                    number, line = next(lines, (0, ""))
                    if not number:
                        raise ValueError(
                            f"{path}, line {first} is not CSV: a quote begins a field there and none ends it"
                        )
                    place = 0
                elif line.startswith(QUOTE, end + 1):
                    parts.append(line[place : end + 1])
                    place = end + 2
                else:
                    parts.append(line[place:end])
                    place = end + 1
                    break
            row.append("".join(parts))
            if place < len(line) and line[place] != separator:
                raise ValueError(
                    f"{path}, line {number} is not CSV: expected {separator!r} or the end of the line after a field in "
                    f"quotes, got {line[place]!r}"
                )
            place += 1
        yield row, number
