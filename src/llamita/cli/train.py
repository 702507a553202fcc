"""`llamita train`: flags and a closing line. What is done lies in workflows/pretrain.py and training/."""

from __future__ import annotations

from llamita.workflows.pretrain import PretrainConfig

INTERRUPTED = 130  # the exit status of shells for Ctrl-C


def run(config: PretrainConfig) -> int:
    """Train a model from nothing, or carry on an interrupted run.

    Examples:
      llamita train --preset tiny --data DATA --output RUN
      llamita train --preset stories-15m --set num_hidden_layers=4 --data DATA --output RUN --steps 5000 --compile
      llamita train --output RUN --resume

    Ctrl-C finishes the update, saves and ends; a second Ctrl-C ends at once.
    """
    from llamita.backends import load_backend
    from llamita.workflows.pretrain import pretrain, taken_over

    config = taken_over(config)
    backend = load_backend(config.backend, device=config.device, threads=config.threads)
    result = pretrain(config, backend.build_train_step)
    if result.interrupted:
        print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
        print(f"go on with: llamita train --output {config.output} --resume")
        return INTERRUPTED
    print(f"trained {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        print(f"best validation loss {result.best.loss:.4f} nats/token at step {result.best.step}")
    print(f"try it with: llamita generate {config.output}")
    return 0
