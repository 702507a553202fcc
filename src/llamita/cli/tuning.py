"""The parts that all verbs that train a model share: the options of a run that goes on, its backend, and the message
after a signal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from llamita.training import exit_status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamita.backend.interface import Backend
    from llamita.training.config import TrainingVerb
    from llamita.training.trainer import TrainingResult

Verb = TypeVar("Verb", bound="TrainingVerb")


def defaults(verb: type[Verb], arguments: Sequence[str]) -> Verb | None:
    """Returns the values of flags that `arguments` leave out, if they go on with a run or name a recipe; else None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", nargs="?")
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    given = {name: value for name, value in vars(known).items() if value}
    if not hasattr(verb, "recipe"):
        given.pop("recipe", None)
    if not given.keys() & {"resume", "recipe"} or (known.resume and not known.output):
        return None
    from llamita.workflows.options import resolve

    return resolve(verb, **given)


def training_backend(config: TrainingVerb) -> Backend:
    """Returns the backend of a run."""
    from llamita.backend.choice import load_backend

    machine = config.machine
    return load_backend(machine.backend, device=machine.device, threads=machine.threads)


def stopped(verb: str, config: TrainingVerb, result: TrainingResult) -> int:
    """Prints how to go on with a run that a signal stopped; returns the exit status."""
    print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
    print(f"go on with: llamita {verb} --output {config.run.output} --resume")
    return exit_status.of_signal(result.signal)
