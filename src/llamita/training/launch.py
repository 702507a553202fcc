"""Whether this process was started as one of several, as torchrun and other launchers say in the environment."""

import os


def launched_processes() -> int:
    """Returns how many processes this one was started among, as torchrun and others say in the environment; else 1."""
    known = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if known else 1


def launched_rank() -> int:
    """Returns the number of this process among those that were started together; 0 for one alone."""
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0
