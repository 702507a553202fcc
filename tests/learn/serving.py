"""The serving track's modules for the tests: solutions, and the words and arrays of each framework."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from llamita.learn import track
from llamita.learn.harness import assembled, installed
from llamita.learn.track import solutions_of, sources_of

TRACK = track.find("serving")
FRAMEWORKS = TRACK.frameworks
GIVEN = ("load", "projection", "run")


def solutions(framework: str) -> SimpleNamespace:
    """The solutions' modules by name, and `tensors`, the arrays of their framework."""
    if framework == "mlx":
        pytest.importorskip("mlx.core")
    own = sources_of((TRACK.directory / framework / "grader").glob("*.py"))
    files = {**solutions_of(TRACK.directory, framework), **own}
    return assembled(files, sorted(files))


@contextmanager
def importable(framework: str) -> Iterator[None]:
    with installed(solutions_of(TRACK.directory, framework)):
        yield
