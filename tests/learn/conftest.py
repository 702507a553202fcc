"""What tests of the course share."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests import forked


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Python that need not import, see forked.py, for what is graded with one thread; and the environment for it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with forked.programs(tmp_path_factory.mktemp("forked"), environment) as directory:
        program = directory / "python"
        yield str(program) if program.exists() else sys.executable, environment


@pytest.fixture
def graded_at_once(python: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the grader begin without the second that imports take. (What it has to end would go on running.)"""
    program, environment = python
    monkeypatch.setattr(sys, "executable", program)
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)  # an import of a test before this one has set it
