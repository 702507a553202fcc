"""`llamita quickstart`: flags, and what it prints. What is done lies in workflows/quickstart.py."""

from __future__ import annotations

from llamita.workflows.quickstart import QuickstartConfig


def run(config: QuickstartConfig) -> int:
    """Train a small model from nothing on Meadow's stories, score it, and read what it writes.

    Interrupted, it goes on where it was when called again.
    """
    from llamita.backends import load_backend
    from llamita.workflows.quickstart import quickstart

    backend = load_backend(config.backend)
    return quickstart(config, backend.build_train_step, backend.load_runner)
