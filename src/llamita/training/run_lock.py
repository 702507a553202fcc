"""The lock of a run's directory: one process trains in it at a time, and anybody may ask whether one does.

RUN/.lock is locked by the system, which lets go of it when the process ends, however it ends. Knows nothing of runs.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
PATIENCE = 0.2  # seconds: whoever asks `is_held` holds the lock for a moment


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold RUN/.lock; ValueError, naming the process, where another one does."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try(descriptor):
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ValueError(
                f"{path} is in use by another training run (process {holder or 'unknown'}); "
                "wait for it to end, or choose another --output"
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process trains in this directory now; asking takes no right to write."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back by the close
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(PATIENCE / 10)
