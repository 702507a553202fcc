"""`llamita train`: flags and a closing line. The work lies in workflows/pretrain.py and training/."""

from __future__ import annotations

from llamita.cli.tuning import stopped, training_backend
from llamita.workflows.pretrain import PretrainConfig


def run(config: PretrainConfig) -> int:
    """Train a model from nothing, or carry on an interrupted run.

    Examples:
      llamita train --preset tiny --data DATA --output RUN
      llamita train --preset stories-15m --set num_hidden_layers=4 --data DATA --output RUN --steps 5000 --compile
      llamita train --output RUN --resume
      llamita train --recipe scratch-shakespeare --steps 500

    Ctrl-C, SIGTERM and SIGUSR1 finish the update, save and end; a second one ends at once.
    """
    from llamita.workflows.pretrain import pretrain
    from llamita.workflows.recipes import with_recipe

    config = with_recipe(config)
    result = pretrain(config, training_backend(config, config.own_code))
    if result.interrupted:
        return stopped("train", config, result)
    print(f"trained {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        print(f"best validation loss {result.best.loss:.4f} nats/token at step {result.best.step}")
    print(f"try it with: llamita generate {config.run.output}")
    return 0
