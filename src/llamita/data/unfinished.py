"""The directory of a preparation under way: a hidden sibling of its output, held by one process, with a journal.

The journal says how far the files are certain to be on the disk, so that a preparation that was killed can go on. It is
written in one step, after the disk has what it speaks of. Knows nothing of what the files hold.

    .NAME.unfinished/journal.json       written now and then: the options, the input's files, the counts
    .NAME.unfinished/.lock              held while a process works here
    .NAME.unfinished/...                what becomes the directory NAME
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamita.storage import files, locks

JOURNAL, LOCK = "journal.json", ".lock"


class Unfinished:
    """The directory, and what its journal said when it was opened; empty at the beginning."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self.identity = json.loads(json.dumps(identity))
        self.progress: dict[str, Any] = {}

    def record(self, progress: Mapping[str, Any]) -> None:
        """Write the journal; what it speaks of must be on the disk."""
        self.progress = dict(progress)
        content = json.dumps({"identity": self.identity, "progress": self.progress})
        files.atomic_write(self.directory / JOURNAL, content)


@contextlib.contextmanager
def unfinished(output: Path, identity: Mapping[str, Any], resume: bool, overwrite: bool) -> Iterator[Unfinished]:
    """Yield the directory of a preparation, which becomes `output` when the block ends.

    When the block raises, the directory vanishes, unless its journal has been written and the fault may pass: an
    interruption, a full disk, a process that died. Then `resume` goes on with it. `identity` is a nested, JSON-able
    dict of all that decides the result. ValueError where another process works there, where it was begun with another
    identity, or where it would be lost by beginning anew; FileNotFoundError where there is nothing to resume.
    """
    place = place_of(output)
    if resume and not place.is_dir():
        raise FileNotFoundError(f"there is no unfinished preparation of {output}; leave --resume out to begin one")
    output.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True)
    with locks.held(
        place / LOCK, lambda _: f"another process is preparing {output}; wait for it, or choose another --output"
    ):
        work = Unfinished(place, identity)
        if (place / JOURNAL).is_file():
            if resume:
                work.progress = _read(place / JOURNAL, work.identity)
            elif not overwrite:
                raise ValueError(
                    f"{output} was being prepared and is not finished; add --resume to go on, or --overwrite to begin "
                    "anew"
                )
        if not work.progress:
            _empty(place)
        try:
            yield work
            for name in (JOURNAL, LOCK):
                (place / name).unlink(missing_ok=True)
            files.move_into_place(place, output)
        except BaseException as error:
            if not work.progress or isinstance(error, ValueError):
                shutil.rmtree(place, ignore_errors=True)
            raise


def place_of(output: Path) -> Path:
    """Where the unfinished preparation of `output` lies, if there is one."""
    return output.parent / f".{output.name}.unfinished"


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    content = files.read_json(path)
    before = content["identity"]
    faults = [
        f"{name} was {before.get(name)!r} and is now {identity.get(name)!r}"
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    ]
    if faults:
        raise ValueError(
            f"this preparation cannot be resumed so: {'; '.join(faults)}; give the options and files that it was begun "
            "with, or begin anew with --overwrite"
        )
    progress: dict[str, Any] = content["progress"]
    return progress


def _empty(place: Path) -> None:
    """Delete what an earlier process left, but the lock, which this one holds."""
    for entry in place.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
