"""The parts that all verbs that train a model share: the backend of a run, and the message after Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamita.training import exit_status

if TYPE_CHECKING:
    from llamita.backend.interface import Backend
    from llamita.training.config import TrainingConfig
    from llamita.training.trainer import TrainingResult


def training_backend(config: TrainingConfig) -> Backend:
    """Returns the backend of a run; a resumed run keeps the one that it was begun with."""
    from llamita.backend.choice import load_backend
    from llamita.workflows.pretrain import taken_over

    config = taken_over(config)
    return load_backend(config.backend, device=config.device, threads=config.threads)


def stopped(verb: str, config: TrainingConfig, result: TrainingResult) -> int:
    """Prints how to go on with a run that Ctrl-C stopped; returns the exit status."""
    print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
    print(f"go on with: llamita {verb} --output {config.output} --resume")
    return exit_status.INTERRUPTED
