"""The parts that all verbs that train a model share: the options of a run that goes on, its backend, and the message
after a signal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from llamita.training import exit_status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llamita.backend.interface import Backend
    from llamita.learn.own_model import Use
    from llamita.training.config import TrainingVerb
    from llamita.training.trainer import TrainingResult

Verb = TypeVar("Verb", bound="TrainingVerb")


def defaults(verb: type[Verb], arguments: Sequence[str]) -> Verb | None:
    """Returns the values of flags that `arguments` leave out, if they go on with a run or name a recipe or a depth;
    else None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", nargs="?")
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--data", nargs="?")
    for name in ("--depth", "--sequence-length", "--batch-size"):
        parser.add_argument(name, nargs="?", type=lambda text: int(text) if text.isdigit() else 0)
    known, _ = parser.parse_known_args(list(arguments))  # what is no number is refused later, with the other flags
    given = {name: value for name, value in vars(known).items() if value}
    if not hasattr(verb, "recipe"):
        given.pop("recipe", None)
    if not hasattr(verb, "depth") or not known.depth or given.keys() & {"resume", "recipe"}:
        given = {name: value for name, value in given.items() if name in ("output", "recipe", "resume")}
    if not given.keys() & {"resume", "recipe", "depth"} or (not known.output and not given.get("recipe")):
        return None
    if known.resume and not known.output:
        return None
    from llamita.workflows.options import resolve

    return resolve(verb, **given)


def training_backend(config: TrainingVerb, own_code: Path | None = None, use: Use = "train") -> Backend:
    """Returns the backend of a run, around the code in a course's folder where one is given."""
    from llamita.cli.own_code import backend_with

    machine = config.machine
    return backend_with(own_code, use, machine.backend, machine.device, machine.threads)


def stopped(verb: str, config: TrainingVerb, result: TrainingResult) -> int:
    """Prints how to go on with a run that a signal stopped; returns the exit status."""
    print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
    print(f"go on with: llamita {verb} --output {config.run.output} --resume")
    return exit_status.of_signal(result.signal)
