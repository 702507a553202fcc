"""Text files, read piece by piece for training a tokenizer: any size in bounded memory, every character as it is.

Knows nothing of documents and their separators (data/ does) and nothing of tokens, but for where a text may be cut
without cutting through one.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llamita.storage import compressed

CHUNK_BYTES = 1 << 16
LONGEST_WORD = 1 << 20  # characters without a place to cut; after that a chunk is cut anywhere


def check_files(files: Sequence[Path]) -> int:
    """The bytes of all files together. FileNotFoundError or ValueError for what is no readable text file."""
    if not files:
        raise ValueError("expected one or more text files, got none")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"there is no file {file}")
        if file.is_dir():
            raise ValueError(f"{file} is a directory; name the text files in it")
    total = sum(file.stat().st_size for file in files)
    if total == 0:
        raise ValueError(f"there is no text to learn from: {', '.join(map(str, files))} is empty")
    return total


def read_chunks(files: Sequence[Path], on_bytes: Callable[[int], None] | None = None) -> Iterator[str]:
    """Yield the files' text in chunks of about 64 KiB whose concatenation is the text of the files.

    A chunk ends before a space, tab or newline that follows a character that is none: there the GPT-2 pattern always
    ends a part, so chunks split into the same parts as the whole text. Line ends are kept as they are. `on_bytes` is
    told how many bytes of the files, which may be compressed, have been read so far. Raises ValueError, with file and
    byte, for what is not UTF-8.
    """
    done = 0
    for file in files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        held = ""
        position = 0
        before = done
        with compressed.opened(file) as stream:
            while True:
                data = stream.read(CHUNK_BYTES)
                if not position and (other := compressed.other_kind(data)):
                    raise ValueError(f"{file} is {other}")
                pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
                try:
                    held += decoder.decode(data, final=not data)
                except UnicodeDecodeError as fault:
                    place = position - pending + fault.start
                    raise ValueError(f"{file} is not UTF-8: {fault.reason} at byte {place}") from None
                position += len(data)
                done = before + stream.consumed
                cut = len(held) if not data else _last_cut(held)
                if held[:cut]:
                    yield held[:cut]
                held = held[cut:]
                if on_bytes:
                    on_bytes(done)
                if not data:
                    break


def _last_cut(text: str) -> int:
    """The last place at which a chunk may end; 0 for none, unless the text has grown too long to wait for one."""
    for position in range(len(text) - 1, 0, -1):
        if text[position] in " \t\n\r" and not text[position - 1].isspace():
            return position
    return len(text) if len(text) > LONGEST_WORD else 0
