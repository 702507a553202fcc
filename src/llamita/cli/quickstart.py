"""`llamita quickstart`: flags, and what it prints. What is done lies in workflows/quickstart.py."""

from __future__ import annotations

from llamita.workflows.quickstart import QuickstartConfig


def run(config: QuickstartConfig) -> int:
    """Train a small model from nothing on Meadow's stories, score it, and read what it writes.

    Interrupted, it goes on where it was when called again.
    """
    from llamita.torch_backend.runner import load_runner
    from llamita.torch_backend.train_step import build_train_step
    from llamita.workflows.quickstart import quickstart

    return quickstart(config, build_train_step, load_runner)
