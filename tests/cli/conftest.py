"""The command line as processes that need not import."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked


@pytest.fixture(scope="session")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, list[str]], Any]]:
    """Starts `llamita` or `python` with arguments: as a `forked.Call`, or as such a `Popen` where none is forked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    if sys.platform != "linux":
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        place = Path(sys.executable).parent
        yield lambda program, arguments: subprocess.Popen([place / program, *arguments], env=environment, **output)
        return
    with forked.programs(tmp_path_factory.mktemp("forked"), environment) as programs:
        yield functools.partial(forked.Call, programs, environment)
