"""The command line as processes that need not import."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests import forked


@pytest.fixture
def call(forked_programs: forked.Programs) -> Callable[[str, list[str]], Any]:
    """Starts `llamita` or `python` with arguments: as a `forked.Call`, or as such a `Popen` where none is forked."""
    environment = forked_programs.environment
    if sys.platform == "linux":
        return functools.partial(forked.Call, forked_programs.directory, environment)
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return lambda program, arguments: subprocess.Popen(
        [forked_programs.find(program), *arguments], env=environment, **output
    )
