"""The serving track's modules for the tests: solutions, and the words and arrays of each framework."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from llamita.learn import track
from llamita.learn.harness import Grader, assembled, installed

TRACK = track.find("serving")
FRAMEWORKS = TRACK.frameworks
GIVEN = ("load", "projection", "run")


def sources(framework: str, folder: str = "") -> dict[str, Any]:
    files = sorted((TRACK.directory / framework / folder).glob("*.py"))
    return {path.stem: (path, path.read_text("utf-8")) for path in files}


def solutions(framework: str) -> SimpleNamespace:
    """The solutions' modules by name, and `tensors`, the arrays of their framework."""
    if framework == "mlx":
        pytest.importorskip("mlx.core")
    files = {**sources(framework), **sources(framework, "grader")}
    return assembled(files, sorted(files))


@contextmanager
def importable(framework: str) -> Iterator[None]:
    with installed(sources(framework)):
        yield


def grader(framework: str) -> Grader:
    if framework == "mlx":
        pytest.importorskip("mlx.core")
    return Grader(TRACK.directory, framework, TRACK.directory)
