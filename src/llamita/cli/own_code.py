"""`--with DIRECTORY` of several verbs: the modules of a course's folder in the place of the library's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamita.backend.interface import Backend, BackendName
    from llamita.learn.own_model import Use


def backend_with(directory: Path | None, use: Use, name: BackendName, device: str, threads: int = 0) -> Backend:
    """Returns the backend of that name; with a `directory`, one around the modules in it, which are graded first.

    The options are those of `load_backend`. ValueError, in one line, where a check does not pass.
    """
    from llamita.backend.choice import importing, load_backend

    if directory is None:
        return load_backend(name, device=device, threads=threads)
    if name == "mlx" or device == "gpu":
        raise ValueError("--with runs a course's code in PyTorch or numpy; leave --backend mlx and --device gpu out")
    from llamita.learn.own_model import checked_program
    from llamita.progress import ProgressBar

    with ProgressBar(f"checking the code in {directory}"):
        program = checked_program(directory, use)
    with importing("torch"):
        from llamita.backend.torch.own.backend import OwnBackend
    print(f"the checks pass: running the code in {directory}", file=sys.stderr)
    return OwnBackend(program)
