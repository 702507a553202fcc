"""`llamita verify`: a model held to another run of it, layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class VerifyOptions:
    """Compare a model with a reference, layer by layer, and say where they first part."""

    model: tyro.conf.Positional[Path]
    """A model directory, a training run, or a name on the hub."""
    against: str = "transformers"
    """transformers: the same directory as transformers runs it; mlx: the same as mlx-lm runs it; another directory, run
    here; or a GGUF file, as llama.cpp runs it (needs llama-cpp-python; it shows logits alone)."""
    tokens: tuple[int, ...] = ()
    """Token ids to run; fixed random ones where none are given."""
    tolerance: float | None = None
    """The largest difference allowed, as a share of the largest magnitude at that place; left out: 1e-4, and 1e-2
    against llama.cpp, which rounds keys and values to half precision."""


def run(options: VerifyOptions) -> int:
    from rich.console import Console
    from rich.table import Table

    from llamita.torch_backend.runner import load_runner
    from llamita.workflows.verify import TOLERANCE, Tracing, verify

    model = load_runner(options.model, "float32", "cpu")
    if options.against == "transformers" and model.config.quantization:
        raise ValueError(
            f"{options.model} is quantised ({model.config.quantization}), which transformers cannot read; give "
            "--against the directory of the model that it was made from, and a --tolerance"
        )
    reference: Tracing
    tolerance = TOLERANCE
    if options.against == "transformers":
        from llamita.torch_backend.peers import TransformersRunner

        reference = TransformersRunner(options.model)
    elif options.against == "mlx":
        try:
            from llamita.mlx_backend.peers import MlxLmRunner
        except ModuleNotFoundError:
            raise
        except ImportError as error:
            raise ValueError(
                f"MLX is not whole here ({error}); on Linux it needs its CPU form: pip install 'mlx[cpu]'"
            ) from None
        reference = MlxLmRunner(options.model)
    elif Path(options.against).is_file():
        from llamita.formats.llama_cpp import LlamaCppRunner

        reference = LlamaCppRunner(options.against)
        tolerance = 1e-2
    else:
        reference = load_runner(options.against, "float32", "cpu")
    tolerance = tolerance if options.tolerance is None else options.tolerance
    result = verify(model, reference, model.config, options.tokens or None, tolerance)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("after", "largest", "mean"):
        table.add_column(title, justify="left" if title == "after" else "right")
    fault = result.first_fault
    for place in result.places:
        style = "red" if place.largest > tolerance else ""
        note = "  <- parts here" if place is fault else ""
        table.add_row(place.name, f"{place.largest:.1e}", f"{place.mean:.1e}{note}", style=style)
    console = Console(highlight=False)
    console.print(table)
    unclear = f", {result.unclear} too close to call" if result.unclear else ""
    console.print(f"the likeliest token is the same at {result.same_likeliest} of {result.tokens} positions{unclear}")
    if result.agrees:
        console.print(f"[green]equal[/] within {tolerance:g} of the largest magnitude at each place")
        return 0
    where = "in the likeliest tokens" if fault is None else f"at {fault.name}"
    console.print(f"[red]different[/]: the two part {where}; what comes before agrees within {tolerance:g}")
    return 1
