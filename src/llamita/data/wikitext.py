"""WikiText: where an article begins, and an article as one document.

The files are articles laid end to end, one paragraph, heading or table row a line:

    (blank)
     = Title =
    (blank)
     First paragraph ...
     Second paragraph ...
    (blank)
     = = Heading = =
    (blank)

Rows of tables and equations may look like titles (` = Win ; D = `). What tells them apart is the blank lines: inside an
article, blank lines stand only around headings. Knows nothing about files, tokens or splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain


def articles(lines: Iterable[str]) -> Iterator[str]:
    """One document per article: its lines that are not blank, stripped, title and headings kept, joined by LF.

    Text before the first title is a document of its own.
    """
    held: list[str] = []
    for line, begins_article in _mark_titles(lines):
        if begins_article and held:
            yield "\n".join(held)
            held = []
        held.append(line)
    if held:
        yield "\n".join(held)


def heading_level(line: str) -> int:
    """1 for what is shaped like a title (`= Title =`), 2 for `= = Heading = =`, and so on; 0 for any other line.

    The level is the smaller of the runs of `=` at the two ends, as in MediaWiki; a title may itself contain `=`.
    """
    words = line.split()
    if len(words) < 3 or words[0] != "=" or words[-1] != "=":
        return 0
    opening = next((i for i, word in enumerate(words) if word != "="), len(words))
    closing = next((i for i, word in enumerate(reversed(words)) if word != "="), len(words))
    return min(opening, closing) if opening < len(words) else 0


def _mark_titles(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each line that is not blank, stripped, and whether it is the title of an article.

    A title is a line of level 1 with a blank line (or an end of the file) on both sides. Where the last line before it
    is a title or heading, at least two blank lines must lie between: an article that ends in an empty section leaves
    two or more, while a row that is all there is in a section has exactly one.
    """
    blanks_before = 2  # the start of the file counts as blank lines
    after_heading = False  # the last line that was not blank is a title or heading
    held: str | None = None  # the last line, where the next line must say what it is
    for raw in chain(lines, [""]):  # so does its end
        line = raw.strip()
        if held is not None:
            level = heading_level(held) if not line and blanks_before else 0
            is_title = level == 1 and (blanks_before > 1 or not after_heading)
            yield held, is_title
            after_heading = is_title or level > 1
            blanks_before = 0
            held = None
        if line:
            held = line
        else:
            blanks_before += 1
