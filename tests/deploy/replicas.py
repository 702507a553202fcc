"""Real `llamita serve` processes of a small model with random weights, for the tests of what stands before them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamita.backend.torch.model import weights
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator

CONFIG = ModelConfig(264, 64, 128, 4, 4, 2, 2048)
AT_ONCE = 2
"""So many requests run at once in a replica; the others wait."""


@dataclass
class Replica:
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str

    def stop(self, number: signal.Signals) -> int:
        """Sends it a signal and returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def write_model(directory: Path) -> None:
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, CONFIG)
        train_bpe_from_iterator(["a small text"] * 2, CONFIG.vocab_size).save(temporary)
        model_directory.save_tensors(temporary, weights.to_host_arrays(weights.build_model(CONFIG)))


@contextlib.contextmanager
def replicas(model: Path, count: int) -> Iterator[list[Replica]]:
    """Yields servers of a model that answer; ends them afterwards."""
    command = [sys.executable, "-m", "llamita.cli.main", "serve", str(model), "--port", "0"]
    command += ["--max-sequences", str(AT_ONCE), "--threads", "1", "--name", "tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(count)]
    try:
        yield [Replica(process, _address(process)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


def _address(process: subprocess.Popen[str]) -> str:
    """Returns host and port from the line that says that it serves; reads on, so that its log never fills a pipe."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving tiny at http://(\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    raise AssertionError(f"the server ended with {process.wait()}")
