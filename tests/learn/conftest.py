"""What tests of the course share."""

import os
import sys

import pytest

from tests import forked


@pytest.fixture
def graded_at_once(forked_programs: forked.Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the grader begin without the second that imports take. (What it has to end would go on running.)"""
    monkeypatch.setattr(sys, "executable", forked_programs.find("python"))
    for name in os.environ.keys() - forked_programs.environment.keys() - {"PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)  # an import of a test before this one has set it
