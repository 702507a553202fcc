"""Runs a function in several processes that train together, as torchrun would start them.

They are forked from a server that has done the imports already, which take most of the time of a start.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests import shortcuts

IMPORTED = (
    *("tests.together", "llamita.backend.torch.backend", "llamita.backend.torch.train.distributed"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "matplotlib.backends.backend_agg"),
    *("llamita.workflows.pretrain", "pytest"),
)
"""What the server imports: what the processes use, and what tests' files do."""
SECONDS = 120  # after which processes that wait for each other are killed


def run_together(size: int, function: Callable[..., Any], *given: Any, until: Callable[[], bool] | None = None) -> Any:
    """Returns what `function(*given)` gives in the first of `size` processes.

    With `until`, all of them are killed as soon as that says so, and nothing is returned. AssertionError with the first
    process's own error, or where they take too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    ours, theirs = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        context.Process(target=_work, args=(rank, size, port, theirs, function, given), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        end = time.monotonic() + SECONDS
        while not ours.poll(0.02):
            if until is not None and until():
                return None
            assert time.monotonic() < end, f"{size} processes were not done after {SECONDS} s"
        try:
            result = ours.recv()
        except EOFError:
            raise AssertionError("the first process died without a word") from None
    finally:
        for process in processes:
            if until is None:
                process.join(5)
            process.kill()
            process.join()
    assert not isinstance(result, str), result
    return result[0]


def _work(rank: int, size: int, port: int, connection: Any, function: Callable[..., Any], given: Any) -> None:
    import torch
    import torch.distributed as dist

    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in known.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    shortcuts.take()
    try:
        result: Any = (function(*given),)
    except BaseException as error:
        result = f"process {rank}: {type(error).__name__}: {error}"
    if rank == 0 or isinstance(result, str):
        with suppress(OSError):
            connection.send(result)
    if dist.is_initialized():
        dist.destroy_process_group()
