"""Chooses between PyTorch and MLX, and imports the one chosen.

The one place that does: verbs and `llamita.load` ask here and pass on what they get. Importing this file loads neither
framework. Knows nothing of models; what a backend is, interface.py says.
"""

import contextlib
import gc
import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from typing import Literal

from llamita.backend.interface import Backend, BackendName

PACKAGES = {"torch": "torch", "mlx": "'mlx[cpu]'" if sys.platform == "linux" else "mlx"}
"""The package that pip installs for each."""


def load_backend(name: BackendName = "auto", *, device: str = "auto", threads: int = 0, exact: bool = False) -> Backend:
    """Returns the backend of that name, imported; "auto" is MLX on Apple silicon where it is installed, else PyTorch.

    The options are those that one of them lacks, so that with "auto" they decide: `exact`, `threads` and "cuda" are
    PyTorch's, "gpu" is MLX's. (A backend that is given what it lacks refuses it.) ModuleNotFoundError says what to
    install.
    """
    chosen = choose(name, device, exact, threads)
    with importing(chosen), _nothing_collected():
        backend: Backend = importlib.import_module(f"llamita.backend.{chosen}.backend").BACKEND
    return backend


def choose(
    name: BackendName = "auto", device: str = "auto", exact: bool = False, threads: int = 0
) -> Literal["torch", "mlx"]:
    """Returns the framework that "auto" stands for on this machine with these options; any other name unchanged."""
    if name not in ("auto", *PACKAGES):
        raise ValueError(f"backend={name!r} is not one of auto, {', '.join(PACKAGES)}")
    if name != "auto":
        return name
    if device == "gpu":
        return "mlx"
    if exact or threads or device.startswith("cuda"):
        return "torch"
    is_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_apple_silicon and is_installed("mlx") else "torch"


def is_installed(name: Literal["torch", "mlx"]) -> bool:
    """Returns whether a framework can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Leaves the garbage collector out of an import: a framework makes a hundred thousand objects, all of which stay,
    and it would look through them again and again, for a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def importing(framework: Literal["torch", "mlx"]) -> Iterator[None]:
    """Says in one line what to install where an import inside fails for the lack of the framework."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != framework:
            raise
        text = f"the backend {framework} is not installed; install it with: pip install {PACKAGES[framework]}"
        raise ModuleNotFoundError(text, name=framework) from None
    except ImportError as error:  # on Linux, MLX without its CPU form
        if framework == "torch" or (error.name or "").split(".")[0] != "mlx":
            raise
        raise ValueError(f"MLX is not whole here ({error}); install it with: pip install {PACKAGES['mlx']}") from None
