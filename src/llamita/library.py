"""The Python face of the library: `llamita.load` and `llamita.save`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llamita.backend.choice import load_backend
from llamita.backend.interface import BackendName
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter
from llamita.inference.llm import LLM


@dataclass(frozen=True)
class RunOptions:
    """How a model is run: the arguments of `load` besides the model itself."""

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


def load(
    model: Path | str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    backend: BackendName = "auto",
    device: str = "auto",
    threads: int = 0,
    exact: bool = False,
    engine: EngineConfig | None = None,
    draft: str = "",
    adapters: Mapping[str, Path | str] | None = None,
) -> LLM:
    """Load a language model: a Hugging Face model directory, a training run, or a name on the hub (`owner/name`).

    `dtype` is that of weights and cache, "auto" that of the file. `backend` is "torch", "mlx", or "auto" for MLX on
    Apple silicon where it is installed, else PyTorch; `device` is "cpu", "cuda" (PyTorch), "gpu" (MLX), or "auto" for a
    GPU where there is one. PyTorch alone has `threads` (0 leaves its choice) and `exact`: logits that are the same bits
    alone and in any batch (float32 on the CPU, slower). `engine` says how much runs at once. `draft` has tokens guessed
    ahead, which changes the speed and no token: "lookup" looks for the last few tokens earlier in the text; else it is
    the directory of a smaller model of the same vocabulary. `adapters` (a name: its directory) are served over the
    model in one batch with it, each to the requests that name it; an adapter's directory may also be the model.

    The result generates (`generate`, `stream`), gives logits and residual streams (`runner.forward`), and is saved by
    `save`. FileNotFoundError or ValueError, in one line, where the model is missing, broken, or of a kind that Llamita
    does not have; ModuleNotFoundError where the framework is not installed.
    """
    from llamita.inference.drafting import DraftModel, PromptLookup

    chosen = load_backend(backend, device=device, threads=threads, exact=exact)
    load_runner = chosen.load_runner
    drafter: Drafter | None = PromptLookup() if draft == "lookup" else None
    if draft and drafter is None:
        drafter = DraftModel(load_runner(draft, dtype, device, threads))
    return LLM.load(
        model,
        lambda directory, **more: load_runner(directory, dtype, device, threads, exact, **more),
        config=engine,
        drafter=drafter,
        adapters=adapters,
    )


def save(model: LLM, path: Path | str, overwrite: bool = False) -> None:
    """Write a model as a Hugging Face model directory, whole or not at all.

    FileExistsError where the path exists, unless `overwrite`.
    """
    model.save(path, overwrite)
