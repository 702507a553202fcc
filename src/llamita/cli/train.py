"""`llamita train`: flags and a closing line. The work lies in workflows/pretrain.py and training/."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llamita.cli.tuning import stopped, training_backend
from llamita.workflows.pretrain import PretrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


def run(config: PretrainConfig) -> int:
    """Train a model from nothing, or carry on an interrupted run.

    Examples:
      llamita train --preset tiny --data DATA --output RUN
      llamita train --preset stories-15m --set num_hidden_layers=4 --data DATA --output RUN --steps 5000 --compile
      llamita train --output RUN --resume
      llamita train --recipe scratch-shakespeare --steps 500

    Ctrl-C finishes the update, saves and ends; a second Ctrl-C ends at once.
    """
    from llamita.workflows.pretrain import pretrain
    from llamita.workflows.recipes import with_recipe

    config = with_recipe(config)
    result = pretrain(config, training_backend(config))
    if result.interrupted:
        return stopped("train", config, result)
    print(f"trained {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        print(f"best validation loss {result.best.loss:.4f} nats/token at step {result.best.step}")
    print(f"try it with: llamita generate {config.output}")
    return 0


def defaults(arguments: Sequence[str]) -> PretrainConfig | None:
    """Returns the options of the recipe that `arguments` name, for flags that are left out; None without a recipe, and
    for a resumed run, which has its options already."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", default="")
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args(list(arguments))
    if not given.recipe or given.resume:
        return None
    from llamita.workflows.recipes import recipe

    return recipe(given.recipe).train
