"""The command as one of several processes that torchrun started: who speaks, what the launcher is told, restarts."""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llamita.training.launch import launched_processes, launched_rank

ERROR_FILE, RESTARTS = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_MAX_RESTARTS"


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
    """Lets the first process alone write to standard output; errors are every process's own."""
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def who() -> str:
    """Returns which process speaks, for a message of one among several."""
    processes = launched_processes()
    return f" (process {launched_rank() + 1} of {processes})" if processes > 1 else ""


def tell_launcher(message: str) -> None:
    """Leaves the reason of a failure where torchrun looks for it, so that it names the process that failed first."""
    path = os.environ.get(ERROR_FILE)
    if path and launched_processes() > 1 and not os.path.exists(path):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def restartable(arguments: Sequence[str]) -> Sequence[str]:
    """Returns the arguments of a verb that trains; where torchrun may start it again, it goes on with a run begun.

    Not only where it did: on a machine whose processes were well, it counts no restart.
    """
    if os.environ.get(RESTARTS, "0") == "0" or "--resume" in arguments:
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    output = parser.parse_known_args(list(arguments))[0].output
    begun = output is not None and (output / "run.json").is_file()
    return [*arguments, "--resume"] if begun else arguments
