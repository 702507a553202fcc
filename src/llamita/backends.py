"""Which framework computes: chooses between PyTorch and MLX, refuses what the chosen one lacks, and imports it.

The one place that does: verbs and `llamita.load` ask here and pass on what they get. Importing this file loads neither
framework. Knows nothing of models; what a backend has is the same names in either folder.
"""

import contextlib
import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llamita.plan import BackendName

PACKAGES = {"torch": "torch", "mlx": "'mlx[cpu]'" if sys.platform == "linux" else "mlx"}
"""What pip is to install for each."""
DEVICES = {"torch": "cpu or cuda", "mlx": "cpu or gpu"}


@dataclass(frozen=True)
class Backend:
    """A framework's face: a training step, and runners over a model directory and over host arrays."""

    name: Literal["torch", "mlx"]
    build_train_step: Callable[..., Any]
    load_runner: Callable[..., Any]
    runner_over: Callable[..., Any]


def load_backend(name: BackendName = "auto", *, device: str = "auto", threads: int = 0, exact: bool = False) -> Backend:
    """The backend of that name, imported; "auto" is MLX on Apple silicon where it is installed, else PyTorch.

    The options are those that a backend may lack: with "auto" they decide (`exact` and "cuda" are PyTorch's, "gpu" is
    MLX's), else ValueError in one line. ModuleNotFoundError says what to install.
    """
    chosen = choose(name, device, exact, threads)
    _refuse(chosen, device, threads, exact)
    with importing(chosen):
        train_step = importlib.import_module(f"llamita.{chosen}_backend.train_step")
        runner = importlib.import_module(f"llamita.{chosen}_backend.runner")
    return Backend(chosen, train_step.build_train_step, runner.load_runner, runner.runner_over)


def choose(
    name: BackendName = "auto", device: str = "auto", exact: bool = False, threads: int = 0
) -> Literal["torch", "mlx"]:
    """What "auto" stands for on this machine, with these options; any other name is itself."""
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
    """Whether a framework can be imported; it is not."""
    return importlib.util.find_spec(name) is not None


def _refuse(chosen: Literal["torch", "mlx"], device: str, threads: int, exact: bool) -> None:
    """Name the option that this backend does not have, and what to do about it."""
    if chosen == "torch":
        if device == "gpu":
            raise ValueError(f"device='gpu' is MLX's; with backend=torch give {DEVICES['torch']}, or backend=mlx")
        return
    if exact:
        raise ValueError("exact is PyTorch's alone; leave it out, or give backend=torch")
    if threads:
        raise ValueError(f"threads={threads} is PyTorch's option; MLX takes its own number, so leave threads at 0")
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device={device!r} is not MLX's; with backend=mlx give {DEVICES['mlx']}, or backend=torch")


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
        if framework == "torch":
            raise
        raise ValueError(f"MLX is not whole here ({error}); install it with: pip install {PACKAGES['mlx']}") from None
