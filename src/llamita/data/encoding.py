"""Documents to token ids in several processes, in order: the result does not depend on how many there are.

Memory is bounded: only a few groups of documents are on their way at a time. Knows nothing about sources
or files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
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
    """How documents are encoded; small, and can be sent to another process."""

    tokenizer: Path
    tokenizer_hash: str
    """What is at the path; a worker refuses any other."""
    bos: bool
    eos: bool


def encode_in_order(
    documents: Iterable[tuple[str, str]], encoder: Encoder, workers: int
) -> Generator[dict[str, Encoded], None, None]:
    """Encode (split, text) pairs, about a megabyte of text at a time; each split keeps the order it came in.

    ChildProcessError where a worker dies. Works with the `spawn` start method, so a script that calls this with more
    than one worker needs `if __name__ == "__main__":`.
    """
    groups = _groups(documents)
    first = list(islice(groups, GROUPS_WORTH_A_POOL if workers > 1 else 0))
    groups = chain(first, groups)
    if len(first) < GROUPS_WORTH_A_POOL:
        for group in groups:
            yield encode_group(encoder, group)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        waiting: deque[Future[dict[str, Encoded]]] = deque()
        for group in groups:
            waiting.append(_submit(pool, encoder, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError("an encoding process died (often for lack of memory); try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, encoder: Encoder, group: dict[str, list[str]]) -> Future[dict[str, Encoded]]:
    """Submit a group; BrokenProcessPool also where a worker cannot start, or where another died at that very moment
    and the pool closed its pipes under the one starting."""
    try:
        return pool.submit(encode_group, encoder, group)
    except OSError as error:
        raise BrokenProcessPool(str(error)) from error


def encode_group(encoder: Encoder, group: dict[str, list[str]]) -> dict[str, Encoded]:
    """Encode some documents of each split, in this process."""
    tokenizer = _tokenizer(encoder.tokenizer, encoder.tokenizer_hash)
    encoded = {}
    for split, texts in group.items():
        arrays = tokenizer.encode_batch(texts, bos=encoder.bos, eos=encoder.eos)
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        encoded[split] = Encoded(np.concatenate(arrays), lengths, characters, size)
    return encoded


def _groups(documents: Iterable[tuple[str, str]]) -> Iterator[dict[str, list[str]]]:
    """Documents by split, enough at a time to outweigh the cost of sending them to another process."""
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it stops the pool in order
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
