"""The flags of verbs that open a model to generate with it: `generate` and `chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from llamita.backend.interface import BackendName
from llamita.inference.config import EngineConfig


@dataclass(frozen=True)
class LoadConfig:
    """How a model is loaded: the arguments of `LLM.load` besides the model itself and its adapters."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto is that of the file."""
    backend: BackendName = "auto"
    """Which framework computes; auto is MLX on Apple silicon where it is installed, else PyTorch."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|gpu")] = "auto"
    """Where to run: cpu or cuda with PyTorch, cpu or gpu with MLX; auto takes a GPU if there is one."""
    threads: int = 0
    """Threads on a CPU (PyTorch alone); 0 leaves the framework's choice."""
    exact: bool = False
    """The same bits whatever else runs: PyTorch in float32 on the CPU, slower."""
    draft: str = ""
    """Guess tokens ahead, which changes the speed and no token: lookup, or a smaller model of the same vocabulary."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
