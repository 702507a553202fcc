"""Grades a reader's files: runs checks in a process of their own, with limits, and collects what came of each."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from llamita.learn.track import Track

State = Literal["passed", "wrong", "not written", "error"]
POLL_SECONDS = 0.02
START_SECONDS = 120.0
"""For the imports before the first check, which are none of the reader's doing."""
PRINTED_CHARACTERS = 400
"""So many of the last are shown."""
PRINTED_BYTES = 16 << 20
"""Code that prints more is ended, before it fills the disk."""


@dataclass(frozen=True)
class Limits:
    """What a check may take before it is ended."""

    seconds: float = 20.0
    memory_bytes: int = 4 << 30


@dataclass(frozen=True)
class Mistaken:
    """A mistake recognised by its effect, and the line of the paper that says how it should be."""

    name: str
    source: str


@dataclass(frozen=True)
class Result:
    """What came of a check."""

    lesson: str
    check: str
    state: State
    text: str = ""
    """The first element that differs, or the error; empty where there is nothing to say."""
    mistakes: tuple[Mistaken, ...] = ()
    """What explains a wrong result: one mistake, or two together; empty where it is none that is known."""


def grade(
    track: Track, framework: str, place: Path, lesson: str | None = None, limits: Limits = Limits()
) -> Iterator[Result]:
    """Yields the result of each check of a lesson, or of all lessons, in order.

    `place` is a course's directory, or the one file of a track that has one, wherever it lies.
    A check that is ended (its time or memory is over, or the code ended the process) is an error; those after it run
    in a new process.
    """
    chosen = track.lessons if lesson is None else (track.lesson(lesson),)
    remaining = [(each.name, check) for each in chosen for check in each.checks]
    with tempfile.TemporaryDirectory(prefix="llamita-learn-") as temporary:
        attempt = 0
        while remaining:
            attempt += 1
            folder = Path(temporary) / str(attempt)
            folder.mkdir()
            results = list(_run(track, framework, place, remaining, limits, folder))
            assert results, "a process that grades must finish or fail at least one check"
            yield from results
            remaining = remaining[len(results) :]


def _run(
    track: Track, framework: str, place: Path, checks: Sequence[tuple[str, str]], limits: Limits, folder: Path
) -> Iterator[Result]:
    """Runs checks in one process, to the last or to the first at which it has to be ended."""
    events, printed = folder / "events", folder / "printed"
    events.touch()
    names = [name for _, name in checks]
    graded = place / track.file if track.file and (place / track.file).is_file() else place
    arguments = [str(track.directory), framework, str(graded.resolve()), str(events), *names]
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamita.learn.harness", *arguments],
            cwd=place if place.is_dir() else None,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield from _follow(process, checks, limits, events, printed)
        finally:
            _end(process)


def _follow(
    process: "subprocess.Popen[bytes]",
    checks: Sequence[tuple[str, str]],
    limits: Limits,
    events: Path,
    printed: Path,
) -> Iterator[Result]:
    """Reads a process's events until it has ended or must be."""
    position, done, since, begun, imports = 0, 0, time.monotonic(), False, ""
    while done < len(checks):
        ended = process.poll() is not None  # before the last events are read
        with events.open("rb") as file:
            file.seek(position)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        position += len(lines)
        for line in lines.splitlines():
            event, since = json.loads(line), time.monotonic()
            begun, imports = "begun" in event, event.get("imports", "")
            if "done" in event:
                lesson, check = checks[done]
                assert event["done"] == check
                mistakes = tuple(Mistaken(*pair) for pair in event.get("mistakes", ()))
                yield Result(lesson, check, event["state"], event.get("text", ""), mistakes)
                done += 1
        if done == len(checks):
            return
        waited = limits if begun else Limits(START_SECONDS, limits.memory_bytes)
        why = _why_it_ends(process, waited, since, ended, printed.stat().st_size)
        if why:
            if imports:
                for each in checks[done:]:
                    yield Result(*each, "error", f"while {imports} was imported: {why}{_last(printed)}")
                return
            if not begun:
                raise RuntimeError(f"the grader's own process failed: {why}{_last(printed)}")
            yield Result(*checks[done], "error", f"{why}{_last(printed)}")
            return
        time.sleep(POLL_SECONDS)


def _why_it_ends(
    process: "subprocess.Popen[bytes]", limits: Limits, since: float, ended: bool, printed_bytes: int
) -> str:
    """Returns why a process runs no longer or must not; empty where it may go on."""
    if ended:
        return f"the code ended its process with status {process.returncode}"
    if time.monotonic() - since > limits.seconds:
        return f"it did not end within {limits.seconds:g} seconds; is there an endless loop?"
    if printed_bytes > PRINTED_BYTES:
        return f"it printed more than {PRINTED_BYTES >> 20} MiB"
    try:
        taken = psutil.Process(process.pid).memory_info().rss
    except psutil.Error:
        return ""
    if taken > limits.memory_bytes:
        return f"it took more than {limits.memory_bytes / 2**30:g} GiB of memory"
    return ""


def _last(printed: Path) -> str:
    with printed.open("rb") as file:
        file.seek(max(0, printed.stat().st_size - PRINTED_CHARACTERS))
        text = " ".join(file.read().decode("utf-8", "replace").split())
    return f"; the last it printed: {text}" if text else ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and those that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
