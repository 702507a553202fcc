"""`llamita quantize`: a model's matrices in int8 or int4, as a model directory of their own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llamita.backend.interface import BackendName


@dataclass(frozen=True)
class QuantizeConfig:
    """Write a copy of a model whose matrices are int8 or int4; llamita evaluate measures the loss of quality."""

    model: tyro.conf.Positional[Path]
    """A model directory, a training run (then its best checkpoint), or a name on the hub."""
    output: tyro.conf.Positional[Path]
    """The directory to write."""
    to: Literal["int8", "int4"]
    """int8: one scale a row. int4: one for 32 numbers along the input; the embedding and the output head in int8."""
    backend: BackendName = "auto"
    """The framework that rounds; both write the same form. auto: MLX on Apple silicon where it is installed, else
    PyTorch."""
    overwrite: bool = False
    """Replace a destination that exists."""


def run(config: QuantizeConfig) -> None:
    from llamita.backend.choice import load_backend
    from llamita.cli.info import short_bytes
    from llamita.workflows.quantize import quantize

    backend = load_backend(config.backend)
    done = quantize(config.model, config.output, config.to, config.overwrite, backend)
    share = done.bytes_after / done.bytes_before
    print(f"{config.model}: {short_bytes(done.bytes_before)}")
    print(f"{config.output}: {config.to}, {short_bytes(done.bytes_after)}, {share:.0%} of the source's bytes")
