"""A directory that one process works in at a time, held by a lock on a file in it.

The system locks the file, and lets go of it when the process ends, however it ends. Knows nothing of what the directory
is for.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 0.2  # seconds: whoever asks `is_held` holds the lock for a moment


@contextlib.contextmanager
def held(file: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Holds the lock; ValueError, with what `refusal` says of the number of the process, where another one does."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ValueError(refusal(holder or "unknown"))
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(file: Path) -> bool:
    """Returns whether a process holds the lock now; asking takes no right to write."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back by the close
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(PATIENCE / 10)
