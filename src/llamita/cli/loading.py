"""The flags of verbs that open a model to generate with it: `generate` and `chat`."""

from dataclasses import dataclass
from pathlib import Path
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


def template_source(template: str | None) -> str | None:
    """Returns a template's source where a file was given, else its name."""
    if template is not None and Path(template).is_file():
        return Path(template).read_text("utf-8")
    return template
