"""`llamita merge`: an adapter merged into its base, as a model directory of its own."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class MergeConfig:
    """Write an adapter and the model that it was trained over as one ordinary model."""

    adapter: tyro.conf.Positional[Path]
    """An adapter's directory, or the training run of one (then its best checkpoint)."""
    output: Path
    """The directory to write."""
    base: Path | None = None
    """The model that the adapter was trained over, where that has been moved."""
    overwrite: bool = False
    """Replace a destination that exists."""


def run(config: MergeConfig) -> None:
    from llamita.backend.choice import load_backend
    from llamita.workflows.adapters import merge

    opened = merge(config.adapter, config.output, config.overwrite, load_backend("torch"), config.base)
    ranks = sorted({factors.rank for factors in opened.adapter.factors.values()})
    print(
        f"{config.output}: {opened.base} with {len(opened.adapter.factors)} linear maps changed, "
        f"rank {', '.join(map(str, ranks))}"
    )
