"""Fixtures shared by all tests."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import forked, shortcuts
from tests.backend import frameworks
from tests.ordering import long_first

# Without a GPU, Triton's kernels are interpreted. Triton looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has Ctrl-C ignored, which every program below would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

shortcuts.take()

# No timing decides a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Modules and tests stay to the end; see pytest_collection_finish.
gc.disable()

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora that lies beside a development checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no corpora at {SHARED_DATA}; this test needs them")
    return SHARED_DATA


@pytest.fixture(scope="module", params=frameworks.NAMES)
def framework(request: pytest.FixtureRequest) -> frameworks.Framework:
    """Each backend in turn; the tests of MLX are skipped where it is not installed."""
    return frameworks.make(request.param)


@pytest.fixture(scope="session")
def forked_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forked.Programs]:
    """Programs that need not import, see forked.py, and compute on one thread."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    with forked.programs(tmp_path_factory.mktemp("forked"), environment) as directory:
        yield forked.Programs(directory, environment)


@pytest.hookimpl(trylast=True)  # when those that are not run are already left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, files with long ones come first; else the order stays."""
    processes = getattr(config, "workerinput", {}).get("workercount", 0)
    if processes:
        long = {item for item in items if any(map(item.get_closest_marker, ("medium", "slow")))}
        items[:] = long_first(items, processes, lambda item: item.path, long.__contains__)


def pytest_collection_finish() -> None:
    """Spares the collector of garbage all that is there when the tests begin; it takes seconds to look through that."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Lets the collector see all again, so that libraries that count what is left at the end find nothing."""
    gc.unfreeze()
