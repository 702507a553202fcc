"""The flags of verbs that open a model to generate with it: `generate` and `chat`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from llamita.backend.interface import BackendName
from llamita.inference.config import EngineConfig


@dataclass(frozen=True)
class LoadConfig:
    """The arguments of `LLM.load` besides the model itself and its adapters."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto: that of the file."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|gpu")] = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""
    threads: int = 0
    """Threads on a CPU (PyTorch alone); 0: the framework's choice."""
    exact: bool = False
    """Give the same bits whatever else runs beside: PyTorch in float32 on the CPU, slower."""
    draft: str = ""
    """Guess tokens ahead (speculative decoding), which changes the speed but no token: lookup, or a smaller model of
    the same vocabulary."""
    engine: EngineConfig = EngineConfig()


@contextmanager
def shown_loading(model: object) -> Iterator[None]:
    """Says on a terminal that a model is being opened, and for how long: kernels are compiled the first time."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"opening {model}", total=None)
        yield
