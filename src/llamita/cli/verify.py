"""`llamita verify`: compares a model with a reference, layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from llamita.backend.interface import Forward


@dataclass(frozen=True)
class VerifyConfig:
    """Compare a model with a reference, layer by layer, and report where they first differ."""

    model: tyro.conf.Positional[Path]
    """A model directory, a training run, or a name on the hub."""
    against: str = "transformers"
    """transformers, mlx-lm: the same directory as that library runs it; mlx, torch: as the other of Llamita's backends
    runs it; another directory, run here; or a GGUF file, as llama.cpp runs it (needs llama-cpp-python; it shows logits
    alone)."""
    backend: Literal["torch", "mlx"] = "torch"
    """The backend that is verified, and that runs another directory."""
    tokens: tuple[int, ...] = ()
    """Token ids to run. Left out: fixed random ones."""
    tolerance: float | None = None
    """The largest difference allowed, as a share of the largest magnitude at that place. Left out: 1e-4, or 1e-2
    against llama.cpp, which rounds keys and values to half precision."""


def run(config: VerifyConfig) -> int:
    from rich.console import Console
    from rich.table import Table

    from llamita.backend.choice import load_backend
    from llamita.workflows.verify import TOLERANCE, verify

    if config.against == config.backend:
        other = "mlx" if config.backend == "torch" else "torch"
        raise ValueError(f"{config.backend} would be compared with itself; give --against {other}")
    model = load_backend(config.backend).load_runner(config.model, "float32", "cpu")
    if config.against == "transformers" and model.config.quantization:
        raise ValueError(
            f"{config.model} is quantised ({model.config.quantization}), which transformers cannot read; give "
            "--against the directory of the model that it was made from, and a --tolerance"
        )
    reference = load_reference(config)
    tolerance = 1e-2 if Path(config.against).is_file() else TOLERANCE
    tolerance = tolerance if config.tolerance is None else config.tolerance
    result = verify(model, reference, model.config, config.tokens or None, tolerance)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("after", "largest", "mean"):
        table.add_column(title, justify="left" if title == "after" else "right")
    fault = result.first_fault
    for place in result.places:
        style = "red" if place.largest > tolerance else ""
        note = "  <- differs here" if place is fault else ""
        table.add_row(place.name, f"{place.largest:.1e}", f"{place.mean:.1e}{note}", style=style)
    console = Console(highlight=False)
    console.print(table)
    unclear = f", {result.unclear} too close to call" if result.unclear else ""
    console.print(f"the likeliest token is the same at {result.same_likeliest} of {result.tokens} positions{unclear}")
    if result.agrees:
        console.print(f"[green]equal[/] within {tolerance:g} of the largest magnitude at each place")
        return 0
    where = "in the likeliest tokens" if fault is None else f"at {fault.name}"
    console.print(f"[red]different[/]: the two first differ {where}; all places before agree within {tolerance:g}")
    return 1


def load_reference(config: VerifyConfig) -> "Forward":
    """Returns the reference that the model is compared with.

    ValueError, OSError or ModuleNotFoundError, in one line, where it cannot be run.
    """
    from llamita.backend import choice

    if config.against == "transformers":
        from llamita.backend.torch.peers import TransformersRunner

        return TransformersRunner(config.model)
    if config.against == "mlx-lm":
        with choice.importing("mlx"):
            from llamita.backend.mlx.peers import MlxLmRunner
        return MlxLmRunner(config.model)
    if config.against in ("mlx", "torch"):
        other: Literal["mlx", "torch"] = "mlx" if config.against == "mlx" else "torch"
        return choice.load_backend(other).load_runner(config.model, "float32", "cpu")
    if Path(config.against).is_file():
        from llamita.storage.formats.llama_cpp import LlamaCppRunner

        return LlamaCppRunner(config.against)
    return choice.load_backend(config.backend).load_runner(config.against, "float32", "cpu")
