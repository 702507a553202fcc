"""Documents to token ids in several processes, in order: the result does not depend on how many there are.

Memory is bounded: only a few groups of documents are on their way at a time. Knows nothing about sources
or files.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from llamita.text.tokenizer import Tokenizer

GROUP_CHARACTERS = 1 << 20
GROUP_DOCUMENTS = 4096
# Fewer groups than this are encoded here: starting processes would take longer.
GROUPS_WORTH_A_POOL = 4


@dataclass(frozen=True)
class Encoded:
    """Some documents laid end to end: tokens [sum of lengths], lengths int64 [documents]; sizes of their text."""

    tokens: np.ndarray
    lengths: np.ndarray
    characters: int
    bytes: int


@dataclass(frozen=True)
class Encoder:
    """The settings by which documents are encoded; small, and can be sent to another process."""

    tokenizer: Path
    tokenizer_hash: str
    """What is at the path; a worker refuses any other."""
    bos: bool
    eos: bool


def encode_in_order(
    groups: Iterator[dict[str, list[str]]], encoder: Encoder, workers: int
) -> Generator[dict[str, Encoded], None, None]:
    """Encode groups of documents, as `grouped` makes them, and yield the results in the same order.

    ChildProcessError where a worker dies. Works with the `spawn` start method, so a script that calls this with more
    than one worker needs `if __name__ == "__main__":`.
    """
    first = list(islice(groups, GROUPS_WORTH_A_POOL if workers > 1 else 0))
    groups = chain(first, groups)
    if len(first) < GROUPS_WORTH_A_POOL:
        for group in groups:
            yield encode_group(encoder, group)
        return
    yield from _encode_in_processes(groups, encoder, workers)


def _encode_in_processes(
    groups: Iterator[dict[str, list[str]]], encoder: Encoder, count: int
) -> Generator[dict[str, Encoded], None, None]:
    """Give each group to whichever process is free, and yield the results in the groups' order.

    Each process has a pipe of its own: its death, at any moment, is the end of its pipe and touches nothing shared.
    """
    with ExitStack() as stack:
        with _death_is_an_error():
            idle = [stack.enter_context(_worker(encoder)) for _ in range(count)]
        at_work: dict[Connection, int] = {}
        done: dict[int, dict[str, Encoded]] = {}
        sent = received = 0
        while True:
            while idle and sent - received <= 2 * count and (group := next(groups, None)) is not None:
                connection = idle.pop()
                with _death_is_an_error():
                    connection.send(group)
                at_work[connection] = sent
                sent += 1
            if not at_work:
                return
            wait(at_work)
            for connection in [connection for connection in at_work if connection.poll()]:
                with _death_is_an_error():
                    result = connection.recv()
                if isinstance(result, Exception):
                    raise result
                done[at_work.pop(connection)] = result
                idle.append(connection)
            while received in done:
                yield done.pop(received)
                received += 1


@contextmanager
def _worker(encoder: Encoder) -> Iterator[Connection]:
    """A process that encodes each group sent to it and sends back what came of it; killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, encoder), daemon=True)
    with ours:
        try:
            with theirs:
                process.start()
            yield ours
        finally:
            if process.pid is not None:
                process.kill()
                process.join()


def _work(connection: Connection, encoder: Encoder) -> None:
    """Encode what comes until the pipe ends, as it does when the other process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it stops the others in order
    with suppress(EOFError, ConnectionError):
        while True:
            group = connection.recv()
            result: dict[str, Encoded] | Exception
            try:
                result = encode_group(encoder, group)
            except Exception as error:
                error.add_note(traceback.format_exc())
                result = error
            connection.send(result)


@contextmanager
def _death_is_an_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        message = "an encoding process died (often for lack of memory); try fewer --workers"
        raise ChildProcessError(message) from error


def encode_group(encoder: Encoder, group: dict[str, list[str]]) -> dict[str, Encoded]:
    """Encode some documents of each split, in this process."""
    tokenizer = _tokenizer(encoder.tokenizer, encoder.tokenizer_hash)
    encoded = {}
    for split, texts in group.items():
        tokens, lengths = tokenizer.encode_joined(texts, bos=encoder.bos, eos=encoder.eos)
        characters = sum(map(len, texts))
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        encoded[split] = Encoded(tokens, lengths, characters, size)
    return encoded


def grouped(documents: Iterable[tuple[str, str]]) -> Iterator[dict[str, list[str]]]:
    """(split, text) pairs as documents by split, about a megabyte of text at a time; each split keeps its order.

    A group is enough to outweigh the cost of sending it to another process.
    """
    group: dict[str, list[str]] = {}
    characters = count = 0
    for split, text in documents:
        group.setdefault(split, []).append(text)
        characters += len(text)
        count += 1
        if characters >= GROUP_CHARACTERS or count >= GROUP_DOCUMENTS:
            yield group
            group, characters, count = {}, 0, 0
    if group:
        yield group


@lru_cache(maxsize=1)
def _tokenizer(path: Path, expected_hash: str) -> Tokenizer:
    """The tokenizer, loaded once per process."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.hash != expected_hash:
        raise ValueError(f"the tokenizer at {path} changed while the data was being prepared; prepare it again")
    return tokenizer
