"""`llamita quickstart`: flags; the work lies in workflows/quickstart.py and workflows/after_pretraining.py."""

from __future__ import annotations

from llamita.workflows.quickstart import QuickstartConfig


def run(config: QuickstartConfig) -> int:
    """Train a small model from nothing on Meadow's stories, score it, and read what it writes.

    When it was interrupted, the same command goes on where it stopped.
    """
    from dataclasses import replace

    from llamita.backend.choice import load_backend
    from llamita.workflows.quickstart import quickstart

    backend = load_backend(config.backend)
    if config.size == "auto" and backend.name == "mlx" and backend.device == "cpu":
        config = replace(config, size="small")
    status = quickstart(config, backend)
    if status or not config.full:
        return status
    from rich.console import Console

    from llamita.workflows.after_pretraining import SMALL, Amounts, tune_and_report

    amounts = SMALL if config.size == "small" else Amounts()
    bounded = amounts.at_most(config.steps, config.scored_stories)
    return tune_and_report(config, backend, Console(highlight=False), bounded)
