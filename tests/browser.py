"""A browser for the tests of pages, and the reason why they are skipped where there is none."""

import os
import shutil
from typing import Any

import pytest


def browser() -> Any:
    """Chromium, headless: what started it, to be stopped in the end, and the browser itself, to be closed before."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    started = sync_api.sync_playwright().start()
    if program is None and not os.path.exists(started.chromium.executable_path):
        started.stop()
        pytest.skip("needs a browser: `playwright install chromium`, or a chromium on the PATH")
    return started, started.chromium.launch(executable_path=program, args=["--no-sandbox"])
