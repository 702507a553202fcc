"""A pytest plugin for llama.cpp's suite of tests: servers are forks of this process, and nothing is downloaded.

A fork has PyTorch imported already, which else takes most of the time of a test. The tests themselves are as they are.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import llama_server  # type: ignore[import-not-found]  # beside this file

import llamita.backend.torch.infer.runner
import llamita.server.app
import llamita.server.run  # noqa: F401  what a server imports, and a fork need not
from llamita.cli.main import main

FORK = multiprocessing.get_context("fork")


def pytest_collection_finish() -> None:
    utils: Any = sys.modules["utils"]
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # downloads the models of the suite
    utils.subprocess.Popen = ForkedServer


class ForkedServer:
    """What the suite uses of a `subprocess.Popen` of llama-server."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], **others: Any) -> None:
        self._process = FORK.Process(target=_serve, args=(arguments[1:], env))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("llamita serve", timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _serve(flags: Sequence[str], env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.exit(main(llama_server.translated(flags)))
